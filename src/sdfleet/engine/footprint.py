"""What a checkpoint's networks take at any size and number of rows, found out on the meta device from configs alone.

No weight is read: the networks are built without memory and called once per shape, which takes 0.1 to 0.7 seconds; an
answer is kept. It is the code that draws which is called, so a new family or a changed network needs nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sdfleet.domain import Drawing
from sdfleet.engine.components import ComponentName, Components
from sdfleet.engine.networks.choice import own_network
from sdfleet.engine.prepacked import packed_bytes
from sdfleet.engine.prompt_cache import PromptCache
from sdfleet.engine.tape import Work, kept_bytes_of, record

if TYPE_CHECKING:
    from sdfleet.engine.families.base import LatentFamily, NetworkRows


class Footprint:
    """The work of one family's networks on one device, by shape. Built when first asked."""

    def __init__(self, family: LatentFamily) -> None:
        self._family = family
        self._device = family.device
        self._twin: LatentFamily | None = None
        self._known: dict[tuple[object, ...], Work] = {}

    def denoise(self, *, width_px: int, height_px: int, n_rows: int, edits: bool = False) -> Work:
        """One network call of `n_rows` rows. edits: with a picture to look at beside, where the network takes one."""
        return self._kept(("denoise", width_px, height_px, n_rows, edits), self._denoise)

    def decode(self, *, width_px: int, height_px: int) -> Work:
        """Decoding one picture, untiled."""
        return self._kept(("decode", width_px, height_px), self._decode)

    def encode(self, drawing: Drawing) -> Work:
        """Reading the prompts of this drawing. Builds its text encoders, and needs its tokenizers."""
        return self._kept(
            ("encode", drawing.prompt, drawing.negative_prompt, drawing.t5), partial(self._encode, drawing)
        )

    def _kept(self, key: tuple[object, ...], find: Callable[..., Work]) -> Work:
        if key not in self._known:
            self._known[key] = find() if isinstance(find, partial) else find(*key[1:])
        return self._known[key]

    def _denoise(self, width_px: int, height_px: int, n_rows: int, edits: bool) -> Work:  # noqa: FBT001 - a key's fields
        twin = self._opened()
        rows = _rows(twin, width_px=width_px, height_px=height_px, n_rows=n_rows, edits=edits)
        twin.components.use(twin.denoiser)
        widens = self._device.weights is not None
        work = record(lambda: twin.predict(rows), kind=self._device.kind, widens=widens)
        return self._with_packed(work, twin.denoiser)

    def _decode(self, width_px: int, height_px: int) -> Work:
        twin = self._opened()
        vae, config = twin.components.use("vae"), twin.components.config("vae")
        scale = 2 ** (len(config["block_out_channels"]) - 1)
        cells = torch.empty(
            (1, config["latent_channels"], height_px // scale, width_px // scale),
            dtype=self._device.vae_dtype, device="meta",
        )  # fmt: skip

        def decode() -> torch.Tensor:
            return vae.decode(cells, return_dict=False)[0].float()

        return self._with_packed(record(decode, kind=self._device.kind), "vae")

    def _encode(self, drawing: Drawing) -> Work:
        twin = self._opened()
        for name in twin.text_encoders(drawing):
            twin.components.use(name).register_forward_pre_hook(with_made_mask, with_kwargs=True)
        return record(lambda: twin.encode(drawing), kind=self._device.kind)

    def _with_packed(self, work: Work, name: ComponentName) -> Work:
        """The same with the packed weights among what is kept, and with oneDNN's part in timing each both ways."""
        own = self._family.components
        is_ours = own_network(own.class_name(name) or "", own.config(name)) is not None
        if self._device.kind != "cpu" or not is_ours or own.kept_in(name) is not None:
            return work
        n_bytes = packed_bytes(self._opened().components.use(name))
        if not n_bytes:
            return work
        by_weight = {call.arguments[1]: call for call in work.calls if call.kind in {"conv2d", "linear"}}
        return replace(work, kept_bytes=work.kept_bytes + n_bytes + kept_bytes_of(by_weight.values()))

    def _opened(self) -> LatentFamily:
        if self._twin is None:
            own = self._family.components
            meta = replace(self._device, kind="meta", weights=None, text_weights=None)
            components = Components(own.folder, meta)
            for name, dtype in ((self._family.denoiser, meta.dtype), ("vae", meta.vae_dtype)):
                components.serve(name, partial(_skeleton, components, name, dtype, kind=self._device.kind))
            self._twin = type(self._family)(components, meta, PromptCache(0))
        return self._twin


def with_made_mask(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Making a mask takes numbers, which a meta tensor has not; transformers' language models take ready ones too.

    None among them is the plain causal mask: padding changes what is computed, not how much.
    """
    if "attention_mask" in kwargs:
        kwargs = {**kwargs, "attention_mask": {"full_attention": None, "sliding_attention": None}}
    return args, kwargs


def _skeleton(components: Components, name: ComponentName, dtype: torch.dtype, *, kind: str) -> Any:
    """A denoiser or picture decoder without weights, laid out as `arrange` lays out those that have some."""
    class_name, config = components.class_name(name) or "", components.config(name)
    build = own_network(class_name, config)
    with torch.device("meta"):
        if build is not None:
            module = build().to(dtype)
            is_laid_out = kind == "cpu" and dtype == torch.bfloat16
            # torch's own types know `memory_format` of tensors only.
            return (module.to(memory_format=torch.channels_last) if is_laid_out else module).eval()  # type: ignore[call-overload]
        import diffusers

        return getattr(diffusers, class_name).from_config(config).to(dtype).eval()


def _rows(family: LatentFamily, *, width_px: int, height_px: int, n_rows: int, edits: bool) -> NetworkRows:
    from sdfleet.engine.families.base import NetworkRows

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    n_tokens, width, pooled = family.conditioning_shape()
    height_cells, width_cells = (side // family.px_per_latent for side in (height_px, width_px))
    n_extra = family.n_extra_channels or (family.latent_channels if edits and family.sees_references else 0)
    dtype = family.device.dtype
    return NetworkRows(
        latents=empty(n_rows, family.latent_channels, height_cells, width_cells),
        timestep=empty(n_rows),
        guidance=empty(n_rows),
        states=empty(n_rows, n_tokens, width, dtype=dtype),
        n_tokens=(n_tokens,) * n_rows,
        pooled=None if pooled is None else empty(n_rows, pooled, dtype=dtype),
        extra=empty(n_rows, n_extra, height_cells, width_cells) if n_extra else None,
        size_px=(height_px, width_px),
    )
