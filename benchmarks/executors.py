"""Torch against OpenVINO as executors of a denoiser, interleaved on one machine, printed as ratios.

    python benchmarks/executors.py                     # forward times by rows, of the built-in model
    python benchmarks/executors.py --pool              # does OpenVINO's thread pool slow torch down between its calls?
    python benchmarks/executors.py --pictures 8        # whole pictures: the engine with either executor, in turns

Ratios of one run are what counts. Interleaved, best of --rounds; what the machine was doing stands in LOG.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdfleet import starter
from sdfleet.domain import Drawing, JobId
from sdfleet.engine.components import Components
from sdfleet.engine.devices import Device
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, JobFailed
from sdfleet.engine.openvino_cache import ModelCache
from sdfleet.engine.openvino_calls import call_of
from sdfleet.engine.openvino_denoiser import OpenVinoDenoiser

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def components(checkpoint: Path, dtype: torch.dtype) -> Components:
    return Components(checkpoint, Device(kind="cpu", dtype=dtype, vae_dtype=dtype, why="as asked"))


def arguments_of(config: dict[str, Any], n_rows: int, side_px: int, dtype: torch.dtype) -> dict[str, Any]:
    """A call with noise, as the engine makes it."""
    side = side_px // 8
    latents = torch.randn(n_rows, config["in_channels"], side, side, dtype=dtype)
    timestep = torch.linspace(10.0, 900.0, n_rows)
    if "joint_attention_dim" in config:
        return {
            "hidden_states": latents,
            "timestep": timestep,
            "encoder_hidden_states": torch.randn(n_rows, 333, config["joint_attention_dim"], dtype=dtype),
            "pooled_projections": torch.randn(n_rows, config["pooled_projection_dim"], dtype=dtype),
        }
    told: dict[str, Any] = {
        "sample": latents,
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(n_rows, 77, config["cross_attention_dim"], dtype=dtype),
    }
    if config.get("addition_embed_type") == "text_time":
        n_text = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        sizes = torch.tensor([[side_px, side_px, 0, 0, side_px, side_px]], dtype=dtype).repeat(n_rows, 1)
        told["added_cond_kwargs"] = {"text_embeds": torch.randn(n_rows, n_text, dtype=dtype), "time_ids": sizes}
    return told


def best_of(calls: dict[str, Callable[[], object]], n_rounds: int) -> dict[str, float]:
    """Milliseconds of each, in turns."""
    best = dict.fromkeys(calls, float("inf"))
    for n_round in range(n_rounds + 1):
        for name, call in calls.items():
            begun_s = time.perf_counter()
            call()
            if n_round:  # the first pays for set-up
                best[name] = min(best[name], (time.perf_counter() - begun_s) * 1000)
    return best


class Networks:
    """The checkpoint's denoiser in every arrangement."""

    def __init__(self, checkpoint: Path, cache: ModelCache) -> None:
        parts = {name: components(checkpoint, dtype) for name, dtype in DTYPES.items()}
        self.name: Any = "unet" if parts["f32"].has("unet") else "transformer"
        self.config = parts["f32"].config(self.name)
        call = call_of(parts["f32"].class_name(self.name), self.config)
        if call is None:
            raise SystemExit("OpenVINO does not serve this class of denoisers")
        key = cache.key(checkpoint, self.name)
        begun_s = time.perf_counter()
        model = cache.find(key) or cache.convert(checkpoint, self.name, key, in_background=False).result()
        print(f"converted in {time.perf_counter() - begun_s:.1f} s, a process that imports everything included")
        self.networks: dict[str, tuple[Any, torch.dtype]] = {}
        for name, dtype in DTYPES.items():
            self.networks[f"torch {name}"] = (parts[name].use(self.name), dtype)
        for name, dtype in DTYPES.items():
            begun_s = time.perf_counter()
            network = OpenVinoDenoiser(model, call, dtype=dtype, resident_bytes=0)
            print(f"compiled for {name} in {time.perf_counter() - begun_s:.1f} s")
            self.networks[f"openvino {name}"] = (network, torch.float32)

    def calls(self, n_rows: int, side_px: int) -> dict[str, Callable[[], object]]:
        def call(network: Any, dtype: torch.dtype) -> Callable[[], object]:
            told = arguments_of(self.config, n_rows, side_px, dtype)
            return lambda: network(**told, return_dict=False)

        return {name: call(*network) for name, network in self.networks.items()}


def forwards(networks: Networks, side_px: int, rows: list[int], n_rounds: int) -> None:
    print(f"{'rows':>4} {'torch f32':>10} {'torch bf16':>11} {'ov f32':>8} {'ov bf16':>8}   torch/ov f32, bf16")
    for n_rows in rows:
        ms = best_of(networks.calls(n_rows, side_px), n_rounds)
        a, b, c, d = (ms[name] for name in ("torch f32", "torch bf16", "openvino f32", "openvino bf16"))
        print(f"{n_rows:>4} {a:>10.1f} {b:>11.1f} {c:>8.1f} {d:>8.1f}   {a / c:>12.2f} {b / d:>5.2f}")


def pool(networks: Networks, checkpoint: Path, side_px: int, n_rounds: int) -> None:
    """Torch's VAE decoder by itself, right after a torch call of the denoiser, and right after an OpenVINO call."""
    parts = components(checkpoint, torch.bfloat16)
    vae = parts.use("vae")
    latents = torch.randn(2, parts.config("vae")["latent_channels"], side_px // 8, side_px // 8, dtype=torch.bfloat16)
    calls = networks.calls(4, side_px)
    best = dict.fromkeys(("alone", "torch bf16", "openvino bf16"), float("inf"))
    for n_round in range(n_rounds + 1):
        for before in best:
            if before != "alone":
                calls[before]()
            begun_s = time.perf_counter()
            vae.decode(latents, return_dict=False)
            if n_round:
                best[before] = min(best[before], (time.perf_counter() - begun_s) * 1000)
    print("VAE decode, ms, by what ran before it: " + ", ".join(f"{name} {ms:.1f}" for name, ms in best.items()))
    print(f"after OpenVINO / after torch: {best['openvino bf16'] / best['torch bf16']:.2f}")


def pictures(checkpoint: Path, family: str, *, side_px: int, n_pictures: int, n_rounds: int, cache: Path) -> None:
    def seconds(engine: Engine, n_images: int) -> float:
        begun_s = time.perf_counter()
        engine.submit(
            Drawing(
                job_id=JobId("job"), checkpoint=str(checkpoint), family=family, prompt="two red stars",
                negative_prompt="", width_px=side_px, height_px=side_px, steps=20, guidance=4.0, seed=0,
                n_images=n_images, sampler="ddim",
            )
        )  # fmt: skip
        while not engine.is_idle:
            for event in engine.step():
                if isinstance(event, JobFailed):
                    raise event.error
        return time.perf_counter() - begun_s

    for dtype in ("float32", "bfloat16"):
        engines = {
            executor: Engine(EngineOptions(device="cpu", dtype=dtype, executor=executor, cache_folder=str(cache)))
            for executor in ("torch", "openvino")
        }
        for n_images in sorted({1, n_pictures}):
            for _ in range(2):  # load, convert, and let the batcher learn
                for engine in engines.values():
                    seconds(engine, n_images)
            best = dict.fromkeys(engines, float("inf"))
            for _ in range(n_rounds):
                for name, engine in engines.items():
                    best[name] = min(best[name], seconds(engine, n_images))
            ratio = best["torch"] / best["openvino"]
            print(
                f"{dtype}, {n_images} pictures of 20 steps: torch {best['torch']:.2f} s, "
                f"OpenVINO {best['openvino']:.2f} s, ratio {ratio:.2f}"
            )
        for engine in engines.values():
            engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=starter.weights_path())
    parser.add_argument("--family", default="sd")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--rows", default="1,2,8,16,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pool", action="store_true")
    parser.add_argument("--pictures", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{given.threads} threads, {given.side} px, best of {given.rounds} in turns")
    with tempfile.TemporaryDirectory() as cache, torch.inference_mode():
        if given.pictures:
            how = {"side_px": given.side, "n_pictures": given.pictures, "n_rounds": given.rounds}
            pictures(given.model, given.family, **how, cache=Path(cache))
            return
        networks = Networks(given.model, ModelCache(Path(cache)))
        if given.pool:
            pool(networks, given.model, given.side, given.rounds)
        else:
            forwards(networks, given.side, [int(n) for n in given.rows.split(",")], given.rounds)


if __name__ == "__main__":
    main()
