"""Our engine against a plain diffusers loop: same weights, same requests, one run, so that only ratios matter.

    python benchmarks/engine_vs_diffusers.py                      # the built-in model, 16 mixed requests
    python benchmarks/engine_vs_diffusers.py --model DIR --family sdxl --size 1024x1024

Baseline: diffusers' pipeline in float32, called once for each request, one after another. Ours: the engine as shipped
(format chosen by its probe, rows by its batcher), in this process, all requests submitted at once. Rounds alternate
between the two, after one warm-up each; medians are printed, and what the pictures differ by.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import torch

from sdfleet import starter
from sdfleet.domain import Drawing, JobId
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, JobFailed, PictureDone

PROMPTS = (
    "a red circle on a blue background",
    "two yellow stars",
    "a green house with a red roof",
    "a blue fish",
    "a purple heart above an orange square",
    "a snowman with a red scarf",
    "mountains at sunset",
    "a white ring on black",
)
CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm++_2m": diffusers.DPMSolverMultistepScheduler,
}


def mixed_requests(n: int, base: Drawing) -> list[Drawing]:
    """Different prompts, seeds, steps (10 to 30), guidance and samplers, as a server would see them."""
    samplers = ("ddim", "euler", "dpm++_2m")
    return [
        replace(
            base,
            job_id=JobId(f"job-{i}"),
            prompt=PROMPTS[i % len(PROMPTS)],
            seed=i,
            steps=10 + i * 7 % 21,
            guidance=(3.0, 4.0, 5.5)[i % 3],
            sampler=samplers[i % len(samplers)],
        )
        for i in range(n)
    ]


class Plain:
    """What a script without us does."""

    def __init__(self, folder: Path) -> None:
        self._pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        self._pipe.set_progress_bar_config(disable=True)
        self._config = self._pipe.scheduler.config

    def draw(self, drawings: list[Drawing]) -> list[np.ndarray]:
        """Pictures [h, w, 3] uint8, one request after another."""
        drawn = []
        for one in drawings:
            self._pipe.scheduler = CLASSES[one.sampler].from_config(self._config)
            image = self._pipe(
                one.prompt,
                width=one.width_px,
                height=one.height_px,
                num_inference_steps=one.steps,
                guidance_scale=one.guidance,
                generator=torch.Generator().manual_seed(one.seed),
            ).images[0]
            drawn.append(np.asarray(image))
        return drawn


class Ours:
    """The engine, in this process."""

    def __init__(self, options: EngineOptions) -> None:
        self._engine = Engine(options)

    def draw(self, drawings: list[Drawing]) -> list[np.ndarray]:
        """Pictures [h, w, 3] uint8, all requests at once."""
        drawn: dict[str, np.ndarray] = {}
        for one in drawings:
            self._engine.submit(one)
        while not self._engine.is_idle:
            for event in self._engine.step():
                if isinstance(event, JobFailed):
                    raise event.error
                if isinstance(event, PictureDone):
                    picture = event.finished.picture
                    pixels = np.frombuffer(picture.data, np.uint8)
                    drawn[event.job_id] = pixels.reshape(picture.height_px, picture.width_px, 3)
        return [drawn[one.job_id] for one in drawings]

    def facts(self) -> dict[str, object]:
        """Device and format."""
        return dict(self._engine.facts())


def timed(draw: Plain | Ours, drawings: list[Drawing]) -> tuple[float, list[np.ndarray]]:
    """Seconds, and the pictures."""
    begun_s = time.perf_counter()
    drawn = draw.draw(drawings)
    return time.perf_counter() - begun_s, drawn


def compare(plain: Plain, ours: Ours, drawings: list[Drawing], *, n_rounds: int) -> dict[str, float]:
    """Median seconds of each side, the ratio, and how far the pictures are apart."""
    plain.draw(drawings)
    ours.draw(drawings)
    plain_s, ours_s, ratios = [], [], []
    for _ in range(n_rounds):
        a_s, a = timed(plain, drawings)
        b_s, b = timed(ours, drawings)
        plain_s.append(a_s)
        ours_s.append(b_s)
        ratios.append(a_s / b_s)
    apart = [np.abs(x.astype(int) - y.astype(int)) for x, y in zip(a, b, strict=True)]
    return {
        "n_requests": len(drawings),
        "plain_images_per_s": round(len(drawings) / statistics.median(plain_s), 3),
        "ours_images_per_s": round(len(drawings) / statistics.median(ours_s), 3),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "mean_levels_apart": round(float(np.mean([d.mean() for d in apart])), 3),
        "max_levels_apart": int(max(d.max() for d in apart)),
    }


def main() -> None:
    """Print the table and, last, one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=starter.weights_path())
    parser.add_argument("--family", default="sd")
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--executor", default="torch", choices=("torch", "openvino"))
    arguments = parser.parse_args()
    width_px, height_px = (int(side) for side in arguments.size.split("x"))
    base = Drawing(
        job_id=JobId("alone"), checkpoint=str(arguments.model), family=arguments.family, prompt=PROMPTS[0],
        negative_prompt="", width_px=width_px, height_px=height_px, steps=20, guidance=4.0, seed=0, n_images=1,
        sampler="ddim",
    )  # fmt: skip
    plain, ours = Plain(arguments.model), Ours(EngineOptions(dtype=arguments.dtype, executor=arguments.executor))
    results = {
        "alone": compare(plain, ours, [base], n_rounds=arguments.rounds * 3),
        "mixed": compare(plain, ours, mixed_requests(arguments.requests, base), n_rounds=arguments.rounds),
    }
    print(f"{'':8} {'requests':>8} {'diffusers fp32, img/s':>22} {'ours, img/s':>12} {'ratio':>6}  (min-max)")
    for name, row in results.items():
        print(
            f"{name:8} {row['n_requests']:>8} {row['plain_images_per_s']:>22} {row['ours_images_per_s']:>12} "
            f"{row['ratio']:>5}x  ({row['ratio_min']}-{row['ratio_max']}); pictures apart by "
            f"{row['mean_levels_apart']} levels on average, {row['max_levels_apart']} at most"
        )
    print(json.dumps({"facts": ours.facts(), **results}))


if __name__ == "__main__":
    main()
