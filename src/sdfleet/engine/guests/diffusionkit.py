"""DiffusionKit's Stable Diffusion 3, kept in memory and watched while it draws.

Written against DiffusionKit 0.5.2, its last release (December 2024), on an MLX of today. What is between: modules of
argmaxtools that it imports for a benchmark, and which would bring PyTorch, coremltools and wandb; the old names of
MLX's memory functions; loaders that know its own repositories only; a sampler that tells nobody how far it is.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sdfleet.domain import Drawing, Picture, TokenCount
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.guests import diffusionkit_weights as weights
from sdfleet.engine.guests import mlx_device
from sdfleet.engine.guests.fitting import Fit, fit, plain_prompt
from sdfleet.engine.guests.guest import GuestEngine, Memory, Model, Sitting, check_options
from sdfleet.errors import UnsupportedByModel

log = logging.getLogger(__name__)

# As DiffusionKit's own command draws with these models.
_SHIFT = 3.0
_T5_WINDOW = 512
_CLIP_WINDOW = 77
# What its text conditioning is padded to, whatever the checkpoint says.
_CONTEXT_WIDTH = 4096
_PX_PER_LATENT = 8
_SEEDS_OF_NUMPY = 2**32


def open_engine(options: EngineOptions) -> GuestEngine:
    """The engine that `engine/child.py` runs in DiffusionKit's virtual environment."""
    return GuestEngine(partial(DiffusionKit, options), options)


class DiffusionKit:
    """See `Guest`."""

    def __init__(self, options: EngineOptions) -> None:
        check_options(options, "DiffusionKit", dtypes=("auto", "float16", "float32"), formats=("auto",))
        self.device = mlx_device.open_device(options)
        stand_in()
        from diffusionkit.mlx import DiffusionKitInferenceContext

        self.title = f"DiffusionKit {version('diffusionkit')}, mlx {version('mlx')}"
        system = DiffusionKitInferenceContext().os_spec()
        if system:
            self.title += f", {system['os_type']} {system['os_version']}"
        self._is_half = options.dtype != "float32"

    def fit(self, drawing: Drawing) -> Fit:
        return fit("diffusionkit", Path(drawing.checkpoint))

    def load(self, drawing: Drawing, fitted: Fit) -> Model:
        del fitted
        return _Painter(Path(drawing.checkpoint), is_half=self._is_half)

    def memory(self) -> Memory:
        return mlx_device.memory()

    def release(self) -> None:
        mlx_device.release()

    def is_out_of_memory(self, exc: BaseException) -> bool:
        return mlx_device.is_out_of_memory(exc)


# ------------------------------------------------------------ what DiffusionKit finds around itself


def stand_in() -> None:
    """Put what DiffusionKit expects where it looks: in this process only, no file of anybody's is changed."""
    _module("argmaxtools")
    _module("argmaxtools.utils", get_logger=_logger)
    _module("argmaxtools.test_utils", AppleSiliconContextMixin=AppleSiliconContext, InferenceContextSpec=object)
    import diffusionkit  # noqa: F401 - so that the next line is its submodule

    _module("diffusionkit.utils", bytes2gigabytes=lambda n_bytes: n_bytes / 2**30)
    import mlx.core as mx

    metal: Any = mx.metal
    for name in ("get_peak_memory", "get_active_memory", "reset_peak_memory", "set_memory_limit"):
        setattr(metal, name, getattr(mx, name))
    metal.device_info = _device_info


class AppleSiliconContext:
    """In place of argmaxtools' class of that name, as far as DiffusionKit asks it."""

    def os_spec(self) -> Mapping[str, str]:
        """What `sw_vers` says; nothing where there is none."""
        try:
            said = subprocess.run(["sw_vers"], capture_output=True, text=True, check=True, timeout=10).stdout  # noqa: S607
        except (OSError, subprocess.SubprocessError):
            return {}
        return parse_sw_vers(said)

    def device_spec(self) -> Mapping[str, str]:
        """Nothing: DiffusionKit only prints it."""
        return {}


def parse_sw_vers(text: str) -> Mapping[str, str]:
    """The three facts in the output of `sw_vers`, by their names and not by their places.

    macOS 26 has a line more, ProductVersionExtra, after which argmaxtools 0.1.23 finds four facts and wants three.

    >>> extra = "ProductVersionExtra:\\t(a)\\n"
    >>> parse_sw_vers(f"ProductName:\\t\\tmacOS\\nProductVersion:\\t\\t26.0.1\\n{extra}BuildVersion:\\t\\t25A362\\n")
    {'os_type': 'macOS', 'os_version': '26.0.1', 'os_build_number': '25A362'}
    """
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    names = {"os_type": "ProductName", "os_version": "ProductVersion", "os_build_number": "BuildVersion"}
    return {ours: said.get(theirs, "") for ours, theirs in names.items()}


def _module(name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


def _logger(name: str, level: int = logging.INFO) -> logging.Logger:
    del level
    return logging.getLogger(name)


def _device_info() -> Mapping[str, Any]:
    import mlx.core as mx
    import psutil

    return {"memory_size": psutil.virtual_memory().total, **mx.device_info()}


# ------------------------------------------------------------ one model


class _Painter:
    """One checkpoint in DiffusionKit's pipeline."""

    def __init__(self, folder: Path, *, is_half: bool) -> None:
        self._pipeline = _loaded(folder, is_half=is_half)
        self._preview_map: Any = None
        self.dtype = "float16" if is_half else "float32"

    def read(self, drawing: Drawing) -> tuple[tuple[TokenCount, ...], tuple[str, ...]]:
        pipeline = self._pipeline
        tokenizers = {"clip_l": pipeline.tokenizer_l, "clip_g": pipeline.tokenizer_g}
        if pipeline.use_t5:
            tokenizers["t5"] = pipeline.t5_tokenizer
        counts, unread = [], []
        for what, text in (("prompt", drawing.prompt), ("negative prompt", drawing.negative_prompt)):
            for name, tokenizer in tokenizers.items():
                n_tokens, window = tokenizer.count(plain_prompt(text)), tokenizer.max_length
                if n_tokens > window:
                    unread.append(
                        f"DiffusionKit's text encoder {name} read {window} of the {what}'s {n_tokens} tokens, "
                        "not the others"
                    )
                if what == "prompt":
                    read = min(n_tokens, window)
                    counts.append(TokenCount(encoder=name, n_tokens=read, window=window, n_chunks=1))
        return tuple(counts), tuple(unread)

    def draw(self, drawing: Drawing, seed: int, sitting: Sitting) -> Picture:
        import diffusionkit.mlx as theirs

        with _image_file(drawing) as path, _sampling_with(theirs, _sampler(sitting, self._show)):
            image, _ = self._pipeline.generate_image(
                plain_prompt(drawing.prompt),
                num_steps=drawing.steps,
                # Below 1 it would draw one row with the conditioning of two. At 1 the second has no weight.
                cfg_weight=max(1.0, drawing.guidance),
                negative_text=plain_prompt(drawing.negative_prompt),
                latent_size=(drawing.height_px // _PX_PER_LATENT, drawing.width_px // _PX_PER_LATENT),
                seed=seed,
                verbose=False,
                image_path=None if path is None else str(path),
                denoise=drawing.strength,
            )
        image = image.convert("RGB")
        return Picture(width_px=image.width, height_px=image.height, mode="RGB", data=image.tobytes())

    def _show(self, denoised: Any) -> Picture:
        """A preview of clean latents [1, h, w, c], as the denoiser has them."""
        if self._preview_map is None:
            from sdfleet.engine.guests.mlx_preview import fit_preview

            self._preview_map = fit_preview(self._encoded)
        shown: Picture = self._preview_map.picture(_floats(denoised[0].transpose(2, 0, 1)))
        return shown

    def _encoded(self, picture: Any) -> Any:
        import mlx.core as mx

        hidden = self._pipeline.encoder(mx.array(picture.transpose(0, 2, 3, 1)))
        mean, _ = hidden.split(2, axis=-1)
        return _floats(self._pipeline.latent_format.process_in(mean)[0].transpose(2, 0, 1))


def _sampler(sitting: Sitting, show: Callable[[Any], Picture]) -> Callable[..., tuple[Any, list[float]]]:
    """In place of DiffusionKit's `sample_euler`: the same steps, told one by one, and its caches left clean.

    Without the clean-up a picture that was cancelled would leave a network whose modulations are cut out, and every
    other number of steps would stay in memory for ever.
    """
    import mlx.core as mx

    def sample(model: Any, x: Any, sigmas: Any, extra_args: Any = None) -> tuple[Any, list[float]]:
        pipeline, given = model.model, dict(extra_args or {})
        timesteps = pipeline.sampler.timestep(sigmas).astype(pipeline.activation_dtype)
        n_steps = len(sigmas) - 1
        sitting.enter("denoise")
        try:
            model.cache_modulation_params(given.pop("pooled_conditioning"), timesteps)
            for i in range(n_steps):
                denoised = model(x, timesteps[i], sigmas[i], **given)
                x = denoised + (x - denoised) * (sigmas[i + 1] / sigmas[i])
                mx.eval(x)
                sitting.step(i + 1, n_steps, partial(show, denoised))
        finally:
            model.clear_cache()
            pipeline.mmdit.clear_modulation_params_cache()
        sitting.enter("decode")
        return x, []

    return sample


@contextmanager
def _sampling_with(theirs: Any, sample: Callable[..., Any]) -> Iterator[None]:
    kept = theirs.sample_euler
    theirs.sample_euler = sample
    try:
        yield
    finally:
        theirs.sample_euler = kept


@contextmanager
def _image_file(drawing: Drawing) -> Iterator[Path | None]:
    """The input picture as a file, which is all that DiffusionKit takes."""
    image = drawing.image
    if image is None:
        yield None
        return
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="sdfleet-") as folder:
        path = Path(folder) / "input.png"
        Image.frombytes(image.mode, (image.width_px, image.height_px), image.data).save(path)
        yield path


# ------------------------------------------------------------ loading


class _Tokens:
    """A tokenizer of transformers with the face of DiffusionKit's, whose own fails on what it has no letter for."""

    pad_to_max_length = True

    def __init__(self, tokenizer: Any, *, max_length: int, pad_with_eos: bool) -> None:
        self._tokenizer = tokenizer
        self.max_length = max_length
        self.pad_with_eos = pad_with_eos
        self.eos_token: int = tokenizer.eos_token_id

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        return ids

    def count(self, text: str) -> int:
        """How many tokens the whole text has."""
        return len(self._tokenizer(text)["input_ids"])


def _loaded(folder: Path, *, is_half: bool) -> Any:
    """DiffusionKit's pipeline with everything in it, from this folder."""
    import diffusionkit.mlx as theirs
    import mlx.core as mx
    import transformers

    class Pipeline(theirs.DiffusionPipeline):  # type: ignore[misc]  # untyped
        """With its loaders made idle: everything is put in from outside, and stays."""

        modulation: Any = None

        def check_and_load_models(self) -> None:
            pass

        def set_up_t5(self) -> None:
            pass

        def load_mmdit(self, only_modulation_dict: bool = False) -> Any:  # noqa: FBT001, FBT002 - its signature
            del only_modulation_dict
            return self.modulation

        def get_noise(self, seed: int, x_T: Any) -> Any:  # noqa: N803 - its signature
            return _noise(seed, x_T)

    kind = "argmaxinc/mlx-stable-diffusion-3-medium"
    pipeline = Pipeline(w16=is_half, a16=is_half, shift=_SHIFT, model_version=kind, low_memory_mode=False)
    dtype = mx.float16 if is_half else mx.float32
    _put_denoiser(pipeline, folder / "transformer", dtype)
    _put_vae(pipeline, folder / "vae", dtype)
    for name, part in (("l", "text_encoder"), ("g", "text_encoder_2")):
        setattr(pipeline, f"clip_{name}", _clip(folder / part, dtype))
        tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder / part.replace("text_encoder", "tokenizer")))
        tokens = _Tokens(tokenizer, max_length=_CLIP_WINDOW, pad_with_eos=name == "l")
        setattr(pipeline, f"tokenizer_{name}", tokens)
    pipeline.use_t5 = (folder / "text_encoder_3").is_dir()
    if pipeline.use_t5:
        pipeline.t5_encoder = _t5(folder / "text_encoder_3", dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder / "tokenizer_3"))
        pipeline.t5_tokenizer = _Tokens(tokenizer, max_length=_T5_WINDOW, pad_with_eos=False)
    pipeline.ensure_models_are_loaded()
    return pipeline


def _put_denoiser(pipeline: Any, folder: Path, dtype: Any) -> None:
    import mlx.core as mx
    from diffusionkit.mlx.config import SD3_2b, SD3_8b
    from diffusionkit.mlx.mmdit import MMDiT
    from mlx.utils import tree_flatten

    config = _config(folder)
    if config["joint_attention_dim"] != _CONTEXT_WIDTH:
        raise UnsupportedByModel(f"DiffusionKit knows text conditioning of width {_CONTEXT_WIDTH} only")
    n_blocks = config["num_layers"]
    has_norm = config.get("qk_norm") is not None
    published = SD3_8b if has_norm else SD3_2b
    made = MMDiT(
        replace(
            published,
            num_heads=config["num_attention_heads"],
            depth_multimodal=n_blocks,
            hidden_size_override=config["num_attention_heads"] * config["attention_head_dim"],
            max_latent_resolution=config["pos_embed_max_size"],
            pooled_text_embed_dim=config["pooled_projection_dim"],
            use_qk_norm=has_norm,
            dtype=published.dtype if dtype == mx.float16 else mx.float32,
            low_memory_mode=False,
        )
    )
    arrays = weights.denoiser(weights.read(folder), n_blocks=n_blocks)
    for block in made.multimodal_transformer_blocks:
        for part in (block.image_transformer_block, block.text_transformer_block):
            # DiffusionKit leaves these out; where keys are normalised (3.5 large) they count.
            part.attn.k_proj.bias = mx.zeros((part.attn.k_proj.weight.shape[0],))
    made.load_weights([(name, array.astype(dtype)) for name, array in arrays.items()])
    pipeline.mmdit = made
    # Its sampler folds these into each picture's steps and asks for them back.
    pipeline.modulation = [(name, array) for name, array in tree_flatten(made.parameters()) if "adaLN" in name]


def _put_vae(pipeline: Any, folder: Path, dtype: Any) -> None:
    import mlx.core as mx
    from diffusionkit.mlx.vae import VAEDecoder, VAEEncoder

    config, arrays = _config(folder), weights.read(folder)
    widths, n_layers, groups = config["block_out_channels"], config["layers_per_block"], config["norm_num_groups"]
    channels: int = config["latent_channels"]
    sizes = {"block_out_channels": widths, "resnet_groups": groups}
    pipeline.decoder = VAEDecoder(in_channels=channels, out_channels=3, layers_per_block=n_layers + 1, **sizes)
    pipeline.encoder = VAEEncoder(in_channels=3, out_channels=2 * channels, layers_per_block=n_layers, **sizes)
    for part, kept_in in (("decoder", dtype), ("encoder", mx.float32)):
        named = weights.vae(arrays, part, n_levels=len(widths))
        getattr(pipeline, part).load_weights([(name, array.astype(kept_in)) for name, array in named.items()])


def _clip(folder: Path, dtype: Any) -> Any:
    from diffusionkit.mlx.clip import CLIPTextModel
    from diffusionkit.mlx.config import CLIPTextModelConfig
    from diffusionkit.mlx.model_io import map_clip_text_encoder_weights

    config = _config(folder)
    made = CLIPTextModel(
        CLIPTextModelConfig(
            num_layers=config["num_hidden_layers"],
            model_dims=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            max_length=config["max_position_embeddings"],
            vocab_size=config["vocab_size"],
            projection_dim=config["projection_dim"],  # both of SD3's have one
            hidden_act=config.get("hidden_act", "quick_gelu"),
        )
    )
    named = dict(
        pair
        for name, array in weights.read(folder).items()
        if not name.endswith("position_ids")
        for pair in map_clip_text_encoder_weights(name, array.astype(dtype))
    )
    made.load_weights(list(named.items()))
    return made


def _t5(folder: Path, dtype: Any) -> Any:
    from diffusionkit.mlx.model_io import t5_encoder_state_dict_adjustments
    from diffusionkit.mlx.t5 import SD3T5Encoder
    from mlx.utils import tree_unflatten
    from transformers import T5Config

    made = SD3T5Encoder(T5Config.from_pretrained(str(folder)), low_memory_mode=False)
    named = t5_encoder_state_dict_adjustments(weights.t5(weights.read(folder)))
    made.update(tree_unflatten([(name, array.astype(dtype)) for name, array in named.items()]))
    return made


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def _noise(seed: int, latents: Any) -> Any:
    """DiffusionKit's own draw, [n, h, w, c], which numpy seeds with 32 bits; longer seeds are taken in two halves."""
    import mlx.core as mx
    import numpy as np

    n, height, width, channels = latents.shape
    key: Any = seed if seed < _SEEDS_OF_NUMPY else [seed % _SEEDS_OF_NUMPY, seed // _SEEDS_OF_NUMPY]
    drawn = np.random.RandomState(key).randn(n, channels, height, width).astype(np.float32)
    return mx.array(drawn.transpose(0, 2, 3, 1))


def _floats(array: Any) -> Any:
    """An MLX array as float32 in numpy."""
    import mlx.core as mx
    import numpy as np

    return np.array(array.astype(mx.float32))
