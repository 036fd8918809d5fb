"""The engine on a card against diffusers' own pipeline on the same card: published models, random weights.

    python benchmarks/gpu.py                                   # every case; one NVIDIA card with 40 GB or more
    python benchmarks/gpu.py --cases sd15 --requests 16
    python benchmarks/gpu.py --dry-run                         # toy sizes on the CPU: does the script still run?

SD1.5 512x512 with 20 steps, SDXL 1024 with 30, SD3.5-medium and FLUX.1-dev 1024 with 28, each alone and with mixed
requests (own prompts, seeds and steps). Text encoders are light on both sides: a prompt is read once, and T5 would only
take room. Three ways to draw the same requests, in one process, without HTTP:

    diffusers   the pipeline, called once for each request
    server C    the same inside an `async def`, see baselines.py
    server B    a semaphore of one, a thread, a pipeline and a sampler for each request
    ours        all requests given to the engine at once

"Of the limit" is counted operations over (the fastest matrix product measured on this card x time). PSNR compares a
picture drawn alone with the same one drawn in company.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import inspect
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from baselines import Request, ServerB, ServerC, draw_one
from engine_vs_diffusers import PROMPTS, Ours

from sdfleet.bench.random_model import random_folder
from sdfleet.catalog import architectures
from sdfleet.catalog.architectures import Architecture, Part
from sdfleet.domain import Drawing, JobId
from sdfleet.engine import random_weights
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.limits import count_work, measure_limit

# diffusers' class of the sampler that both sides draw with.
SCHEDULERS = {"dpm++_2m": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler"}


@dataclass(frozen=True)
class Case:
    name: str
    side_px: int
    steps: int
    guidance: float
    sampler: str


CASES = {
    case.name: case
    for case in (
        Case("sd15", 512, 20, 7.5, "dpm++_2m"),
        Case("sdxl", 1024, 30, 5.0, "euler"),
        Case("sd3.5-medium", 1024, 28, 7.0, "euler"),
        Case("flux-dev", 1024, 28, 3.5, "euler"),
    )
}
# What makes a toy of each: the same classes, thin.
TOYS: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "norm_num_groups": 8},
    "sdxl": {
        "block_out_channels": [32, 32, 32], "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8,
        "transformer_layers_per_block": 1,
    },
    "sd3.5-medium": {
        "num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "pos_embed_max_size": 32,
        "dual_attention_layers": [0],
    },
    "flux-dev": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
}  # fmt: skip
TOY_VAE = {"block_out_channels": [16, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 8}


def toy_of(architecture: Architecture) -> Architecture:
    changes = {architecture.denoiser: TOYS[architecture.name], "vae": TOY_VAE}
    parts = {
        name: Part(class_name=part.class_name, config={**part.config, **changes.get(name, {})})
        for name, part in architecture.parts.items()
    }
    return replace(architecture, parts=parts)


def pipeline_of(folder: Path, *, sampler: str, dtype: torch.dtype, device: torch.device) -> Any:
    """diffusers' own pipeline on the same random weights."""
    index = json.loads((folder / "model_index.json").read_text())
    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if not isinstance(entry, list):
            continue
        library = diffusers if entry[0] == "diffusers" else transformers
        cls = getattr(library, entry[1])
        if name == "scheduler":
            config = json.loads((folder / name / "scheduler_config.json").read_text())
            is_flow = entry[1].startswith("FlowMatch")
            cls = cls if is_flow else getattr(diffusers, SCHEDULERS[sampler])
            parts[name] = cls.from_config(config)
        elif name.startswith("tokenizer"):
            parts[name] = cls.from_pretrained(folder / name)
        else:
            parts[name] = module_of(cls, folder / name, dtype=dtype, device=device)
    flags = {name: value for name, value in index.items() if isinstance(value, bool)}
    cls = getattr(diffusers, index["_class_name"])
    # What it checks pictures with, and other parts that nothing here uses.
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name != "self" and parameter.default is inspect.Parameter.empty:
            parts.setdefault(name, None)
        if name == "requires_safety_checker":
            flags |= {name: False}
    pipe = cls(**parts, **flags)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def module_of(cls: Any, folder: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    config = json.loads((folder / "config.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    if issubclass(cls, diffusers.ModelMixin):
        return random_weights.module_of(cls, config, files, dtype=dtype, device=device).eval().requires_grad_(False)  # noqa: FBT003 - PyTorch has it so
    # Text encoders are light here, so they may be born whole; some of their buffers are in no file.
    module = cls(cls.config_class.from_dict(config)).to(device, dtype)
    found = module.load_state_dict(random_weights.draw(files, dtype=dtype, device=device), strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    return module.eval()


def drawings(case: Case, folder: Path, *, family: str, n: int, mixed: bool) -> list[Drawing]:
    return [
        Drawing(
            job_id=JobId(f"job-{i}"), checkpoint=str(folder), family=family, prompt=PROMPTS[i % len(PROMPTS)],
            negative_prompt="", width_px=case.side_px, height_px=case.side_px,
            steps=max(1, case.steps - 5 + i % 11) if mixed else case.steps,
            guidance=case.guidance, seed=i, n_images=1, sampler=case.sampler,
        )
        for i in range(n)
    ]  # fmt: skip


def requests_of(asked: list[Drawing]) -> list[Request]:
    return [
        Request(
            prompt=one.prompt, seed=one.seed, steps=one.steps, guidance=one.guidance,
            width=one.width_px, height=one.height_px,
        )
        for one in asked
    ]  # fmt: skip


async def served(asked: list[Request], server: ServerB | ServerC) -> list[Any]:
    """All requests at once to one server, as its clients would."""
    drawn = await asyncio.gather(*(server.draw(one) for one in asked))
    return [pictures[0] for pictures in drawn]


def best_s(draw: Callable[[], Any], *, n_rounds: int) -> float:
    spent_s = []
    for _ in range(n_rounds):
        begun_s = time.perf_counter()
        draw()
        spent_s.append(time.perf_counter() - begun_s)
    return min(spent_s)


def by_diffusers(pipe: Any, loads: dict[str, list[Request]], *, n_rounds: int, into: dict[str, Any]) -> None:
    """Seconds of each load in each of the three ways without us."""
    for name, plain in loads.items():
        draw_one(pipe, plain[0], seed=0)
        into[name]["diffusers"] = best_s(
            lambda plain=plain: [draw_one(pipe, one, seed=one.seed) for one in plain], n_rounds=n_rounds
        )
        for way, server in (("server C", ServerC), ("server B", ServerB)):
            draw_all = partial(served, plain)
            into[name][way] = best_s(
                lambda server=server, draw_all=draw_all: asyncio.run(draw_all(server(pipe))), n_rounds=n_rounds
            )
            if hasattr(pipe, "disable_attention_slicing"):
                pipe.disable_attention_slicing()  # server C's


def psnr_db(a: np.ndarray, b: np.ndarray) -> float | None:
    """None for equal pictures: no number says that, and JSON has none."""
    mean_square = float(np.mean((a.astype(float) - b.astype(float)) ** 2))
    return None if mean_square == 0 else round(10 * float(np.log10(255**2 / mean_square)), 1)


def measure(case: Case, *, n_requests: int, n_rounds: int, options: EngineOptions, limit: float) -> dict[str, Any]:
    architecture = architectures.load(case.name)
    if options.device == "cpu":
        architecture = toy_of(architecture)
    device = torch.device(options.device)
    dtype = torch.bfloat16
    with random_folder(architecture, with_text_encoders=False) as (_, folder):
        alone = drawings(case, folder, family=architecture.family, n=1, mixed=False)
        mixed = drawings(case, folder, family=architecture.family, n=n_requests, mixed=True)
        told: dict[str, Any] = {"alone": {}, "mixed": {}}
        by_diffusers(
            pipeline_of(folder, sampler=case.sampler, dtype=dtype, device=device),
            {"alone": requests_of(alone), "mixed": requests_of(mixed)},
            n_rounds=n_rounds,
            into=told,
        )
        # Two copies of FLUX beside each other would not leave room for the batch.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        ours = Ours(options)
        for name, asked in (("alone", alone), ("mixed", mixed)):
            ours.draw(asked)
            told[name]["ours"] = best_s(lambda asked=asked: ours.draw(asked), n_rounds=n_rounds)
        company = ours.draw(mixed)
        told["psnr_alone_against_company_db"] = psnr_db(ours.draw(mixed[:1])[0], company[0])
        for name, asked in (("alone", alone), ("mixed", mixed)):
            work = count_work(asked[0])
            n_flops = sum(work.picture(one.steps) for one in asked)
            told[name] = {
                way: {
                    "images_per_s": round(len(asked) / spent_s, 4),
                    "ours_is_faster_by": round(spent_s / told[name]["ours"], 2),
                    "of_the_limit": round(n_flops / (limit * spent_s), 4),
                }
                for way, spent_s in told[name].items()
            }
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    chosen = parser.parse_args()
    if not chosen.dry_run and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured (--dry-run tries the script at toy size on the CPU)")
        return 1
    kind = "cpu" if chosen.dry_run else "cuda"
    options = EngineOptions(device=kind, dtype="bfloat16", executor="torch" if chosen.dry_run else chosen.executor)
    limit = measure_limit(options.device, options.dtype)
    name = "toy sizes on the CPU: the numbers mean nothing" if chosen.dry_run else torch.cuda.get_device_name()
    print(f"{name}; limit {limit / 1e12:.1f} TFLOP/s in bfloat16")
    results = {}
    for case_name in chosen.cases:
        case = CASES[case_name]
        if chosen.dry_run:
            case = replace(case, side_px=64, steps=3)
        results[case.name] = measure(
            case, n_requests=chosen.requests, n_rounds=chosen.rounds, options=options, limit=limit
        )
        told = results[case.name]
        print(f"\n{case.name}, {case.side_px}x{case.side_px}, {case.steps} steps, {chosen.requests} mixed requests")
        for kind_of_load in ("alone", "mixed"):
            for way, row in told[kind_of_load].items():
                print(
                    f"  {kind_of_load:6} {way:10} {row['images_per_s']:>9.3f} images/s  {row['of_the_limit']:>6.1%} "
                    f"of the limit  ours is {row['ours_is_faster_by']:.2f}x as fast"
                )
        apart_db = told["psnr_alone_against_company_db"]
        apart = "equal" if apart_db is None else f"{apart_db} dB"
        print(f"  a picture alone against the same in company: {apart}")
    print(json.dumps({"limit_tflop_per_s": round(limit / 1e12, 2), "cases": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
