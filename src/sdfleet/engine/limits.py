"""What a picture costs in arithmetic, and what this device gives at most: the two ends of "share of the limit".

Both are found out, not looked up: operations by running the networks on the meta device, where nothing is computed and
every matrix product, convolution and attention is counted; the device's limit by timing matrix products.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from sdfleet.domain import Drawing
from sdfleet.engine.components import Components
from sdfleet.engine.devices import Device, choose_device
from sdfleet.engine.events import DeviceChoice, DtypeChoice
from sdfleet.engine.families import FAMILIES
from sdfleet.engine.families.base import NetworkRows
from sdfleet.engine.footprint import with_made_mask
from sdfleet.engine.prompt_cache import PromptCache

# On a card larger products come closer to the limit; two cores would need seconds for one.
_PRODUCT_SIDES = {"cuda": (4096, 8192), "mps": (2048, 4096), "cpu": (1024, 2048)}
_PRODUCT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Floating point operations of one picture, two for every multiply and add.

    encode: both prompts, where both are read. step: one step, with guidance if the picture is guided.
    """

    encode: int
    step: int
    decode: int

    def picture(self, n_steps: int) -> int:
        """All of one picture."""
        return self.encode + n_steps * self.step + self.decode


def count_work(drawing: Drawing) -> Work:
    """The operations of this drawing's networks, for one picture. Nothing is loaded but configs and tokenizers.

    Raises CheckpointError and UnsupportedByModel as the engine does.
    """
    meta = Device(kind="meta", dtype=torch.bfloat16, vae_dtype=torch.bfloat16, why="nothing is computed")
    components = Components(Path(drawing.checkpoint), meta)
    family = FAMILIES[drawing.family](components, meta, PromptCache(0))
    for name in family.text_encoders(drawing):
        components.use(name).register_forward_pre_hook(with_made_mask, with_kwargs=True)
    with torch.inference_mode():
        prompts, encode = _counted(lambda: family.encode(drawing))
        told = [part for part in (prompts.positive, prompts.negative) if part is not None]
        latents = torch.empty(family.latent_shape(drawing), device="meta")
        rows = NetworkRows(
            latents=latents.expand(len(told), *latents.shape[1:]),
            timestep=torch.empty(len(told), device="meta"),
            guidance=torch.empty(len(told), device="meta"),
            # As the engine does: the shorter of two prompts is filled up where a family lets their lengths differ.
            states=pad_sequence([part.states for part in told], batch_first=True),
            n_tokens=tuple(part.states.shape[0] for part in told),
            pooled=None if told[0].pooled is None else torch.stack([p.pooled for p in told if p.pooled is not None]),
            extra=None,
            size_px=(drawing.height_px, drawing.width_px),
        )
        _, step = _counted(lambda: family.predict(rows))
        vae = components.use("vae")
        config = components.config("vae")
        scale = 2 ** (len(config["block_out_channels"]) - 1)
        cells = torch.empty(
            (1, config["latent_channels"], drawing.height_px // scale, drawing.width_px // scale),
            dtype=torch.bfloat16, device="meta",
        )  # fmt: skip
        _, decode = _counted(lambda: vae.decode(cells, return_dict=False))
    return Work(encode=encode, step=step, decode=decode)


def measure_limit(device: DeviceChoice, dtype: DtypeChoice, *, n_threads: int | None = None) -> float:
    """Operations a second of the fastest matrix product this device does in this format; about a second of work.

    For the main thread of a quiet process: a second thread with its own pool slows all of torch on a CPU.
    """
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    chosen = choose_device(device, dtype)
    return max(_products_per_s(chosen, side) for side in _PRODUCT_SIDES[chosen.kind])


def _products_per_s(device: Device, side: int) -> float:
    # Not zeros: cards save power on them, and run faster than on any model's numbers.
    a, b = (torch.randn(side, side, device=device.torch_device).to(device.dtype) for _ in range(2))
    best_s = float("inf")
    begun_s = time.perf_counter()
    while time.perf_counter() - begun_s < _PRODUCT_S / 2:
        started_s = time.perf_counter()
        _finish(device, torch.mm(a, b))
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2.0 * side**3 / best_s


def _finish(device: Device, product: torch.Tensor) -> None:
    """Wait for a card: it answers before it has computed."""
    if device.kind != "cpu":
        product[0, 0].item()


def _counted(call: Callable[[], Any]) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        answer = call()
    return answer, int(counter.get_total_flops())
