"""Time is predicted from operations that were timed on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sdfleet.engine import speed
from sdfleet.engine.devices import Device
from sdfleet.engine.speed import SpeedBook
from sdfleet.engine.tape import Call, Shaped

CPU = Device(kind="cpu", dtype=torch.float32, vae_dtype=torch.float32, why="a test")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else wants a processor."""
    monkeypatch.setattr(speed, "_own_or_idle_s", lambda: time.perf_counter() * torch.get_num_threads())


def shaped(*size: int) -> Shaped:
    return Shaped(size, tuple(torch.empty(size, device="meta").stride()), torch.float32)


def linear(n_rows: int, width: int = 64) -> Call:
    return Call("aten.linear.default", (shaped(n_rows, width), shaped(width, width), None))


@pytest.mark.usefixtures("quiet")
def test_what_was_timed_once_is_known_to_the_next_process(tmp_path: Path) -> None:
    first = SpeedBook(CPU, tmp_path)
    first.learn([(linear(512), 10)], budget_s=30)
    first.save()
    known, again = (book.estimate({linear(512): 10}, n_views=0) for book in (first, SpeedBook(CPU, tmp_path)))
    assert not first.was_busy
    assert known is not None
    assert known == again
    assert (known.measured_share, known.seconds > 0) == (1.0, True)


def test_what_was_timed_beside_busy_programs_is_said_to_be_so_and_not_kept(tmp_path: Path) -> None:
    n_busy = 4 * (os.cpu_count() or 1)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_busy)]
    try:
        book = SpeedBook(CPU, tmp_path)
        book.learn([(linear(4096 + n, 512), 1) for n in range(400)], budget_s=1)
    finally:
        for one in busy:
            one.kill()
            one.wait()
    book.save()
    assert book.estimate({linear(512): 10}, n_views=0) is not None
    assert book.was_busy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quiet")
def test_what_is_known_is_not_said_to_be_timed_beside_busy_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = SpeedBook(CPU, tmp_path)
    first.learn([(linear(512), 1)], budget_s=30)
    first.save()
    monkeypatch.setattr(speed, "_LEAST_WATCHED_S", 0.0)
    monkeypatch.setattr(speed, "_own_or_idle_s", lambda: 0.0)  # others have it all
    second, other = SpeedBook(CPU, tmp_path), SpeedBook(CPU, None)
    for book in (second, other):
        book.learn([(linear(512), 1)], budget_s=30)
    assert (second.was_busy, other.was_busy) == (False, True)


def test_more_threads_than_processors_are_no_busy_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_LEAST_WATCHED_S", 0.0)
    monkeypatch.setattr(speed, "_own_or_idle_s", time.perf_counter)  # the one processor is ours
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    book = SpeedBook(CPU, None)
    book.learn([(linear(512), 1)], budget_s=30)
    assert not book.was_busy


def test_without_a_measurement_nothing_is_said(tmp_path: Path) -> None:
    book = SpeedBook(CPU, tmp_path)
    book.learn([(linear(512), 1)], budget_s=0)
    book.save()
    assert book.estimate({linear(512): 1}, n_views=0) is None
    assert list(tmp_path.iterdir()) == []


def test_what_there_was_no_time_for_goes_at_the_rate_of_its_kind() -> None:
    book = SpeedBook(CPU, None)
    book.learn([(linear(512), 1)], budget_s=30)
    known, guessed = (book.estimate({linear(n): 1}, n_views=0) for n in (512, 2048))
    assert known is not None
    assert guessed is not None
    assert guessed.measured_share == 0
    assert guessed.seconds == pytest.approx(4 * known.seconds)


def test_one_of_every_sort_is_timed_before_the_second_of_any() -> None:
    book = SpeedBook(CPU, None)
    products = [(linear(2048 + n, 512), 1) for n in range(400)]
    light = Call("aten.relu.default", (shaped(8, 8),))
    book.learn([*products, (light, 1)], budget_s=1)
    known = book.estimate({light: 1}, n_views=0)
    assert known is not None
    assert known.measured_share == 1


def test_whole_numbers_go_at_the_rate_of_others() -> None:
    book = SpeedBook(CPU, None)
    book.learn([(Call("aten.relu.default", (shaped(8, 8),)), 1)], budget_s=30)
    whole = Shaped((8, 8), (8, 1), torch.int64)
    guessed = book.estimate({Call("aten.add.Tensor", (whole, 1)): 1}, n_views=0)
    assert guessed is not None
    assert guessed.measured_share == 0


@pytest.mark.parametrize(
    ("whole", "factor"),
    [
        (linear(2**20, 512), 140),
        (Call("aten.conv2d.default", (shaped(2, 64, 512, 512), shaped(64, 64, 3, 3), None, (1, 1), (1, 1))), 10),
        (Call("aten.scaled_dot_product_attention.default", tuple(shaped(2, 16, 4096, 64) for _ in range(3))), 16),
    ],
)
def test_long_operations_are_timed_on_a_part(whole: Call, factor: float) -> None:
    light, times = SpeedBook(CPU, None)._lightened(whole)
    assert times == pytest.approx(factor, rel=0.4)
    assert light.arguments[0].n * times == pytest.approx(whole.arguments[0].n, rel=0.01)


@pytest.mark.usefixtures("quiet")
def test_a_torn_file_is_measured_anew(tmp_path: Path) -> None:
    book = SpeedBook(CPU, tmp_path)
    book.learn([(linear(64), 1)], budget_s=30)
    book.save()
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:20])
    assert SpeedBook(CPU, tmp_path).estimate({linear(64): 1}, n_views=0) is None


@pytest.mark.slow
def test_the_benchmark_of_the_planner_finds_it_near_at_toy_size() -> None:
    command = [sys.executable, "benchmarks/planner.py", "--thin", "--side", "256", "--budget", "60", "--json"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    for row in json.loads(answer.stdout.splitlines()[-1]):
        told, seen = row["predicted"], row["measured"]
        # The allocator's gaps differ by a tenth or two from run to run; of the time, other programs take their part.
        assert 0.6 < told["peak"] / seen["peak"] < 1.6, row
        assert told["was_busy"] or 0.1 < told["step_s"] / seen["step_s"] < 5, row
