"""What the faster modes do to the built-in model's pictures: scores, distance from the full ones, a sheet to look at.

    python benchmarks/modes.py --prompts 20 --seeds 4        # the step caches, and plainly fewer steps beside them
    python benchmarks/modes.py --sampler euler_a
    python benchmarks/modes.py --modes full,openvino,int8    # needs OpenVINO
    python benchmarks/modes.py --modes full,w-fp8,w-int8,w-nf4   # weights kept in few bits; nf4 needs bitsandbytes
    python benchmarks/modes.py --prompts 0 --sheet docs/images/modes-sheet.png
    python benchmarks/modes.py --prompts 0 --rounds 5 --modes full,light,strong

Prompts and checks are those of starter_eval.py. Distances are between pictures of the same prompt and seed: PSNR in dB
(mean, and the worst picture) and the mean difference in levels of 255. Seconds are asked for with --rounds: one picture
and eight at once, the modes in turns, the best of each; ratios of one run are what counts.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent))

from starter_eval import GUIDANCE, SHEET_PROMPTS, STEPS, held_out_specs

from sdfleet import starter
from sdfleet.domain import Drawing, JobId, StepCache
from sdfleet.engine import executors
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, JobFailed, PictureDone
from sdfleet.train.scoring import score

Pixels = NDArray[np.uint8]
SHEET_EVERY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A way to draw. steps: None draws those of the command line."""

    options: EngineOptions
    step_cache: StepCache = "off"
    steps: int | None = None


def modes(options: EngineOptions, cache: Path) -> dict[str, Mode]:
    """Every mode by name."""
    return {
        "full": Mode(options=options),
        "light": Mode(options=options, step_cache="light"),
        "14 steps": Mode(options=options, steps=14),
        "strong": Mode(options=options, step_cache="strong"),
        "12 steps": Mode(options=options, steps=12),
        "openvino": Mode(options=replace(options, executor="openvino", cache_folder=str(cache))),
        "int8": Mode(options=replace(options, executor="int8", cache_folder=str(cache))),
        "w-fp8": Mode(options=replace(options, weights="fp8")),
        "w-int8": Mode(options=replace(options, weights="int8")),
        "w-nf4": Mode(options=replace(options, weights="nf4")),
        "int8 light": Mode(options=replace(options, executor="int8", cache_folder=str(cache)), step_cache="light"),
    }


class Painter:
    """Draws lists of prompts in one mode."""

    def __init__(self, mode: Mode, *, sampler: str, steps: int) -> None:
        self._mode = mode
        self._sampler = sampler
        self._steps = mode.steps or steps
        self._engine = Engine(mode.options)
        self._draw(["a red circle"], [0])
        self._draw(["a red circle"] * 16, [0] * 16)
        if mode.options.executor == "int8":
            # Its effect is measured where the gate refuses it, too.
            executors._MUST_WIN_BY, executors._INT8_MOST_APART = 0.0, 1.0  # noqa: SLF001
            while "'executor': 'int8'" not in str(self._engine.facts()["executors"]):
                self._draw(["a blue star", "a red heart"], [1, 2])
        facts = self._engine.facts()
        held_mb = int(str(facts["resident_bytes"])) / 1e6
        print(f"warm: {facts['executors'] or 'torch'}, {held_mb:.1f} MB of weights", file=sys.stderr)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Pixels]:
        return self._draw(prompts, seeds)

    def seconds(self, n_pictures: int) -> float:
        begun_s = time.perf_counter()
        self._draw(SHEET_PROMPTS[:n_pictures], range(n_pictures))
        return time.perf_counter() - begun_s

    def close(self) -> None:
        self._engine.close()

    def _draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Pixels]:
        for n, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            self._engine.submit(
                Drawing(
                    job_id=JobId(str(n)), checkpoint=str(starter.weights_path()), family="sd", prompt=prompt,
                    negative_prompt="", width_px=128, height_px=128, steps=self._steps, guidance=GUIDANCE, seed=seed,
                    n_images=1, sampler=self._sampler, step_cache=self._mode.step_cache,
                )
            )  # fmt: skip
        drawn: dict[int, Pixels] = {}
        while not self._engine.is_idle:
            for event in self._engine.step():
                if isinstance(event, JobFailed):
                    raise event.error
                if isinstance(event, PictureDone):
                    picture = event.finished.picture
                    pixels = np.frombuffer(picture.data, np.uint8).reshape(picture.height_px, picture.width_px, 3)
                    drawn[int(event.job_id)] = pixels
        return [drawn[n] for n in range(len(prompts))]


def scored(draw: Callable[[Sequence[str], Sequence[int]], list[Pixels]], n_prompts: int, n_seeds: int) -> Drawn:
    """All pictures of a mode and what is right in them."""
    hits: dict[str, list[bool]] = {}
    pictures: list[Pixels] = []
    for kind, cases in held_out_specs(n_prompts).items():
        rows = [(spec, prompt, seed) for spec, prompt in cases for seed in range(n_seeds)]
        for start in range(0, len(rows), 16):
            part = rows[start : start + 16]
            drawn = draw([prompt for _, prompt, _ in part], [seed for _, _, seed in part])
            pictures += drawn
            for (spec, _, _), picture in zip(part, drawn, strict=True):
                for check, is_right in score(picture, spec).items():
                    hits.setdefault(f"{kind} {check}", []).append(is_right)
    return Drawn({check: float(np.mean(found)) for check, found in hits.items()}, pictures)


@dataclass(frozen=True, slots=True)
class Drawn:
    """scores: share of right pictures by check."""

    scores: dict[str, float]
    pictures: list[Pixels]


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal to noise of two pictures, dB; 99 for equal ones."""
    error = float(((a.astype(float) - b.astype(float)) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else 99.0


def levels(a: Pixels, b: Pixels) -> float:
    """Mean difference, levels of 255."""
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def race(painters: dict[str, Painter], n_rounds: int) -> None:
    """Seconds of one and of eight pictures, in turns."""
    print("| mode | one picture, s | full / this | eight at once, s | full / this |\n|---|---|---|---|---|")
    best = {(name, n): math.inf for name in painters for n in (1, 8)}
    for n_round in range(n_rounds + 1):
        for name, n in tuple(best):
            spent_s = painters[name].seconds(n)
            if n_round:  # in the first the batcher still learns
                best[name, n] = min(best[name, n], spent_s)
    for name in painters:
        cells = [f"{best[name, n]:.2f} | {best['full', n] / best[name, n]:.2f}" for n in (1, 8)]
        print(f"| {name} | {' | '.join(cells)} |")
    print()


def report(drawn: dict[str, Drawn]) -> None:
    """Two markdown tables: distances and scores."""
    full = drawn["full"]
    print("| mode | PSNR mean, dB | worst | levels, mean | worst |\n|---|---|---|---|---|")
    for name, made in drawn.items():
        ps = [psnr(a, b) for a, b in zip(made.pictures, full.pictures, strict=True)]
        ls = [levels(a, b) for a, b in zip(made.pictures, full.pictures, strict=True)]
        print(f"| {name} | {np.mean(ps):.1f} | {min(ps):.1f} | {np.mean(ls):.2f} | {max(ls):.2f} |")
    print(f"\n| check | {' | '.join(drawn)} |\n|---|{'---|' * len(drawn)}")
    for check in full.scores:
        print(f"| {check} | {' | '.join(f'{100 * made.scores[check]:.1f}' for made in drawn.values())} |")


def write_sheet(drawn: dict[str, list[Pixels]], prompts: Sequence[str], path: Path) -> None:
    """One row for each mode, one column for each prompt."""
    margin, cell = 90, 132
    sheet = Image.new("RGB", (margin + len(prompts) * cell, len(drawn) * cell + 4), (250, 250, 250))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for row, (name, pictures) in enumerate(drawn.items()):
        pen.text((6, row * cell + 60), name, fill=(60, 60, 60), font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (margin + column * cell, row * cell + 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--modes", default="full,light,14 steps,strong,12 steps")
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--prompts", type=int, default=20, help="of each kind; 0: only the sheet")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=0, help="time the modes so often")
    parser.add_argument("--dtype", default="bfloat16", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--sheet", type=Path)
    given = parser.parse_args()
    options = EngineOptions(device="cpu", dtype=given.dtype, executor="torch", n_threads=given.threads)
    drawn: dict[str, Drawn] = {}
    painters: dict[str, Painter] = {}
    on_sheet: dict[str, list[Pixels]] = {}
    prompts = SHEET_PROMPTS[::SHEET_EVERY]
    print(f"{given.sampler}, {given.steps} steps, {3 * given.prompts * given.seeds} pictures a mode, {given.dtype}\n")
    with tempfile.TemporaryDirectory() as cache:
        known = modes(options, Path(cache))
        for name in given.modes.split(","):
            painter = Painter(known[name], sampler=given.sampler, steps=given.steps)
            if given.prompts:
                drawn[name] = scored(painter, given.prompts, given.seeds)
            if given.sheet:
                on_sheet[name] = painter(prompts, [7] * len(prompts))
            painters[name] = painter
        if given.rounds:
            race(painters, given.rounds)
        for painter in painters.values():
            painter.close()
    if drawn:
        report(drawn)
    if given.sheet:
        write_sheet(on_sheet, prompts, given.sheet)


if __name__ == "__main__":
    main()
