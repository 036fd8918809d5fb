"""One guided step of Stable Diffusion 1.5, real architecture, random weights: plain diffusers, ours, OpenVINO.

    python benchmarks/sd15_step.py                          # without OpenVINO
    python benchmarks/sd15_step.py --cache DIR --convert    # once: minutes, and 8 GB of memory
    python benchmarks/sd15_step.py --cache DIR              # with it; about two minutes on two cores

Plain: diffusers' UNet in float32. Ours: the network, format and arrangement that the engine uses on this machine. Two
rows, as one picture with guidance has. In turns, best of --rounds; beside each the share of this machine's own matrix
products in that format, timed in the same run. The speed of random weights is that of real ones, the picture is noise.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from sdfleet.engine.devices import choose_device
from sdfleet.engine.networks.choice import own_network
from sdfleet.engine.openvino_calls import call_of
from sdfleet.engine.openvino_denoiser import OpenVinoDenoiser
from sdfleet.engine.prepacked import arrange

UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
# 2 x multiply-adds of one call, attention included; counted with torch's FlopCounter.
TFLOP = {512: 1.607, 256: 0.360}
DECODE_TFLOP = 2.515
N_ROWS = 2
WARM_UP_PX = 64


def random_network(cls: Any, config: dict[str, Any]) -> Any:
    """diffusers' class with seeded numbers; zeros and ones where it has no weight matrix."""
    with torch.device("meta"):
        network = cls(**config)
    network.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.7 * weight[0].numel() ** -0.5)
        else:
            torch.nn.init.constant_(weight, float("norm" in name and name.endswith("weight")))
    return network.eval().requires_grad_(requires_grad=False)


def ours_of(plain: Any, class_name: str, dtype: torch.dtype) -> Any:
    """The engine's network with the same numbers, arranged as the engine does it."""
    build = own_network(class_name, dict(plain.config))
    assert build is not None
    network = build()
    network.load_state_dict({name: weight.to(dtype) for name, weight in plain.state_dict().items()}, assign=True)
    return arrange(network.eval().requires_grad_(requires_grad=False))


def best_of(calls: dict[str, Callable[[], Any]], n_rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of each, in turns, and their last answers. Whoever needs a warm-up has had it."""
    best, answers = dict.fromkeys(calls, float("inf")), {}
    for _ in range(n_rounds):
        for name, call in calls.items():
            begun_s = time.perf_counter()
            answers[name] = call()
            best[name] = min(best[name], time.perf_counter() - begun_s)
    return best, answers


def tflops_of(dtype: torch.dtype, size: int = 2048) -> float:
    """What matrix products of this machine reach in a format."""
    a = torch.randn(size, size).to(dtype)
    return 2 * size**3 / best_of({"mm": lambda: torch.mm(a, a)}, 8)[0]["mm"] / 1e12


def call(network: Any, side_px: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(N_ROWS, 4, side_px // 8, side_px // 8, generator=generator).to(dtype)
    states = torch.randn(N_ROWS, 77, 768, generator=generator).to(dtype)
    timestep = torch.tensor([500.0] * N_ROWS)

    def step() -> torch.Tensor:
        return network(latents, timestep, encoder_hidden_states=states, return_dict=False)[0].float()

    return step


def convert(unet: Any, model_file: Path) -> None:
    import openvino

    sys.modules["openvino_telemetry"] = cast("Any", None)
    how = call_of("UNet2DConditionModel", dict(unet.config))
    assert how is not None
    with torch.inference_mode(mode=False), torch.no_grad():
        model = openvino.convert_model(how.wrapped(unet), example_input=how.examples())
    model_file.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, model_file, compress_to_fp16=False)


def by_openvino(config: dict[str, Any], model_file: Path, dtype: torch.dtype) -> OpenVinoDenoiser:
    how = call_of("UNet2DConditionModel", config)
    assert how is not None
    return OpenVinoDenoiser(model_file, how, dtype=dtype, resident_bytes=0)


def steps(model_file: Path | None, *, sizes: list[int], dtype: torch.dtype, n_rounds: int) -> dict[str, float]:
    plain = random_network(UNet2DConditionModel, UNET)
    # Name, network, format it is fed in, format it computes in.
    networks = [("plain", plain, torch.float32, torch.float32)]
    networks.append(("ours", ours_of(plain, "UNet2DConditionModel", dtype), dtype, dtype))
    if model_file is not None:
        networks.append(("openvino", by_openvino(dict(plain.config), model_file, dtype), torch.float32, dtype))
    ceiling = {form: tflops_of(form) for form in {torch.float32, dtype}}
    facts: dict[str, float] = {f"matmul_{str(form)[6:]}_tflops": round(t, 3) for form, t in ceiling.items()}
    for _, network, fed, _ in networks:
        call(network, WARM_UP_PX, fed)()
    for side_px in sizes:
        calls = {name: call(network, side_px, fed) for name, network, fed, _ in networks}
        best, answers = best_of(calls, n_rounds)
        for name, _, _, computes in networks:
            share = TFLOP[side_px] / best[name] / ceiling[computes]
            apart = _rms(answers[name] - answers["plain"]) / _rms(answers["plain"])
            ratio = best["plain"] / best[name]
            print(
                f"{side_px} px, {name:9} {str(computes)[6:]:9} {best[name]:7.3f} s a step, {ratio:5.2f}x, "
                f"{share:4.0%} of its matrix products, {apart:.4f} from plain",
                flush=True,
            )
            facts[f"{name}_{side_px}_s"], facts[f"{name}_{side_px}_ratio"] = round(best[name], 4), round(ratio, 2)
    return facts


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.pow(2).mean().sqrt()


def decode(*, dtype: torch.dtype, n_rounds: int) -> dict[str, float]:
    plain = random_network(AutoencoderKL, VAE)
    ours = ours_of(plain, "AutoencoderKL", dtype)
    latents = torch.randn(1, 4, 64, 64)
    best, _ = best_of(
        {
            "plain": lambda: plain.decode(latents, return_dict=False)[0],
            "ours": lambda: ours.decode(latents.to(dtype), return_dict=False)[0],
        },
        n_rounds,
    )
    ratio = best["plain"] / best["ours"]
    print(f"decode of 512 px: plain {best['plain']:.2f} s, ours {best['ours']:.2f} s, {ratio:.2f}x")
    return {"plain_decode_s": round(best["plain"], 3), "ours_decode_s": round(best["ours"], 3),
            "decode_ratio": round(ratio, 2)}  # fmt: skip


def main() -> None:
    """Print a line for each, and last one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="256,512")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--convert", action="store_true", help="only convert for OpenVINO, into --cache")
    parser.add_argument("--no-decode", action="store_true")
    given = parser.parse_args()
    if given.convert and not given.cache:
        parser.error("--convert needs --cache")
    model_file = given.cache / "model.xml" if given.cache else None
    with torch.inference_mode():
        if given.convert:
            convert(random_network(UNet2DConditionModel, UNET), model_file)
            return
        if model_file is not None and not model_file.is_file():
            parser.error(f"there is no {model_file}: run with --convert first")
        device = choose_device("cpu", given.dtype)
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {device.dtype_name}: {device.why}")
        sizes = [int(side) for side in given.sizes.split(",")]
        facts = steps(model_file, sizes=sizes, dtype=device.dtype, n_rounds=given.rounds)
        gc.collect()
        if not given.no_decode:
            facts |= decode(dtype=device.vae_dtype, n_rounds=1)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
