"""What a checkpoint takes whole, by phase and block by block: memory of the process, seconds of a step, the picture.

    python benchmarks/by_layer.py /tmp/somewhere                      # SD 1.5's networks, written once: 2.2 GB
    python benchmarks/by_layer.py /tmp/somewhere --architecture sd3-medium --side-px 512

Weights are random numbers in real files, in bfloat16. Every arrangement is drawn in a process of its own; memory is the
most that the process held (VmHWM) above what it held before the first weight was read. Pages of a mapped file count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from sdfleet.catalog import architectures
from sdfleet.domain import Drawing, JobId
from sdfleet.engine import random_weights
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, JobDone, JobFailed, PictureDone

ARRANGEMENTS = ("all", "by_phase", "by_layer")


def write(name: str, folder: Path) -> None:
    """The architecture with its random weights spelled out."""
    random_weights.write_checkpoint(architectures.load(name), folder)
    for file in sorted(folder.glob("*/*.safetensors")):
        drawn = random_weights.draw([file], dtype=torch.bfloat16, device=torch.device("cpu"))
        save_file({key: tensor.contiguous() for key, tensor in drawn.items()}, file, {"format": "pt"})


def held_bytes(what: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def measure(folder: Path, family: str, *, arrangement: str, side_px: int, steps: int) -> dict[str, object]:
    engine = Engine(EngineOptions(device="cpu", dtype="bfloat16", executor="torch"))
    drawing = Drawing(
        job_id=JobId("0"), checkpoint=str(folder), family=family, prompt="a castle", negative_prompt="",
        width_px=side_px, height_px=side_px, steps=steps, guidance=5.0, seed=1, n_images=1, sampler="euler",
    )  # fmt: skip
    residency = engine._residency  # noqa: SLF001 - the arrangement is chosen by hand here, whatever would fit
    loaded = residency._open(drawing)  # noqa: SLF001
    residency._rearrange(loaded, arrangement)  # type: ignore[arg-type]  # noqa: SLF001
    residency._loaded[str(folder)] = loaded  # noqa: SLF001
    before = held_bytes("VmRSS")
    begun_s = time.perf_counter()
    engine.submit(drawing)
    told: dict[str, object] = {}
    while not engine.is_resting:
        for event in engine.step():
            if isinstance(event, JobFailed):
                raise event.error
            if isinstance(event, PictureDone):
                told["picture"] = hashlib.sha256(event.finished.picture.data).hexdigest()[:12]
            if isinstance(event, JobDone):
                told["denoise_s"] = round(event.timings_s["denoise"], 2)
    told |= {"peak_mb": round((held_bytes("VmHWM") - before) / 1e6), "all_s": round(time.perf_counter() - begun_s, 2)}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architecture", default="sd15")
    parser.add_argument("--side-px", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--arrangement", choices=ARRANGEMENTS, help="one, in this very process")
    given = parser.parse_args()
    folder: Path = given.folder / given.architecture
    if not (folder / "model_index.json").is_file():
        write(given.architecture, folder)
    if given.arrangement:
        family = architectures.load(given.architecture).family
        print(json.dumps(measure(
            folder, family, arrangement=given.arrangement, side_px=given.side_px, steps=given.steps
        )))  # fmt: skip
        return
    n_bytes = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    print(f"{given.architecture}, {n_bytes / 1e6:.0f} MB of weights, {given.side_px} px, {given.steps} steps\n")
    print("| arrangement | peak above the start, MB | denoising, s | all, s | picture |\n|---|---|---|---|---|")
    for arrangement in ARRANGEMENTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--arrangement", arrangement]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - our own script
        told = json.loads(answer.stdout.splitlines()[-1])
        print(
            f"| {arrangement} | {told['peak_mb']} | {told['denoise_s']} | {told['all_s']} | {told['picture']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
