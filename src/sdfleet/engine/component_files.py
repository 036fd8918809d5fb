"""One component's files in a checkpoint folder, and the networks that are filled from them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdfleet.catalog.headers import Header, read_header, read_json
from sdfleet.catalog.single_file.gguf_header import is_gguf
from sdfleet.catalog.single_file.origins import header_within, read_origin
from sdfleet.engine import random_weights
from sdfleet.engine.networks.autoencoder import with_present_names
from sdfleet.engine.prequantised import KEY, put_in
from sdfleet.engine.single_file import pack_into, read_component
from sdfleet.engine.weight_files import fill, read_weights
from sdfleet.errors import BrokenCheckpoint

log = logging.getLogger(__name__)

# What the files of diffusers' own classes are called.
DIFFUSERS_STEM = "diffusion_pytorch_model"


class ComponentFiles:
    """Where the weights of one component lie: in its own folder, in another one, or in a file with a whole checkpoint.

    folder: the component's, in the checkpoint. dtype: of the numbers once loaded. kind: the device they are read into;
    "meta" gives the network without numbers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = folder.name

    @property
    def single(self) -> Path | None:
        """The file with a whole checkpoint that it is in, if it was imported from one."""
        origin = read_origin(self._folder)
        return None if origin is None or origin.n_file_bytes is None else origin.path

    @property
    def is_packed(self) -> bool:
        """Whether its weights stay in GGUF's blocks while it is used."""
        single = self.single
        return single is not None and is_gguf(single)

    def headers(self) -> list[Header]:
        """Names, shapes and formats of its tensors."""
        single = self.single
        return [read_header(f) for f in self._plain()] if single is None else [header_within(single, self._name)]

    def own(self, build: Callable[[], nn.Module], *, dtype: torch.dtype, kind: str) -> nn.Module:
        """Our network with its weights, not yet arranged. Raises BrokenCheckpoint for what does not fit it."""
        module = build()
        single = self.single
        if single is None:
            weights = read_weights(self._folder, dtype=dtype, device=kind, stem=DIFFUSERS_STEM)
        else:
            read = read_component(single, self._name, dtype=dtype, device=kind, packs=True)
            weights = pack_into(module, read, dtype=dtype)
        if self._name == "vae":
            weights = with_present_names(weights)
        # Leftovers of training lie in some files, and diffusers passes over them too; what is missing is an error.
        if unknown := sorted(weights.keys() - module.state_dict().keys()):
            log.warning("weights of no use to the network", extra={"folder": str(self._folder), "names": unknown[:3]})
        fill(module, {key: tensor for key, tensor in weights.items() if key not in unknown}, folder=self._folder)
        return module.eval().requires_grad_(requires_grad=False)

    def diffusers(self, class_name: str, *, dtype: torch.dtype, kind: str, is_quantised: bool = False) -> Any:
        """Diffusers' network with its weights; is_quantised: they were saved in few bits, and stay so."""
        import diffusers

        cls = getattr(diffusers, class_name)
        if (single := self.single) is not None:
            return self._within(single, cls, dtype=dtype, kind=kind)
        folder, files = self._weights_folder(), self._plain()
        if not files:
            raise BrokenCheckpoint(f"{folder} holds no safetensors file", hint="copy or download the folder again")
        if is_quantised:
            return self._quantised(cls, dtype=dtype, kind=kind)
        if kind == "meta" or random_weights.is_random(files[0]):
            drawn = random_weights.module_of(cls, self._config(), files, dtype=dtype, device=torch.device(kind))
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

    def _quantised(self, cls: Any, *, dtype: torch.dtype, kind: str) -> Any:
        with torch.device("meta"):
            module = cls.from_config({key: value for key, value in self._config().items() if key != KEY})
        weights = read_weights(self._folder, dtype=dtype, device=kind, stem=DIFFUSERS_STEM)
        fill(module, put_in(module, weights, dtype=dtype, where=str(self._folder)), folder=self._folder)
        return module.eval().requires_grad_(requires_grad=False)

    def _within(self, file: Path, cls: Any, *, dtype: torch.dtype, kind: str) -> Any:
        with torch.device("meta"):
            module = cls.from_config(self._config())
        weights = read_component(file, self._name, dtype=dtype, device=kind, packs=True)
        fill(module, pack_into(module, weights, dtype=dtype), folder=self._folder)
        left = [buffer for buffer, tensor in module.named_buffers() if tensor.is_meta and kind != "meta"]
        if left:
            raise BrokenCheckpoint(f"{file} has no {', '.join(left[:3])}", hint="get it in the diffusers layout")
        return module.eval().requires_grad_(requires_grad=False)

    def _config(self) -> dict[str, Any]:
        return read_json(self._folder / "config.json")

    def _weights_folder(self) -> Path:
        origin = read_origin(self._folder)
        return self._folder if origin is None else origin.path

    def _plain(self) -> list[Path]:
        """The safetensors files to read: the plain ones, or those of the only variant there is (such as fp16)."""
        files = sorted(self._weights_folder().glob("*.safetensors"))
        plain = [f for f in files if _variant(f) is None]
        return plain or files


def _variant(file: Path) -> str | None:
    """`fp16` of `model.fp16.safetensors` or `model.fp16-00001-of-00002.safetensors`; None for a plain file."""
    parts = file.name.removesuffix(".safetensors").split(".")
    return parts[1].split("-")[0] if len(parts) > 1 else None
