"""One guided step of Stable Diffusion 1.5 at 256 px: stable-diffusion.cpp's program against ours, in one run.

    python benchmarks/sd_cpp_step.py --sd-binary PATH/sd-cli --weights CHECKPOINT

CHECKPOINT: what its `-m` takes, a single file or a diffusers folder, f16. Its seconds are those of its own log
("sampling completed"), over the steps. Ours is the same architecture with random numbers, see sd15_step.py.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from sd15_step import UNET, WARM_UP_PX, best_of, call, ours_of, random_network

from sdfleet.engine.devices import choose_device

SAMPLING = re.compile(r"sampling completed, taking ([0-9.]+)s")


def theirs_s(binary: Path, weights: Path, *, side_px: int, n_steps: int, more: list[str]) -> float:
    """Seconds of one of their steps."""
    size = ["-W", str(side_px), "-H", str(side_px), "--steps", str(n_steps), "-t", str(torch.get_num_threads())]
    with tempfile.TemporaryDirectory() as folder:
        command = [binary, "-m", weights, "-p", "a cat", "--cfg-scale", "7", *size, *more, "-o", f"{folder}/a.png"]
        said = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - as asked
    found = SAMPLING.search(said.stdout + said.stderr)
    if found is None:
        raise SystemExit(f"it did not finish a picture; its last words: {(said.stdout + said.stderr)[-500:]}")
    return float(found[1]) / n_steps


def ours_s(side_px: int, *, n_rounds: int) -> float:
    """Seconds of one of our steps."""
    with torch.inference_mode():
        dtype = choose_device("cpu", "auto").dtype
        network = ours_of(random_network(UNet2DConditionModel, UNET), "UNet2DConditionModel", dtype)
        call(network, WARM_UP_PX, dtype)()
        best, _ = best_of({"ours": call(network, side_px, dtype)}, n_rounds)
    return best["ours"]


def main() -> None:
    """Print both and the ratio, and last one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sd-binary", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("more", nargs="*", default=["--diffusion-fa"], help="options of theirs, behind --")
    given = parser.parse_args()
    ours = ours_s(given.size, n_rounds=given.rounds)
    print(f"ours {ours:.3f} s a step of {given.size} px", flush=True)
    theirs = theirs_s(given.sd_binary, given.weights, side_px=given.size, n_steps=given.steps, more=given.more)
    print(f"stable-diffusion.cpp {theirs:.3f} s, {theirs / ours:.2f} times ours")
    print(json.dumps({"ours_s": round(ours, 4), "theirs_s": round(theirs, 4), "ratio": round(theirs / ours, 2)}))


if __name__ == "__main__":
    main()
