"""The parts of one checkpoint folder: loaded when first used, strictly, in the device's format; put away on request.

The folder is the ordinary diffusers layout: model_index.json, and a sub-folder for each component. Only safetensors
are read; nothing here opens a pickle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from safetensors import SafetensorError

from sdfleet.catalog.headers import read_json
from sdfleet.engine.by_layer import ByLayer, from_file, from_host, n_bytes_held
from sdfleet.engine.component_files import DIFFUSERS_STEM, ComponentFiles
from sdfleet.engine.devices import Device
from sdfleet.engine.events import WeightFormat
from sdfleet.engine.memory import Weights
from sdfleet.engine.networks.choice import own_network
from sdfleet.engine.networks.tokenizer import ClipTokenizer
from sdfleet.engine.openvino_denoiser import OpenVinoDenoiser
from sdfleet.engine.prepacked import arrange, is_packed_when_arranged
from sdfleet.engine.prequantised import bytes_as_saved, format_of
from sdfleet.engine.quantised import keep_in, n_bytes_saved
from sdfleet.engine.safety import load_safety_checker
from sdfleet.engine.single_file import loaded_bytes, unpacked_shapes
from sdfleet.engine.text_weights import load_clip_text_encoder, load_qwen3, load_t5_encoder
from sdfleet.engine.weight_files import WeightSource
from sdfleet.errors import BrokenCheckpoint, CheckpointNotFound, UnsupportedByModel

log = logging.getLogger(__name__)

ComponentName = Literal[
    "tokenizer", "tokenizer_2", "tokenizer_3",
    "text_encoder", "text_encoder_2", "text_encoder_3",
    "unet", "transformer", "vae", "tiny_vae", "safety_checker",
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
# The class that reads a tokenizer's folder, by the one that it was saved with.
_TRANSFORMERS_TOKENIZERS = {
    "T5Tokenizer": "T5TokenizerFast",
    "T5TokenizerFast": "T5TokenizerFast",
    "Qwen2Tokenizer": "Qwen2Tokenizer",
    "Qwen2TokenizerFast": "Qwen2Tokenizer",
}
# Text encoders that weigh as much as a denoiser; CLIP is small, and the VAE is what a picture's look hangs on.
_LARGE_ENCODERS = frozenset(("T5EncoderModel", "Qwen3Model", "Qwen3ForCausalLM"))


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
        # Networks whose blocks come one by one; empty until that is asked for.
        self._comes_by_layer: tuple[ComponentName, ...] = ()
        self._bringers: dict[ComponentName, ByLayer] = {}
        self._coming_bytes: dict[ComponentName, int] = {}
        self._formats: dict[ComponentName, WeightFormat | None] = {}
        # torch's modules of components that something else stands for, and which of them are used now, see `in_torch`.
        self._beside: dict[ComponentName, Any] = {}
        self._in_torch: set[ComponentName] = set()

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
        if name == "safety_checker" and not _has_weights(self._folder / name):
            # Named by many an index whose folder was not copied along, or holds a pickle alone.
            return None
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
        if name in self._in_torch:
            if name not in self._beside:
                self._beside[name] = self.load(name)
            return self._beside[name]
        if name in self._here:
            return self._here[name]
        if name in self._aside:
            module = self._aside.pop(name)
            # Where blocks come one by one, they are no part of the move.
            self._bringers.get(name, module).to(self._device.torch_device)
        elif name in self._comes_by_layer:
            module = self._load_by_layer(name)
        else:
            module = self._servers.get(name, lambda: self.load(name))()
        self._here[name] = module
        return module

    def held(self, name: ComponentName) -> Any:
        """What `use` gives, if it is on the device already; else None."""
        return (self._beside if name in self._in_torch else self._here).get(name)

    def is_served(self, name: ComponentName) -> bool:
        """Whether something else than the checkpoint's own module stands for a component, see `serve`."""
        return name in self._servers

    def in_torch(self, name: ComponentName, *, is_wanted: bool) -> Any:
        """The component as torch's module, which `use` gives from now on, beside what stands for it; None if unwanted.

        LoRAs can be put on torch's modules alone.
        """
        if not is_wanted:
            self._in_torch.discard(name)
            return None
        if name in self._servers:
            self._in_torch.add(name)
        return self.use(name)

    def drop_beside(self) -> bool:
        """Let the modules that `in_torch` loaded leave; whether there were any."""
        had = bool(self._beside)
        self._beside.clear()
        self._in_torch.clear()
        return had

    def serve(self, name: ComponentName, load: Callable[[], Any] | None, *, now: Any = None) -> None:
        """From now on what `load` gives stands for a component; None: the module of the checkpoint again.

        now: the first of them, if it is there already. What stood for it so far leaves.
        """
        if load is None:
            self._servers.pop(name, None)
        else:
            self._servers[name] = load
        for modules in (self._here, self._aside, self._beside):
            modules.pop(name, None)
        self._in_torch.discard(name)
        if now is not None:
            self._here[name] = now

    def put_away(self, names: Iterable[ComponentName]) -> int:
        """Take components off the device; how many were there. Tokenizers stay: they weigh nothing."""
        n_moved = 0
        for name in names:
            n_moved += self._beside.pop(name, None) is not None
            module = self._here.pop(name, None)
            if module is None:
                continue
            n_moved += 1
            if self._device.kind == "cpu":
                self._release(name)
            else:
                self._bringers.get(name, module).to(torch.device("cpu"))
                self._aside[name] = module
        if n_moved:
            self._device.release_cached()
        return n_moved

    def close(self) -> None:
        """Forget every module, on the device and aside."""
        self._here.clear()
        self._aside.clear()
        for name in tuple(self._bringers):
            self._release(name)
        self.drop_beside()
        self._device.release_cached()

    @property
    def can_come_by_layer(self) -> bool:
        """Whether there is a network whose blocks could be brought in one by one."""
        return any(self._can_come_by_layer(name) for name in (*TEXT_ENCODERS, *DENOISERS))

    def bring_by_layer(self) -> None:
        """From now on large networks come block by block; they leave until they are used."""
        names = tuple(name for name in (*TEXT_ENCODERS, *DENOISERS) if self._can_come_by_layer(name))
        for name in names:
            # What is converted is whole, so the checkpoint's own network draws again.
            self.serve(name, None)
        self.drop_beside()
        self._comes_by_layer = names
        self._device.release_cached()

    def weights(
        self,
        *,
        text_encoders: Collection[ComponentName] = TEXT_ENCODERS,
        has_checker: bool = True,
        by_layer: bool = False,
    ) -> Weights:
        """Bytes the components will take on the device, from the files' headers alone; nothing is loaded.

        has_checker: a safety checker that is here is counted with the VAE, beside which it is used.
        by_layer: also what is held when blocks come one by one; that takes a second, for networks without numbers.
        """
        text = sum(self._loaded_bytes(name, self._device.dtype) for name in text_encoders if self.has(name))
        denoiser = sum(self._loaded_bytes(name, self._device.dtype) for name in DENOISERS if self.has(name))
        vae = self._loaded_bytes("vae", self._device.vae_dtype)
        if has_checker and self.has("safety_checker"):
            vae += self._loaded_bytes("safety_checker", self._device.dtype)
        if not by_layer:
            return Weights(text=text, denoiser=denoiser, vae=vae)
        held = {
            name: self._bytes_by_layer(name)
            for name in (*text_encoders, *DENOISERS)
            if self.has(name) and self._can_come_by_layer(name)
        }
        text_by_layer, denoiser_by_layer = (
            sum(held.get(name) or self._loaded_bytes(name, self._device.dtype) for name in names if self.has(name))
            if held.keys() & set(names)
            else None
            for names in (tuple(text_encoders), DENOISERS)
        )
        return Weights(
            text=text, denoiser=denoiser, vae=vae, text_by_layer=text_by_layer, denoiser_by_layer=denoiser_by_layer
        )

    def resident_bytes(self) -> int:
        """Bytes of weights on the device now."""
        modules = [m for m in (*self._here.values(), *self._beside.values()) if isinstance(m, torch.nn.Module)]
        n_bytes = sum(p.numel() * p.element_size() for module in modules for p in module.parameters() if not p.is_meta)
        return n_bytes + sum(m.resident_bytes for m in self._here.values() if isinstance(m, OpenVinoDenoiser))

    def coming_bytes(self) -> int:
        """Bytes beside `resident_bytes` that the denoiser takes while it is called, if its blocks come one by one."""
        return sum(self._coming_bytes.get(name, 0) for name in DENOISERS)

    def _release(self, name: ComponentName) -> None:
        if (bringer := self._bringers.pop(name, None)) is not None:
            bringer.release()

    def _loaded_bytes(self, name: ComponentName, dtype: torch.dtype) -> int:
        headers = self._files(name).headers()
        n_bytes = sum(loaded_bytes(header, dtype) for header in headers)
        if self._saved_in(name) is not None:
            return sum(bytes_as_saved(header, dtype) for header in headers)
        if (kept_in := self.kept_in(name)) is not None:
            n_bytes -= sum(n_bytes_saved(unpacked_shapes(header), kept_in, dtype) for header in headers)
        return n_bytes

    def _can_come_by_layer(self, name: ComponentName) -> bool:
        """Whether it is a network that weighs something, is no GGUF file, and is not packed for speed."""
        class_name = self.class_name(name)
        is_small = self.is_packed(name) or self._saved_in(name) is not None
        if class_name is None or is_small or not (name in DENOISERS or class_name in _LARGE_ENCODERS):
            return False
        is_arranged = self._is_arranged(name, class_name)
        return not (is_arranged and is_packed_when_arranged(self._loaded_bytes(name, self._device.dtype)))

    def _is_arranged(self, name: ComponentName, class_name: str) -> bool:
        is_ours = class_name in _DIFFUSERS_CLASSES and own_network(class_name, self.config(name)) is not None
        in_bfloat16 = self._device.kind == "cpu" and self._device.dtype == torch.bfloat16
        return is_ours and in_bfloat16 and self.kept_in(name) is None

    def _bytes_by_layer(self, name: ComponentName) -> int:
        """Bytes of what lies outside of the blocks and of the largest blocks."""
        return n_bytes_held(self._on_meta(name))

    def _on_meta(self, name: ComponentName) -> torch.nn.Module:
        class_name = self.class_name(name)
        assert class_name is not None
        network: torch.nn.Module = self._loader(name, class_name, kind="meta")()
        return network

    def _load_by_layer(self, name: ComponentName) -> Any:
        """The component with nothing but what lies outside of its blocks on the device, and what brings the blocks."""
        class_name = self.class_name(name)
        assert class_name is not None
        kept_in, device = self.kept_in(name), self._device.torch_device
        with self._faults_told(name):
            fits_host = self._loaded_bytes(name, self._device.dtype) < psutil.virtual_memory().available
            if device.type == "cuda" and fits_host:
                network = self._loader(name, class_name, kind="cpu")()
                network = network if kept_in is None else keep_in(kept_in, network)
                bringer = from_host(network, device=device)
            else:
                network = self._on_meta(name)
                stem = DIFFUSERS_STEM if class_name in _DIFFUSERS_CLASSES else "model"
                read = WeightSource(self._folder / name, dtype=self._device.dtype, stem=stem).read
                is_arranged = self._is_arranged(name, class_name)
                bringer = from_file(network, read, device=device, kept_in=kept_in, is_arranged=is_arranged)
            self._bringers[name], self._coming_bytes[name] = bringer, bringer.n_bytes_coming
            return network

    def _saved_in(self, name: ComponentName) -> WeightFormat | None:
        """What a checkpoint's own weights come in; None: plain numbers, or GGUF's blocks."""
        if name not in self._formats:
            folder = self._folder / name
            may_be = (folder / "config.json").is_file() and (name in DENOISERS or name in TEXT_ENCODERS)
            self._formats[name] = format_of(read_json(folder / "config.json"), where=str(folder)) if may_be else None
        return self._formats[name]

    def told_of_formats(self) -> list[str]:
        """What is kept in other formats than the one that is computed in, in words for people."""
        denoiser = next((self.kept_in(name) for name in DENOISERS if self.has(name)), None)
        large = [name for name in TEXT_ENCODERS if self.class_name(name) in _LARGE_ENCODERS]
        text = self.kept_in(large[0]) if large else denoiser
        told = [f"weights in {denoiser}"] if denoiser is not None else []
        return told if text in {None, denoiser} else [*told, f"text encoders in {text}"]

    def is_packed(self, name: ComponentName) -> bool:
        """Whether its weights stay in GGUF's blocks while it is used."""
        return self._files(name).is_packed

    def _files(self, name: ComponentName) -> ComponentFiles:
        return ComponentFiles(self._folder / name)

    def kept_in(self, name: ComponentName) -> WeightFormat | None:
        """What its weights are kept in after a load, see quantised.py; None: in the format of computing."""
        if (saved_in := self._saved_in(name)) is not None:
            return saved_in
        if name in DENOISERS:
            return self._device.weights
        return self._device.text_weights if self.class_name(name) in _LARGE_ENCODERS else None

    def load(self, name: ComponentName) -> Any:
        """The checkpoint's own module, read anew and kept nowhere. Raises BrokenCheckpoint."""
        class_name = self.class_name(name)
        if class_name is None:
            raise UnsupportedByModel(f"the checkpoint at {self._folder} has no {name}")
        # What will be made smaller is read into the host's memory, so that the whole of it never is on a card.
        kept_in = self.kept_in(name) if self._saved_in(name) is None else None
        load = self._loader(name, class_name, kind=self._device.kind if kept_in is None else "cpu")
        with self._faults_told(name):
            return load() if kept_in is None else keep_in(kept_in, load()).to(self._device.torch_device)

    @contextmanager
    def _faults_told(self, name: ComponentName) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError, KeyError) as exc:
            first_line = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
            raise BrokenCheckpoint(
                f"{self._folder / name} cannot be loaded: {first_line[:300]}", hint="copy or download the folder again"
            ) from exc

    def _loader(self, name: ComponentName, class_name: str, *, kind: str) -> Callable[[], Any]:
        folder, dtype, files = self._folder / name, self._device.dtype, self._files(name)
        if class_name in {"CLIPTokenizer", "CLIPTokenizerFast"}:
            return lambda: ClipTokenizer.read(folder) or _transformers_tokenizer("CLIPTokenizer", folder)
        if class_name in _TRANSFORMERS_TOKENIZERS:
            return lambda: _transformers_tokenizer(_TRANSFORMERS_TOKENIZERS[class_name], folder)
        if class_name in {"CLIPTextModel", "CLIPTextModelWithProjection"}:
            projected = class_name == "CLIPTextModelWithProjection"
            return lambda: load_clip_text_encoder(folder, dtype=dtype, with_projection=projected, device=kind)
        if class_name == "T5EncoderModel":
            return lambda: load_t5_encoder(folder, dtype=dtype, device=self._device.kind, read_into=kind)
        if class_name in {"Qwen3Model", "Qwen3ForCausalLM"}:
            return lambda: load_qwen3(folder, dtype=dtype, device=self._device.kind, read_into=kind)
        if class_name == "StableDiffusionSafetyChecker":
            return lambda: load_safety_checker(folder, dtype=dtype, device=self._device.kind)
        if class_name in _DIFFUSERS_CLASSES:
            ours = own_network(class_name, self.config(name)) if self._saved_in(name) is None else None
            if ours is None:
                is_quantised, dtype = self._saved_in(name) is not None, self._dtype_of(name)
                return lambda: files.diffusers(class_name, dtype=dtype, kind=kind, is_quantised=is_quantised)
            return lambda: self._load_own(name, ours, kind=kind)
        raise UnsupportedByModel(
            f"the {name} of {self._folder} is a {class_name}, which is not served",
            hint=f"served are: {', '.join(sorted(_DIFFUSERS_CLASSES))} with CLIP, T5 and Qwen3 text encoders",
        )

    def _dtype_of(self, name: ComponentName) -> torch.dtype:
        return self._device.vae_dtype if name in {"vae", "tiny_vae"} else self._device.dtype

    def _load_own(self, name: ComponentName, build: Callable[[], torch.nn.Module], *, kind: str) -> torch.nn.Module:
        module = self._files(name).own(build, dtype=self._dtype_of(name), kind=kind)
        # What was read has gone with that call, or `arrange` would hold every kernel twice until it ends: 1.2 GB more
        # for SD 1.5's UNet, seen 2026-11-21.
        return arrange(module) if self.kept_in(name) is None and kind == self._device.kind else module


def _has_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _transformers_tokenizer(class_name: str, folder: Path) -> Any:
    import transformers

    return getattr(transformers, class_name).from_pretrained(str(folder), local_files_only=True)
