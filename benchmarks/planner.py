"""How far the planner is off: predicted and measured peak of memory and time, published architectures, random weights.

    python benchmarks/planner.py                              # SD 1.5 and SD3 medium at 512 px, guided, bfloat16
    python benchmarks/planner.py --case sdxl:512:2:bfloat16   # name:side:rows:format, as often as you like
    python benchmarks/planner.py --side 64 --thin             # a minute's look on any machine

Both peaks are those of the checkpoint and not of the whole process: the measured one is the most memory that is no
file's of the process that draws two pictures, weights among it, above what it held with its libraries imported and
nothing loaded. (Pages of files are the libraries' code; the system takes them back first. Loading is not looked at: it
draws random weights here.) Measured times are of the second picture. Rows: 2 is one guided picture, 1
one without guidance, 4 two guided ones together. Text encoders are made light (`--text-encoders` keeps them). The
prediction is made first, in a process of its own. Linux: peaks are read from /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdfleet.domain import Drawing
    from sdfleet.engine.engine import Engine
    from sdfleet.engine.events import DtypeChoice

STEPS = 2
DEPTHS = ("num_layers", "num_single_layers")
# A network of a few channels for a quick look; by class of the component.
THIN: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": 8},
    "SD3Transformer2DModel": {"num_layers": 2, "num_attention_heads": 4, "caption_projection_dim": 256},
    "FluxTransformer2DModel": {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 2},
    "AutoencoderKL": {"block_out_channels": [32, 32, 64, 64]},
}


@dataclass(frozen=True)
class Case:
    """A published architecture at a size, with so many network rows, in a number format."""

    name: str
    side_px: int
    n_rows: int
    dtype: DtypeChoice

    @classmethod
    def read(cls, text: str) -> Case:
        name, side, rows, dtype = text.split(":")
        return cls(name, int(side), int(rows), cast("DtypeChoice", dtype))


@contextmanager
def checkpoint(case: Case, *, is_thin: bool, has_text_encoders: bool, n_layers: int | None) -> Iterator[Path]:
    from sdfleet.catalog import architectures
    from sdfleet.catalog.architectures import Part
    from sdfleet.engine.random_weights import write_checkpoint

    architecture = architectures.load(case.name)
    if not has_text_encoders:
        architecture = architecture.with_light_text_encoders()
    parts = {}
    for name, part in architecture.parts.items():
        changed = dict(THIN.get(part.class_name, {})) if is_thin else {}
        if "down_block_types" in part.config and "block_out_channels" in changed:
            changed["block_out_channels"] = changed["block_out_channels"][: len(part.config["down_block_types"])]
        if n_layers is not None and name == "transformer":
            changed |= {depth: n_layers for depth in DEPTHS if depth in part.config}
        parts[name] = Part(class_name=part.class_name, config={**part.config, **changed})
    architecture = replace(architecture, parts=parts)
    with TemporaryDirectory(prefix="sdfleet-planner-") as home:
        write_checkpoint(architecture, Path(home) / "checkpoint")
        yield Path(home) / "checkpoint"


def drawing_of(case: Case, folder: Path, *, number: int) -> Drawing:
    from sdfleet.catalog.identify import identify
    from sdfleet.domain import Drawing, JobId

    found = identify(folder)
    return Drawing(
        job_id=JobId(f"{number}"), checkpoint=str(folder), family=found.family, prompt=f"a cat {number}",
        negative_prompt="", width_px=case.side_px, height_px=case.side_px, steps=STEPS,
        guidance=1.0 if case.n_rows == 1 else 5.0, seed=number, n_images=max(1, case.n_rows // 2),
        sampler=found.sampler,
    )  # fmt: skip


def predicted(case: Case, folder: Path, book: Path, budget_s: float) -> dict[str, float]:
    """What `sdfleet models plan` says of one picture; for several rows, of the batch that they make."""
    from sdfleet.engine.components import Components
    from sdfleet.engine.devices import choose_device
    from sdfleet.engine.families import FAMILIES
    from sdfleet.engine.prompt_cache import PromptCache
    from sdfleet.engine.speed import SpeedBook

    asked = drawing_of(case, folder, number=0)
    device = choose_device("cpu", case.dtype)
    family = FAMILIES[asked.family](Components(folder, device), device, PromptCache(0))
    begun_s = time.perf_counter()
    side_px = case.side_px
    works = {
        "encode": family.footprint.encode(asked),
        "step": family.footprint.denoise(width_px=side_px, height_px=side_px, n_rows=case.n_rows),
        "decode": family.footprint.decode(width_px=side_px, height_px=side_px),
    }
    looked_s = time.perf_counter() - begun_s
    calls = [item for work in works.values() for item in work.calls.items()]
    speed = SpeedBook(device, book)
    speed.learn(calls, budget_s=budget_s)
    speed.save()
    seconds = {"was_busy": float(speed.was_busy)}
    for name, work in works.items():
        estimate = speed.estimate(work.calls, n_views=work.n_views)
        seconds[f"{name}_s"] = 0.0 if estimate is None else estimate.seconds
    seconds["decode_s"] *= asked.n_images
    left = family.left_by_prompts_bytes(asked)
    step = family.peak_bytes(width_px=side_px, height_px=side_px, n_rows=case.n_rows)
    decode = family.decode_bytes(width_px=side_px, height_px=side_px, n_rows=case.n_rows)
    decode += (works["decode"].peak_bytes + works["decode"].heap_bytes) * (asked.n_images - 1)
    peak = family.components.weights().total + left + max(step, decode)
    return seconds | {"peak": peak, "looked_s": looked_s, "took_s": time.perf_counter() - begun_s}


def measured(case: Case, folder: Path, *, n_steps: int) -> dict[str, float]:
    from sdfleet.engine.engine import Engine
    from sdfleet.engine.events import EngineOptions

    options = EngineOptions(device="cpu", dtype=case.dtype, executor="torch", compile="off", max_rows=case.n_rows)
    engine = Engine(options)
    base = _with_libraries(case, folder)
    # Loaded before anything is counted: to draw random weights takes 0.1 GB that to read a file does not.
    _drawn(engine, replace(drawing_of(case, folder, number=0), n_images=0))
    seen: dict[str, float] = {}
    peak = 0
    for number in range(1 if n_steps == 1 else 2):
        timings, one_peak = _drawn(engine, replace(drawing_of(case, folder, number=number), steps=n_steps))
        seen = {"encode_s": timings["encode"], "step_s": timings["denoise"] / n_steps, "decode_s": timings["decode"]}
        peak = max(peak, one_peak)
    return seen | {"peak": peak - base}


def _drawn(engine: Engine, asked: Drawing) -> tuple[dict[str, float], int]:
    """The seconds of a drawing's phases, and the most bytes of this process meanwhile that are no file's."""
    from sdfleet.engine.events import JobDone, JobFailed

    engine.submit(asked)
    peak = 0
    while True:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        events = engine.step()
        peak = max(peak, _status_bytes("VmHWM") - _status_bytes("RssFile"))
        for event in events:
            if isinstance(event, JobFailed):
                raise event.error
            if isinstance(event, JobDone):
                return dict(event.timings_s), peak


def _with_libraries(case: Case, folder: Path) -> int:
    """Bytes of this process that are no file's, once the libraries that draw this checkpoint are there.

    They are the process's and not the checkpoint's: transformers and diffusers take 0.25 GB where a model needs them,
    and MKL keeps 6 MB a thread from its first products on.
    """
    import torch

    from sdfleet.engine.components import Components
    from sdfleet.engine.devices import choose_device
    from sdfleet.engine.families import FAMILIES
    from sdfleet.engine.prompt_cache import PromptCache

    asked, device = drawing_of(case, folder, number=0), choose_device("cpu", case.dtype)
    footprint = FAMILIES[asked.family](Components(folder, device), device, PromptCache(0)).footprint
    # Followed without numbers, so that everything is imported and no tensor is held.
    footprint.encode(asked)
    footprint.denoise(width_px=64, height_px=64, n_rows=1)
    footprint.decode(width_px=64, height_px=64)
    del footprint
    for n in (64, 256, 1024):
        torch.mm(torch.ones(n, 768), torch.ones(768, n))
    device.give_back()
    return _status_bytes("RssAnon")


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", type=Case.read)
    parser.add_argument("--side", type=int, help="another side for every case, in px")
    parser.add_argument(
        "--layers", type=int, help="transformers cut to this depth, for machines that hold no whole one"
    )
    parser.add_argument("--thin", action="store_true", help="networks of a few channels")
    parser.add_argument("--text-encoders", action="store_true", help="whole ones")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds to time operations in")
    parser.add_argument("--rounds", type=int, default=1, help="how often each case; the middle one by step is shown")
    parser.add_argument("--once", action="store_true", help="one picture of one step: enough for memory, not for time")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", choices=["predicted", "measured"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--book", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    cases = said.case or [Case("sd15", 512, 2, "bfloat16"), Case("sd3-medium", 512, 2, "bfloat16")]
    if said.part:
        part = cases[0]
        if said.part == "measured":
            found = measured(part, said.folder, n_steps=1 if said.once else STEPS)
        else:
            found = predicted(part, said.folder, said.book, said.budget)
        print(json.dumps(found))
        return
    rows = []
    with TemporaryDirectory(prefix="sdfleet-book-") as home:
        for given in cases:
            case = replace(given, side_px=said.side or given.side_px)
            with checkpoint(
                case, is_thin=said.thin, has_text_encoders=said.text_encoders, n_layers=said.layers
            ) as folder:
                text = f"{case.name}:{case.side_px}:{case.n_rows}:{case.dtype}"
                rounds = [_round(said, text, folder, said.book or Path(home) / f"{n}") for n in range(said.rounds)]
                rounds.sort(key=lambda parts: parts["predicted"]["step_s"] / parts["measured"]["step_s"])
                rows.append({"case": text, **rounds[len(rounds) // 2]})
                if not said.json:
                    _print(rows[-1], is_first=len(rows) == 1)
    if said.json:
        print(json.dumps(rows))


def _round(said: argparse.Namespace, text: str, folder: Path, book: Path) -> dict[str, Any]:
    """Both parts, each in a process of its own. A new book every time: a machine is not as fast as it was just now."""
    parts = {}
    for part in ("predicted", "measured"):
        command = [sys.executable, __file__, "--case", text, "--part", part, "--folder", str(folder)]
        command += ["--book", str(book), "--budget", str(said.budget), *(["--once"] if said.once else [])]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        parts[part] = json.loads(answer.stdout.splitlines()[-1])
    return parts


def _print(row: dict[str, Any], *, is_first: bool) -> None:
    if is_first:
        print("predicted / measured (error)\n")
        print("| case | peak MB | step s | decode s | picture of 20 steps s | found in s |")
        print("|---|---|---|---|---|---|")
    told, seen = row["predicted"], row["measured"]
    for one in (told, seen):
        one["picture_s"] = one["encode_s"] + 20 * one["step_s"] + one["decode_s"]
    cells = [_cell(told["peak"] / 1e6, seen["peak"] / 1e6, digits=0)]
    cells += [_cell(told[name], seen[name], digits=3) for name in ("step_s", "decode_s", "picture_s")]
    print(f"| {row['case']} | {' | '.join(cells)} | {told['looked_s']:.1f} + {told['took_s'] - told['looked_s']:.1f} |")
    if told["was_busy"]:
        print("other programs had the processors while operations were timed: these times say little")


def _cell(told: float, seen: float, *, digits: int) -> str:
    return f"{told:.{digits}f} / {seen:.{digits}f} ({told / seen - 1:+.0%})"


if __name__ == "__main__":
    main()
