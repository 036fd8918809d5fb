"""The parts of one checkpoint folder: loaded when first used, strictly, in the device's format; put away on request.

The folder is the ordinary diffusers layout: model_index.json, and a sub-folder for each component. Only safetensors
are read; nothing here opens a pickle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from sdfleet.catalog.headers import read_header, read_json
from sdfleet.catalog.single_file.gguf_header import is_gguf
from sdfleet.catalog.single_file.origins import header_within, read_origin
from sdfleet.engine import random_weights
from sdfleet.engine.devices import Device
from sdfleet.engine.fp8_weights import keep_in_fp8, n_kept
from sdfleet.engine.memory import Weights
from sdfleet.engine.networks.autoencoder import with_present_names
from sdfleet.engine.networks.choice import own_network
from sdfleet.engine.networks.tokenizer import ClipTokenizer
from sdfleet.engine.openvino_denoiser import OpenVinoDenoiser
from sdfleet.engine.prepacked import arrange
from sdfleet.engine.single_file import loaded_bytes, pack_into, read_component, unpacked_shapes
from sdfleet.engine.text_weights import load_clip_text_encoder, load_qwen3, load_t5_encoder
from sdfleet.engine.weight_files import fill, read_weights
from sdfleet.errors import BrokenCheckpoint, CheckpointNotFound, UnsupportedByModel

log = logging.getLogger(__name__)

ComponentName = Literal[
    "tokenizer", "tokenizer_2", "tokenizer_3",
    "text_encoder", "text_encoder_2", "text_encoder_3",
    "unet", "transformer", "vae", "tiny_vae",
]  # fmt: skip
TEXT_ENCODERS: tuple[ComponentName, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3")
DENOISERS: tuple[ComponentName, ...] = ("unet", "transformer")

_DIFFUSERS_CLASSES = frozenset(
    (
        "UNet2DConditionModel",
        "SD3Transformer2DModel",
        "FluxTransformer2DModel",
        "Flux2Transformer2DModel",
        "ZImageTransformer2DModel",
        "AutoencoderKL",
        "AutoencoderKLFlux2",
        "AutoencoderTiny",
    )
)
_DIFFUSERS_STEM = "diffusion_pytorch_model"
# Whose weights may be kept in 8 bits: denoisers, and text encoders that weigh as much as one.
_IN_FP8 = frozenset(
    (
        "UNet2DConditionModel",
        "SD3Transformer2DModel",
        "FluxTransformer2DModel",
        "Flux2Transformer2DModel",
        "ZImageTransformer2DModel",
        "T5EncoderModel",
        "Qwen3Model",
        "Qwen3ForCausalLM",
    )
)


class Components:
    """Lends out the modules of one folder. What is not on the device is loaded, or moved back, when asked for."""

    def __init__(self, folder: Path, device: Device) -> None:
        self._folder = folder
        self._device = device
        if not (folder / "model_index.json").is_file():
            raise CheckpointNotFound(
                f"there is no model_index.json in {folder}", hint="the path must be a diffusers checkpoint folder"
            )
        self._index = read_json(folder / "model_index.json")
        self._here: dict[ComponentName, Any] = {}
        # On a card, put-away modules wait in host memory; on a CPU there is nowhere to move them, so they are dropped.
        self._aside: dict[ComponentName, Any] = {}
        self._servers: dict[ComponentName, Callable[[], Any]] = {}

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies."""
        return self._folder

    @property
    def pipeline_class(self) -> str:
        """The diffusers pipeline that the checkpoint was saved for; empty where it does not say."""
        return str(self._index.get("_class_name", ""))

    def class_name(self, name: ComponentName) -> str | None:
        """The class a component says it is; None when the checkpoint has no such component.

        A small decoder for previews is no part of any pipeline: whoever has one puts it into the folder `tiny_vae`.
        """
        if name == "tiny_vae":
            return "AutoencoderTiny" if (self._folder / name / "config.json").is_file() else None
        entry = self._index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            return None
        return str(entry[1])

    def has(self, name: ComponentName) -> bool:
        """Whether the checkpoint comes with this component."""
        return self.class_name(name) is not None

    def flag(self, name: str, *, default: bool) -> bool:
        """A yes/no setting of the checkpoint itself, as its pipeline saved it in model_index.json."""
        value = self._index.get(name, default)
        return value if isinstance(value, bool) else default

    def config(self, name: str, file: str = "config.json") -> dict[str, Any]:
        """A component's settings, read without loading it."""
        return read_json(self._folder / name / file)

    def use(self, name: ComponentName) -> Any:
        """The component, loaded and on the device. Raises BrokenCheckpoint when its files are not usable."""
        if name in self._here:
            return self._here[name]
        if name in self._aside:
            module = self._aside.pop(name).to(self._device.torch_device)
        else:
            module = self._servers.get(name, lambda: self.load(name))()
        self._here[name] = module
        return module

    def serve(self, name: ComponentName, load: Callable[[], Any] | None, *, now: Any = None) -> None:
        """From now on what `load` gives stands for a component; None: the module of the checkpoint again.

        now: the first of them, if it is there already. What stood for it so far leaves.
        """
        if load is None:
            self._servers.pop(name, None)
        else:
            self._servers[name] = load
        self._here.pop(name, None)
        self._aside.pop(name, None)
        if now is not None:
            self._here[name] = now

    def put_away(self, names: Iterable[ComponentName]) -> int:
        """Take components off the device; how many were there. Tokenizers stay: they weigh nothing."""
        n_moved = 0
        for name in names:
            module = self._here.pop(name, None)
            if module is None:
                continue
            n_moved += 1
            if self._device.kind != "cpu":
                self._aside[name] = module.to("cpu")
        if n_moved:
            self._device.release_cached()
        return n_moved

    def close(self) -> None:
        """Forget every module, on the device and aside."""
        self._here.clear()
        self._aside.clear()
        self._device.release_cached()

    def weights(self, *, text_encoders: Iterable[ComponentName] = TEXT_ENCODERS) -> Weights:
        """Bytes the components will take on the device, from the files' headers alone; nothing is loaded."""
        text = sum(self._loaded_bytes(name, self._device.dtype) for name in text_encoders if self.has(name))
        denoiser = sum(self._loaded_bytes(name, self._device.dtype) for name in DENOISERS if self.has(name))
        return Weights(text=text, denoiser=denoiser, vae=self._loaded_bytes("vae", self._device.vae_dtype))

    def resident_bytes(self) -> int:
        """Bytes of weights on the device now."""
        modules = [m for m in self._here.values() if isinstance(m, torch.nn.Module)]
        n_bytes = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
        return n_bytes + sum(m.resident_bytes for m in self._here.values() if isinstance(m, OpenVinoDenoiser))

    def _loaded_bytes(self, name: ComponentName, dtype: torch.dtype) -> int:
        single = self._single_file(name)
        files = self._weight_files(name) if single is None else ()
        headers = [read_header(file) for file in files] if single is None else [header_within(single, name)]
        n_bytes = sum(loaded_bytes(header, dtype) for header in headers)
        if self._is_in_fp8(name):
            n_bytes -= sum(n_kept(unpacked_shapes(header)) for header in headers) * (dtype.itemsize - 1)
        return n_bytes

    def is_packed(self, name: ComponentName) -> bool:
        """Whether its weights stay in GGUF's blocks while it is used."""
        single = self._single_file(name)
        return single is not None and is_gguf(single)

    def _single_file(self, name: ComponentName) -> Path | None:
        """The file with a whole checkpoint that this component is in, if it was imported from one."""
        origin = read_origin(self._folder / name)
        return None if origin is None or origin.n_file_bytes is None else origin.path

    def _weights_folder(self, name: ComponentName) -> Path:
        """Where its files are: in its own folder, or in the one that it was taken from."""
        origin = read_origin(self._folder / name)
        return self._folder / name if origin is None else origin.path

    def _is_in_fp8(self, name: ComponentName) -> bool:
        return self._device.keeps_fp8 and self.class_name(name) in _IN_FP8

    def _weight_files(self, name: ComponentName) -> list[Path]:
        """The safetensors files to read: the plain ones, or those of the only variant there is (such as fp16)."""
        files = sorted(self._weights_folder(name).glob("*.safetensors"))
        plain = [f for f in files if _variant(f) is None]
        return plain or files

    def load(self, name: ComponentName) -> Any:
        """The checkpoint's own module, read anew and kept nowhere. Raises BrokenCheckpoint."""
        class_name = self.class_name(name)
        if class_name is None:
            raise UnsupportedByModel(f"the checkpoint at {self._folder} has no {name}")
        # What will be half as large is read into the host's memory, so that the whole of it never is on a card.
        is_in_fp8 = self._is_in_fp8(name)
        load = self._loader(name, class_name, kind="cpu" if is_in_fp8 else self._device.kind)
        try:
            return keep_in_fp8(load()).to(self._device.torch_device) if is_in_fp8 else load()
        except (SafetensorError, OSError, ValueError, KeyError) as exc:
            first_line = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
            raise BrokenCheckpoint(
                f"{self._folder / name} cannot be loaded: {first_line[:300]}", hint="copy or download the folder again"
            ) from exc

    def _loader(self, name: ComponentName, class_name: str, *, kind: str) -> Callable[[], Any]:
        folder, dtype = self._folder / name, self._device.dtype
        if class_name in {"CLIPTokenizer", "CLIPTokenizerFast"}:
            return lambda: ClipTokenizer.read(folder) or _transformers_tokenizer("CLIPTokenizer", folder)
        if class_name in {"T5Tokenizer", "T5TokenizerFast"}:
            return lambda: _transformers_tokenizer("T5TokenizerFast", folder)
        if class_name in {"CLIPTextModel", "CLIPTextModelWithProjection"}:
            projected = class_name == "CLIPTextModelWithProjection"
            return lambda: load_clip_text_encoder(folder, dtype=dtype, with_projection=projected, device=kind)
        if class_name == "T5EncoderModel":
            return lambda: load_t5_encoder(folder, dtype=dtype, device=kind)
        if class_name in {"Qwen2Tokenizer", "Qwen2TokenizerFast"}:
            return lambda: _transformers_tokenizer("Qwen2Tokenizer", folder)
        if class_name in {"Qwen3Model", "Qwen3ForCausalLM"}:
            return lambda: load_qwen3(folder, dtype=dtype, device=kind)
        if class_name in _DIFFUSERS_CLASSES:
            ours = own_network(class_name, self.config(name))
            if ours is None:
                return lambda: self._load_diffusers(name, class_name, kind=kind)
            return lambda: self._load_own(name, ours, kind=kind)
        raise UnsupportedByModel(
            f"the {name} of {self._folder} is a {class_name}, which is not served",
            hint=f"served are: {', '.join(sorted(_DIFFUSERS_CLASSES))} with CLIP, T5 and Qwen3 text encoders",
        )

    def _load_own(self, name: ComponentName, build: Callable[[], torch.nn.Module], *, kind: str) -> torch.nn.Module:
        folder = self._folder / name
        dtype = self._device.vae_dtype if name == "vae" else self._device.dtype
        module = build()
        single = self._single_file(name)
        if single is None:
            weights = read_weights(folder, dtype=dtype, device=kind, stem=_DIFFUSERS_STEM)
        else:
            weights = pack_into(module, read_component(single, name, dtype=dtype, device=kind, packs=True), dtype=dtype)
        if name == "vae":
            weights = with_present_names(weights)
        # Leftovers of training lie in some files, and diffusers passes over them too; what is missing is an error.
        if unknown := sorted(weights.keys() - module.state_dict().keys()):
            log.warning("weights of no use to the network", extra={"folder": str(folder), "names": unknown[:3]})
        fill(module, {key: tensor for key, tensor in weights.items() if key not in unknown}, folder=folder)
        module.eval().requires_grad_(requires_grad=False)
        return module if self._is_in_fp8(name) else arrange(module)

    def _load_diffusers(self, name: ComponentName, class_name: str, *, kind: str) -> Any:
        import diffusers

        cls = getattr(diffusers, class_name)
        if (single := self._single_file(name)) is not None:
            return self._load_single(name, cls, single, kind=kind)
        folder = self._weights_folder(name)
        files = self._weight_files(name)
        if not files:
            raise BrokenCheckpoint(f"{folder} holds no safetensors file", hint="copy or download the folder again")
        dtype = self._device.vae_dtype if name in {"vae", "tiny_vae"} else self._device.dtype
        if kind == "meta" or random_weights.is_random(files[0]):
            drawn = random_weights.module_of(cls, self.config(name), files, dtype=dtype, device=torch.device(kind))
            return drawn.eval().requires_grad_(requires_grad=False)
        module, found = cls.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            variant=_variant(files[0]),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        # diffusers fills what a file lacks with random numbers and only warns; a picture from those is noise.
        wrong = [*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])]
        if wrong:
            shown = ", ".join(sorted(wrong)[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise BrokenCheckpoint(
                f"{folder} lacks weights that its config asks for: {shown}", hint="copy or download the folder again"
            )
        return module.eval().requires_grad_(requires_grad=False).to(torch.device(kind))

    def _load_single(self, name: ComponentName, cls: Any, file: Path, *, kind: str) -> Any:
        dtype = self._device.vae_dtype if name == "vae" else self._device.dtype
        with torch.device("meta"):
            module = cls.from_config(self.config(name))
        weights = read_component(file, name, dtype=dtype, device=kind, packs=True)
        fill(module, pack_into(module, weights, dtype=dtype), folder=self._folder / name)
        left = [buffer for buffer, tensor in module.named_buffers() if tensor.is_meta and kind != "meta"]
        if left:
            raise BrokenCheckpoint(f"{file} has no {', '.join(left[:3])}", hint="get it in the diffusers layout")
        return module.eval().requires_grad_(requires_grad=False)


def _transformers_tokenizer(class_name: str, folder: Path) -> Any:
    import transformers

    return getattr(transformers, class_name).from_pretrained(str(folder), local_files_only=True)


def _variant(file: Path) -> str | None:
    """`fp16` of `model.fp16.safetensors` or `model.fp16-00001-of-00002.safetensors`; None for a plain file."""
    parts = file.name.removesuffix(".safetensors").split(".")
    return parts[1].split("-")[0] if len(parts) > 1 else None
