"""mflux's own classes, kept in memory and watched while they draw: Z-Image Turbo, FLUX.1 dev and schnell, FLUX.2 klein.

Written against mflux 0.24.0. Weights come from the folder of the drawing and from nowhere else; sizes of networks are
taken from its configs, where mflux would take those of the published models.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, assert_never

from sdfleet.domain import Drawing, Picture, TokenCount
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.guests import mlx_device
from sdfleet.engine.guests.fitting import Fit, Kind, fit, plain_prompt, steps_to_draw
from sdfleet.engine.guests.guest import GuestEngine, Memory, Model, Sitting, check_options
from sdfleet.errors import UnsupportedByModel

log = logging.getLogger(__name__)

# mflux keeps the encoded form of every prompt it ever saw with FLUX.1: 4 MB each with T5.
_MOST_KEPT_PROMPTS = 16
# The only FLUX.1 that mflux's transformer and T5 can be: widths stand in its code.
_FLUX_CONFIG = {"num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096}


def open_engine(options: EngineOptions) -> GuestEngine:
    """The engine that `engine/child.py` runs in mflux's virtual environment."""
    return GuestEngine(partial(Mflux, options), options)


class Mflux:
    """See `Guest`. Importing mflux takes a second or two, most of it transformers."""

    def __init__(self, options: EngineOptions) -> None:
        check_options(options, "mflux")
        self.device = mlx_device.open_device(options)
        self.title = f"mflux {version('mflux')}, mlx {version('mlx')}"
        self._bits = {"int8": 8, "nf4": 4}.get(options.weights)

    def fit(self, drawing: Drawing) -> Fit:
        return fit("mflux", Path(drawing.checkpoint))

    def load(self, drawing: Drawing, fitted: Fit) -> Model:
        return _Painter(Path(drawing.checkpoint), fitted, bits=self._bits)

    def memory(self) -> Memory:
        return mlx_device.memory()

    def release(self) -> None:
        mlx_device.release()

    def is_out_of_memory(self, exc: BaseException) -> bool:
        return mlx_device.is_out_of_memory(exc)


class _Painter:
    """One checkpoint in one of mflux's classes."""

    def __init__(self, folder: Path, fitted: Fit, *, bits: int | None) -> None:
        import mlx.core as mx

        self._fitted = fitted
        self._kind: Kind = fitted.kind
        self._model = _loaded(folder, self._kind, bits)
        mx.eval(self._model.parameters())  # else the first picture would read the files
        self.dtype = "bfloat16" if self._model.bits is None else f"bfloat16, weights in {self._model.bits} bits"
        self._preview_map: Any = None

    def read(self, drawing: Drawing) -> tuple[tuple[TokenCount, ...], tuple[str, ...]]:
        counts, unread = [], []
        prompt = plain_prompt(drawing.prompt)
        for name, tokenizer in self._model.tokenizers.items():
            encoder = {"z_image": "qwen", "qwen3": "qwen"}.get(name, name)
            n_tokens = len(tokenizer.tokenizer(_framed(tokenizer, prompt), add_special_tokens=True)["input_ids"])
            window = tokenizer.max_length
            if n_tokens > window:
                unread.append(
                    f"mflux's text encoder {encoder} read {window} of the prompt's {n_tokens} tokens, not the others"
                )
            read = min(n_tokens, window)
            counts.append(TokenCount(encoder=encoder, n_tokens=read, window=window, n_chunks=1))
        return tuple(counts), tuple(unread)

    def draw(self, drawing: Drawing, seed: int, sitting: Sitting) -> Picture:
        from mflux.callbacks.callback_registry import CallbackRegistry

        model = self._model
        model.callbacks = CallbackRegistry()
        model.callbacks.register(_Watcher(sitting, self._show))
        if len(getattr(model, "prompt_cache", ())) > _MOST_KEPT_PROMPTS:
            model.prompt_cache.clear()
        given: dict[str, Any] = {
            "seed": seed,
            "prompt": plain_prompt(drawing.prompt),
            "num_inference_steps": drawing.steps,
            "width": drawing.width_px,
            "height": drawing.height_px,
        }
        if self._fitted.takes_guidance:
            given["guidance"] = drawing.guidance
        try:
            with _image_file(drawing) as path:
                if path is not None:
                    # Ours says how far to redraw, theirs how much of the picture stays.
                    given |= {"image_path": path, "image_strength": 1.0 - drawing.strength}
                image = model.generate_image(**given).image.convert("RGB")
        finally:
            model.callbacks = CallbackRegistry()  # what it watched for is over; the watcher holds latents
        return Picture(width_px=image.width, height_px=image.height, mode="RGB", data=image.tobytes())

    def _show(self, latents: Any, config: Any) -> Picture:
        """A preview of clean latents, as the denoiser has them."""
        if self._preview_map is None:
            from sdfleet.engine.guests.mlx_preview import fit_preview

            self._preview_map = fit_preview(self._encoded)
        shown: Picture = self._preview_map.picture(_floats(self._unpacked(latents, config)[0]))
        return shown

    def _encoded(self, picture: Any) -> Any:
        import mlx.core as mx
        from mflux.models.common.vae.vae_util import VAEUtil

        return _floats(VAEUtil.encode(vae=self._model.vae, image=mx.array(picture))[0])

    def _unpacked(self, latents: Any, config: Any) -> Any:
        """The latents of the denoiser as the VAE's, [1, c, h, w]."""
        match self._kind:
            case "zimage":
                return latents.reshape(1, latents.shape[0], *latents.shape[-2:])
            case "flux_dev" | "flux_schnell":
                from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator

                return FluxLatentCreator.unpack_latents(latents, config.height, config.width)
            case "klein" | "klein_base":
                cells = latents.reshape(1, config.height // 16, config.width // 16, latents.shape[-1])
                return self._model.vae.unpack_packed_latents(cells.transpose(0, 3, 1, 2))
            case "sd3":
                raise UnsupportedByModel("mflux draws no Stable Diffusion 3")
            case _:
                assert_never(self._kind)


class _Watcher:
    """What mflux calls back while it draws one picture."""

    def __init__(self, sitting: Sitting, show: Callable[[Any, Any], Picture]) -> None:
        self._sitting = sitting
        self._show = show
        self._latents: Any = None

    def call_before_loop(self, *, latents: Any, **_: Any) -> None:
        import mlx.core as mx

        mx.eval(latents)
        self._latents = latents
        self._sitting.enter("denoise")

    def call_in_loop(self, *, t: int, latents: Any, config: Any, **_: Any) -> None:
        import mlx.core as mx

        mx.eval(latents)  # MLX computes when it must: without this a step would be told before it was made
        before, self._latents = self._latents, latents
        first: int = config.init_time_step
        # mflux's own bar would count what it was given; ours must not be one it never ends.
        self._sitting.step(
            t - first + 1,
            config.num_inference_steps - first,
            lambda: self._show(_denoised(before, latents, t, config.scheduler.sigmas), config),
        )

    def call_after_loop(self, **_: Any) -> None:
        self._sitting.enter("decode")


def _denoised(before: Any, after: Any, t: int, sigmas: Any) -> Any:
    """Where the step from `before` to `after` was heading: these samplers go straight at the clean picture."""
    sigma, following = float(sigmas[t]), float(sigmas[t + 1])
    return before + (after - before) * (sigma / (sigma - following))


def _loaded(folder: Path, kind: Kind, bits: int | None) -> Any:
    """The model in mflux's class for it, from this folder."""
    from mflux.models.common.config.model_config import ModelConfig

    given = {"quantize": bits, "model_path": str(folder)}
    match kind:
        case "zimage":
            from mflux.models.z_image import ZImage

            with _sizes_of(folder):
                return ZImage(model_config=ModelConfig.z_image_turbo(), **given)
        case "flux_dev" | "flux_schnell":
            from mflux.models.flux.variants.txt2img.flux import Flux1

            _check_flux(folder)
            return Flux1(model_config=ModelConfig.dev() if kind == "flux_dev" else ModelConfig.schnell(), **given)
        case "klein" | "klein_base":
            from mflux.models.flux2.flux2_initializer import Flux2Transformer, Qwen3TextEncoder
            from mflux.models.flux2.variants.txt2img.flux2_klein import Flux2Klein

            published = ModelConfig.flux2_klein_4b() if kind == "klein" else ModelConfig.flux2_klein_base_4b()
            model_config = copy.copy(published)
            model_config.transformer_overrides = _arguments(Flux2Transformer, folder / "transformer")
            model_config.text_encoder_overrides = _arguments(Qwen3TextEncoder, folder / "text_encoder")
            return Flux2Klein(model_config=model_config, **given)
        case "sd3":
            raise UnsupportedByModel("mflux draws no Stable Diffusion 3")
        case _:
            assert_never(kind)


@contextmanager
def _sizes_of(folder: Path) -> Iterator[None]:
    """While it lasts, mflux builds Z-Image in the sizes of this folder, which it offers no argument for."""
    module = importlib.import_module("mflux.models.z_image.z_image_initializer")
    theirs = {"ZImageTransformer": folder / "transformer", "TextEncoder": folder / "text_encoder"}
    kept = {name: getattr(module, name) for name in theirs}
    for name, part in theirs.items():
        setattr(module, name, partial(kept[name], **_arguments(kept[name], part)))
    try:
        yield
    finally:
        for name, whole in kept.items():
            setattr(module, name, whole)


def _arguments(kind: Any, folder: Path) -> dict[str, Any]:
    """What the config of a part says of the arguments that mflux's class for it takes."""
    config = _config(folder)
    config |= config.get("rope_parameters") or {}
    known = inspect.signature(kind).parameters
    return {name: value for name, value in config.items() if name in known and value is not None}


def _check_flux(folder: Path) -> None:
    config = _config(folder / "transformer")
    other = {name: config.get(name) for name, value in _FLUX_CONFIG.items() if config.get(name) != value}
    if other:
        raise UnsupportedByModel(f"mflux knows FLUX.1 in one size only, and {folder.name} differs: {other}")


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def _framed(tokenizer: Any, prompt: str) -> str:
    """The prompt in the frame that mflux puts around it, as far as this tokenizer has one."""
    if not tokenizer.use_chat_template:
        return prompt
    arguments: Mapping[str, Any] = tokenizer.chat_template_kwargs
    framed: str = tokenizer.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, **arguments
    )
    return framed


@contextmanager
def _image_file(drawing: Drawing) -> Iterator[Path | None]:
    """The input picture as a file, which is all that mflux takes; None where it would have no part in the drawing."""
    image = drawing.image
    if image is None or steps_to_draw(drawing.steps, drawing.strength) == drawing.steps:
        yield None
        return
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="sdfleet-") as folder:
        path = Path(folder) / "input.png"
        Image.frombytes(image.mode, (image.width_px, image.height_px), image.data).save(path)
        yield path


def _floats(array: Any) -> Any:
    """An MLX array as float32 in numpy."""
    import mlx.core as mx
    import numpy as np

    return np.array(array.astype(mx.float32))
