"""From nothing to the first picture of the built-in model: the command, against a plain diffusers script.

    python benchmarks/cold_start.py                      # 4 and 20 steps, 5 rounds each, about 100 s on two cores
    python benchmarks/cold_start.py --steps 4 --rounds 9

Each side is a fresh process in turn, after one warm-up each for the system's file cache; same weights, prompt, seed,
steps, sampler and guidance. Seconds count from the start of the process: to the picture on the disk, and to its end.
Baseline: StableDiffusionPipeline as its documentation shows it, in float32. Ours: `sdfleet generate` as shipped, with
the format that its probe chooses. Medians are printed, what the pictures differ by, and where our time goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sdfleet import starter

PROMPT, SEED, GUIDANCE, SIDE_PX = "a red circle on a blue background", 5, 3.0, 128
PLAIN = """
import sys
import torch
from diffusers import StableDiffusionPipeline
weights, prompt, seed, steps, guidance, side_px, path = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(weights)
pipe.set_progress_bar_config(disable=True)
image = pipe(
    prompt, num_inference_steps=int(steps), guidance_scale=float(guidance), width=int(side_px), height=int(side_px),
    generator=torch.Generator().manual_seed(int(seed)),
).images[0]
image.save(path)
"""
# What a first picture of ours imports, one more each time: the last is the engine's process, ready to draw.
IMPORTS = {"python": "pass", "torch": "import torch", "engine": "import sdfleet.engine.child, sdfleet.engine.engine"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One cold start. written_s: to the picture on the disk; ended_s: to the end of the process; said: its stdout."""

    written_s: float
    ended_s: float
    said: str


def start(command: Sequence[str], picture: Path) -> Start:
    """Run a command that writes a picture."""
    picture.unlink(missing_ok=True)
    begun_s, begun_at = time.perf_counter(), time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own commands
    ended_s = time.perf_counter() - begun_s
    return Start(written_s=picture.stat().st_mtime - begun_at, ended_s=ended_s, said=done.stdout)


def commands(folder: Path, *, steps: int) -> tuple[list[str], Path, list[str], Path]:
    """The baseline's command and picture, then ours."""
    theirs, ours = folder / "theirs.png", folder / "ours.png"
    told = [PROMPT, SEED, steps, GUIDANCE, SIDE_PX]
    plain = [sys.executable, "-c", PLAIN, str(starter.weights_path()), *map(str, told), str(theirs)]
    mine = [
        sys.executable, "-m", "sdfleet", "generate", PROMPT, "--seed", str(SEED), "--steps", str(steps),
        "--guidance", str(GUIDANCE), "--size", f"{SIDE_PX}x{SIDE_PX}", "--sampler", "ddim", "--json", "-o", str(ours),
    ]  # fmt: skip
    return plain, theirs, mine, ours


def compare(folder: Path, *, steps: int, n_rounds: int) -> dict[str, object]:
    """Medians of both sides, ratios, the engine's own account, and how far the pictures are apart."""
    plain, theirs, mine, ours = commands(folder, steps=steps)
    start(plain, theirs), start(mine, ours)
    rounds = [(start(plain, theirs), start(mine, ours)) for _ in range(n_rounds)]
    written = [(a.written_s, b.written_s) for a, b in rounds]
    timings = [json.loads(b.said)["timings_s"] for _, b in rounds]
    apart = np.abs(np.asarray(Image.open(theirs), int) - np.asarray(Image.open(ours).convert("RGB"), int))
    return {
        "steps": steps,
        "rounds": n_rounds,
        "plain_written_s": round(statistics.median(a for a, _ in written), 3),
        "ours_written_s": round(statistics.median(b for _, b in written), 3),
        "ratio": round(statistics.median(a / b for a, b in written), 2),
        "ratio_min": round(min(a / b for a, b in written), 2),
        "ratio_max": round(max(a / b for a, b in written), 2),
        "plain_ended_s": round(statistics.median(a.ended_s for a, _ in rounds), 3),
        "ours_ended_s": round(statistics.median(b.ended_s for _, b in rounds), 3),
        "ours_engine_s": {name: round(statistics.median(t[name] for t in timings), 3) for name in timings[0]},
        "dtype": json.loads(rounds[-1][1].said)["dtype"],
        "mean_levels_apart": round(float(apart.mean()), 3),
        "max_levels_apart": int(apart.max()),
    }


def import_s(code: str, *, n_rounds: int) -> float:
    """Median seconds of a process that only imports and leaves without tidying up, as the engine's does."""
    spent = []
    for _ in range(n_rounds):
        begun_s = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"{code}\nimport os\nos._exit(0)"], check=True)  # noqa: S603 - our own commands
        spent.append(time.perf_counter() - begun_s)
    return round(statistics.median(spent), 3)


def main() -> None:
    """Print the table and, last, one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", default="4,20", help="with commas between")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            compare(Path(folder), steps=int(steps), n_rounds=arguments.rounds) for steps in arguments.steps.split(",")
        ]
    stages = {name: import_s(code, n_rounds=arguments.rounds) for name, code in IMPORTS.items()}
    print(f"{'steps':>5} {'diffusers, s':>13} {'ours, s':>8} {'ratio':>6}  (min-max), to the picture on the disk")
    for row in results:
        print(
            f"{row['steps']:>5} {row['plain_written_s']:>13} {row['ours_written_s']:>8} {row['ratio']:>5}x  "
            f"({row['ratio_min']}-{row['ratio_max']}); to the end of the process {row['plain_ended_s']} s against "
            f"{row['ours_ended_s']} s; pictures apart by {row['mean_levels_apart']} levels on average"
        )
        print(f"      engine ({row['dtype']}): {row['ours_engine_s']}")
    print("imports alone, s: " + ", ".join(f"{name} {spent_s}" for name, spent_s in stages.items()))
    print(json.dumps({"starts": results, "imports_s": stages}))


if __name__ == "__main__":
    main()
