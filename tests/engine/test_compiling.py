"""Compiled blocks: few sizes of batches, no compiling when somebody joins or leaves, and nobody's picture changes.

The compiler is torch's own front end with a back end that counts what it is given and runs it as it is, so that the
tests take seconds; what a card gains is not measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdfleet.engine import compiling
from sdfleet.engine.compiling import Compiling
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.families.base import NetworkRows
from sdfleet.engine.families.sd import StableDiffusion
from sdfleet.engine.repeated import blocks
from tests.engine.drawing import FLOAT32, drawing, most_levels_apart, ours, pictures, run

Checkpoints = Callable[[str], Path]
COMPILED = replace(FLOAT32, compile="on", max_rows=16)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each graph that was compiled: the rows of its first input."""
    graphs: list[int] = []

    def count(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(
            next(len(one) for one in inputs if isinstance(one, Tensor) and not isinstance(one, torch.nn.Parameter))
        )
        return graph.forward

    monkeypatch.setattr(compiling, "_BACKEND", count)
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def rows_given(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    given: list[int] = []
    real = StableDiffusion.predict

    def predict(self: StableDiffusion, rows: NetworkRows) -> Tensor:
        given.append(len(rows.latents))
        assert len(rows.states) == len(rows.timestep) == len(rows.guidance) == len(rows.n_tokens) == given[-1]
        return real(self, rows)

    monkeypatch.setattr(StableDiffusion, "predict", predict)
    return given


def test_other_company_in_a_batch_of_the_same_size_compiles_nothing(
    checkpoints: Checkpoints, compiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints("sd15")
    given = rows_given(monkeypatch)
    engine = Engine(COMPILED)

    def draw(*guidances: float) -> int:
        """Graphs compiled for one batch."""
        before = len(compiled)
        for n, guidance in enumerate(guidances):
            prompt = ("a cat on the moon", "a robot", "the red castle")[n % 3]
            how = {
                "guidance": guidance,
                "prompt": prompt,
                "seed": n,
                "sampler": ("euler", "ddim")[n % 2],
                "steps": 2 + n,
            }
            engine.submit(drawing("sd15", folder, job=f"{before}-{n}", **how))
        pictures(run(engine))
        return len(compiled) - before

    draw(5.0)
    first = draw(5.0, 5.0, 1.0)  # 5, 3 and 1 rows as they leave one by one
    again = [draw(5.0, 1.0, 5.0), draw(1.0, 5.0, 5.0), draw(5.0, 5.0), draw(1.0, 1.0, 1.0, 1.0, 1.0)]
    engine.close()

    assert set(given) <= {1, 2, 4, 8}
    assert {1, 2, 8} <= set(given)
    assert first > 0
    assert again == [0, 0, 0, 0]


def test_rows_that_fill_a_batch_up_change_nobodys_picture(checkpoints: Checkpoints, compiled: list[int]) -> None:
    folder = checkpoints("sd15")
    jobs = [
        drawing("sd15", folder, job=str(n), seed=n, steps=3 + n, guidance=(5.0, 1.0, 3.0)[n], negative_prompt="")
        for n in range(3)
    ]

    plain = ours(*jobs, options=replace(FLOAT32, max_rows=16))
    filled_up = ours(*jobs, options=COMPILED)

    assert compiled
    assert [most_levels_apart(a, b) <= 1 for a, b in zip(plain, filled_up, strict=True)] == [True] * 3


@pytest.mark.parametrize("name", ["sd15", "sd35", "flux-dev"])
def test_weights_in_8_bits_compile_no_more_and_change_nothing(
    name: str, checkpoints: Checkpoints, compiled: list[int]
) -> None:
    one = drawing(name, checkpoints(name))
    ours(one, options=COMPILED)
    n_full = len(compiled)
    torch._dynamo.reset()

    drawn = ours(one, options=replace(COMPILED, weights="fp8"))[0]

    assert len(compiled) - n_full == n_full > 0
    assert most_levels_apart(drawn, ours(one, options=replace(FLOAT32, weights="fp8"))[0]) <= 1


@pytest.mark.parametrize("name", ["sdxl", "sd35", "flux-dev", "klein", "zimage"])
def test_every_kind_of_network_has_blocks_and_draws_the_same_with_them(
    name: str, checkpoints: Checkpoints, compiled: list[int]
) -> None:
    guided = {} if name in ("sdxl", "sd35") else {"guidance": 1.0, "negative_prompt": ""}
    jobs = [drawing(name, checkpoints(name), job=str(n), seed=n, steps=2, **guided) for n in range(3)]

    plain = ours(*jobs, options=replace(FLOAT32, max_rows=16))
    filled_up = ours(*jobs, options=COMPILED)

    assert compiled
    assert [most_levels_apart(a, b) <= 1 for a, b in zip(plain, filled_up, strict=True)] == [True] * 3


def test_blocks_hold_no_blocks(checkpoints: Checkpoints) -> None:
    engine = Engine(FLOAT32)
    engine.submit(drawing("sd15", checkpoints("sd15"), steps=1))
    run(engine)
    network = engine._residency.get(str(checkpoints("sd15"))).family.components.use("unet")
    engine.close()
    found = blocks(network)

    assert len(found) >= 4
    assert not any(inner is not outer and inner in set(outer.modules()) for inner in found for outer in found)
    assert all(block is not network for block in found)


def test_by_itself_a_card_compiles_in_the_pause_after_the_first_pictures(
    checkpoints: Checkpoints, compiled: list[int]
) -> None:
    """A CPU that is told it should: what auto does on a card, a size a turn, and then nothing more."""
    engine = Engine(replace(FLOAT32, max_rows=4))
    engine._residency.compiling._is_on = True
    engine.submit(drawing("sd15", checkpoints("sd15"), steps=2))
    while engine._has_work:
        engine.step()
    assert compiled == []
    sizes = []
    while not engine.is_idle:
        before = len(compiled)
        engine.step()
        sizes.append(max(compiled[before:], default=0))
    assert sizes == [1, 2, 4, 0]
    n_graphs = len(compiled)
    engine.submit(drawing("sd15", checkpoints("sd15"), job="next", steps=2))
    run(engine)
    (facts,) = engine.facts()["compiled"].values()  # type: ignore[attr-defined]
    engine.close()

    assert len(compiled) == n_graphs
    assert facts["is_ready"] is True


def test_a_network_that_cannot_be_compiled_draws_as_it_is(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_graph: Any, _inputs: list[Any]) -> Any:
        raise OSError("no C compiler")

    monkeypatch.setattr(compiling, "_BACKEND", broken)
    torch._dynamo.reset()
    one = drawing("sd15", checkpoints("sd15"), steps=2)
    engine = Engine(FLOAT32)
    engine._residency.compiling._is_on = True
    drawn = []
    for _ in range(2):
        engine.submit(one)
        drawn.append(pictures(run(engine))["job", 0])
    (facts,) = engine.facts()["compiled"].values()  # type: ignore[attr-defined]
    engine.close()
    torch._dynamo.reset()

    assert "no C compiler" in facts["refused"]
    assert (drawn[0] == drawn[1]).all()


def test_on_a_cpu_nothing_is_compiled_unless_it_is_asked_for(checkpoints: Checkpoints, compiled: list[int]) -> None:
    ours(drawing("sd15", checkpoints("sd15"), steps=2), options=replace(FLOAT32, compile="auto"))

    assert compiled == []


@pytest.mark.usefixtures("compiled")
def test_memory_for_a_filled_up_batch_is_what_counts(checkpoints: Checkpoints) -> None:
    engine = Engine(replace(FLOAT32, compile="on"))
    engine.submit(drawing("sd15", checkpoints("sd15"), steps=4))
    engine.step()
    residency = engine._residency
    loaded = residency.get(str(checkpoints("sd15")))
    one = drawing("sd15", checkpoints("sd15"))
    loaded.row_caps["key"] = 13

    assert residency.row_cap(loaded, one, "key") == 8
    engine.close()


class _NoNumbers(TorchDispatchMode):
    """Fails where the host asks the device for a number: on a card it would wait there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was asked for in a step"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux-dev"])
def test_a_step_never_asks_the_device_for_a_number(name: str, checkpoints: Checkpoints) -> None:
    engine = Engine(replace(FLOAT32, max_rows=16))
    for n in range(2):
        engine.submit(drawing(name, checkpoints(name), job=str(n), steps=6, step_cache="light"))
    engine.step()
    with _NoNumbers():  # type: ignore[no-untyped-call]  # torch says nothing of its constructor
        for _ in range(3):
            engine.step()
    engine.close()


def test_what_was_chosen_reaches_the_engine() -> None:
    device = Engine(FLOAT32)._device

    assert Compiling(device, EngineOptions(compile="on"))._is_on
    assert not Compiling(device, EngineOptions(compile="off"))._is_on
    assert not Compiling(device, EngineOptions())._is_on
