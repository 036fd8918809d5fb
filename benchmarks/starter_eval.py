"""Measures the built-in model on prompts its training never saw.

    python benchmarks/starter_eval.py --weights src/sdfleet/starter/weights --seeds 8 --sheet sheet.png

Prints a markdown table and writes JSON. Every prompt is a held-out combination (sdfleet.train.world.is_held_out);
half are worded plainly, half at random. Pictures are made by diffusers' own pipeline and measured by
sdfleet.train.scoring, whose own ceiling on pictures drawn by the renderer is printed beside the results.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sdfleet.train.captions import caption, plain_caption
from sdfleet.train.pictures import render
from sdfleet.train.scoring import score
from sdfleet.train.world import Group, Pair, Scene, Single, Spec, draw_spec, is_held_out

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

GUIDANCE = 3.0
STEPS = 20
# What a release must reach, in percent; the same numbers are in PROVENANCE.md.
FLOORS = {
    ("single", "background"): 97,
    ("single", "colour"): 95,
    ("single", "shape"): 85,
    ("group", "count"): 85,
    ("pair", "relation"): 80,
    ("pair", "both_shapes"): 60,
}
SHEET_COLUMNS = 6
SHEET_PROMPTS = (
    "a red circle on a blue background", "a small yellow star on a purple background", "a big pink heart",
    "a green triangle on an orange background", "a white ring on black", "a purple diamond on a yellow background",
    "a blue square above an orange circle", "a red star to the left of a green heart",
    "a yellow circle inside a blue square", "a black cross below a pink triangle on a white background",
    "a white heart inside a red circle on a gray background", "a brown square and a green ring on yellow",
    "two blue hearts on a pink background", "three orange stars on a blue background",
    "four red diamonds on a white background", "a snowman with a red scarf",
    "a black star on a gradient from yellow to red", "a white circle on a striped red and blue background",
    "a red house with a blue roof", "a yellow house with a brown roof at night", "a tree at sunset",
    "the sun over a meadow", "the moon and stars", "snowy mountains at sunset",
    "a green boat on the sea at sunset", "a pink flower", "an orange cat face", "a yellow smiling face",
    "a blue car at night", "a purple fish in the water",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="measure the built-in model on held-out prompts")
    parser.add_argument("--weights", type=Path, default=Path("src/sdfleet/starter/weights"))
    parser.add_argument("--seeds", type=int, default=8, help="pictures per prompt")
    parser.add_argument("--prompts", type=int, default=40, help="prompts per kind")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--sampler", default="DDIMScheduler", help="name of a diffusers class")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 arithmetic")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet here")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    chosen = parser.parse_args(argv)
    pipeline = load(chosen.weights, sampler=chosen.sampler)

    def draw(prompts: list[str], seeds: list[int]) -> NDArray[np.uint8]:
        return generate(
            pipeline, prompts, seeds, steps=chosen.steps, guidance=chosen.guidance, uses_bfloat16=chosen.bf16
        )

    if chosen.sheet:
        write_sheet(draw(list(SHEET_PROMPTS), [7] * len(SHEET_PROMPTS)), chosen.sheet)
    if chosen.prompts:
        started_at = time.perf_counter()
        results, ceiling = measure(draw, n_prompts=chosen.prompts, n_seeds=chosen.seeds)
        spent_s = time.perf_counter() - started_at
        print(table(results, ceiling))
        n_pictures = 3 * chosen.prompts * chosen.seeds
        print(f"\n{n_pictures} pictures, {chosen.steps} steps, guidance {chosen.guidance}, {spent_s:.0f} s")
        if chosen.json:
            rows = {f"{kind} {check}": {"share": s, "n": n} for (kind, check), (s, n) in results.items()}
            chosen.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def load(weights: Path, *, sampler: str) -> StableDiffusionPipeline:
    """The pipeline of a folder with a sampler of choice."""
    import diffusers

    pipeline: StableDiffusionPipeline = diffusers.StableDiffusionPipeline.from_pretrained(weights)
    pipeline.scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def held_out_specs(n: int, seed: int = 2026) -> dict[str, list[tuple[Single | Pair | Group, str]]]:
    """n held-out specs of each kind with their prompts, every second one worded at random."""
    rng = random.Random(seed)
    found: dict[str, list[tuple[Single | Pair | Group, str]]] = {"single": [], "group": [], "pair": []}
    for spec in _held_out(rng):
        if all(len(cases) >= n for cases in found.values()):
            break
        if isinstance(spec, Scene):
            continue
        cases = found[type(spec).__name__.lower()]
        if len(cases) < n:
            prompt = plain_caption(spec) if len(cases) % 2 == 0 else _full_caption(spec, rng)
            cases.append((spec, prompt))
    return found


def measure(
    draw: Callable[[list[str], list[int]], NDArray[np.uint8]], *, n_prompts: int, n_seeds: int
) -> tuple[dict[tuple[str, str], tuple[float, int]], dict[tuple[str, str], float]]:
    """Share and number of measured pictures for each (kind, check), and the checker's share on rendered pictures."""
    hits: dict[tuple[str, str], list[bool]] = defaultdict(list)
    ideal: dict[tuple[str, str], list[bool]] = defaultdict(list)
    rng = random.Random(11)
    for kind, cases in held_out_specs(n_prompts).items():
        rows = [(spec, prompt, seed) for spec, prompt in cases for seed in range(n_seeds)]
        for start in range(0, len(rows), 16):
            part = rows[start : start + 16]
            pictures = draw([prompt for _, prompt, _ in part], [seed for _, _, seed in part])
            for (spec, _, _), picture in zip(part, pictures, strict=True):
                checks = score(picture, spec)
                for check, is_right in checks.items():
                    hits[kind, check].append(is_right)
                hits[kind, "all"].append(all(checks.values()))
        for spec, _ in cases:
            for check, is_right in score(render(spec, rng)[0], spec).items():
                ideal[kind, check].append(is_right)
    return (
        {key: (float(np.mean(found)), len(found)) for key, found in hits.items()},
        {key: float(np.mean(found)) for key, found in ideal.items()},
    )


def table(results: dict[tuple[str, str], tuple[float, int]], ceiling: dict[tuple[str, str], float]) -> str:
    """The results as a markdown table."""
    lines = ["| prompts | check | right | floor | checker on drawn pictures | n |", "|---|---|---|---|---|---|"]
    for (kind, check), (share, n) in results.items():
        floor = FLOORS.get((kind, check))
        best = f"{100 * ceiling[kind, check]:.0f} %" if (kind, check) in ceiling else ""
        aim = f"{floor} %" if floor else ""
        lines.append(f"| {kind} | {check.replace('_', ' ')} | {100 * share:.1f} % | {aim} | {best} | {n} |")
    return "\n".join(lines)


@torch.no_grad()
def generate(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    uses_bfloat16: bool = False,
) -> NDArray[np.uint8]:
    """Pictures [n, 128, 128, 3] uint8, each from its own seed."""
    made: list[NDArray[np.uint8]] = []
    for start in range(0, len(prompts), 16):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + 16]]
        with torch.autocast("cpu", torch.bfloat16, enabled=uses_bfloat16):
            out = pipeline(
                prompts[start : start + 16],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="np",
            )
        made.append((np.asarray(out.images) * 255).round().astype(np.uint8))
    return np.concatenate(made)


def write_sheet(pictures: NDArray[np.uint8], path: Path) -> None:
    """A contact sheet of pictures with their prompts below."""
    width, height = 156, 174
    n_rows = -(-len(pictures) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * width, n_rows * height), (250, 250, 250))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    for k, (picture, prompt) in enumerate(zip(pictures, SHEET_PROMPTS, strict=True)):
        left, top = k % SHEET_COLUMNS * width + 14, k // SHEET_COLUMNS * height + 8
        sheet.paste(Image.fromarray(picture), (left, top))
        for n, line in enumerate(_wrapped(prompt, 28)):
            pen.text((left, top + 132 + 12 * n), line, fill=(60, 60, 60), font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _held_out(rng: random.Random) -> Iterator[Spec]:
    while True:
        spec = draw_spec(rng)
        if is_held_out(spec):
            yield spec


def _full_caption(spec: Single | Pair | Group, rng: random.Random) -> str:
    """A random wording that leaves no colour open, or the checks would ask for what the prompt did not."""
    while True:
        text = caption(spec, rng)
        words = set(text.replace(",", " ").replace(".", " ").split())
        thing = spec.first if isinstance(spec, Pair) else spec.thing
        synonyms = {"red": {"crimson", "scarlet"}, "yellow": {"golden"}, "purple": {"violet"}, "gray": {"grey"}}
        if words & ({thing.colour} | synonyms.get(thing.colour, set())):
            return text


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
