"""Weights of one component out of a single file: cut, turned and cast one by one, so that no second copy is made.

What is cut how is told by `catalog/single_file`. GGUF matrices may stay packed: `pack_into` puts layers into a module
that take their weights apart when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from sdfleet.catalog.headers import Header, read_json
from sdfleet.catalog.single_file.gguf_header import PACKED, PLAIN, is_gguf, open_gguf, true_shape
from sdfleet.catalog.single_file.layout import read_any_header, read_layout, whole
from sdfleet.catalog.single_file.origins import read_origin
from sdfleet.catalog.single_file.pieces import Then, n_bytes_of
from sdfleet.engine.networks.choice import own_network
from sdfleet.errors import BrokenCheckpoint

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_SHOWN = 3
# A packed matrix keeps to rows, and its columns are whole blocks: it can be cut and swapped by rows, not turned.
_BY_ROWS: tuple[Then, ...] = ("as_it_is", "halves_swapped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A matrix as GGUF stores it. blocks: [rows, bytes] uint8. shape: [rows, columns] of the numbers in it."""

    blocks: Tensor
    dtype: str
    shape: tuple[int, int]

    def unpacked(self) -> Tensor:
        """The matrix, [rows, columns]."""
        return unpack(self.blocks, self.dtype, self.shape)


class PackedLinear(nn.Module):
    """A linear layer whose weight stays packed in memory and is taken apart at every call."""

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(packed.blocks, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = packed.shape
        self._format = _format(packed.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out_features] of [..., in_features], in x's dtype."""
        weight = self._format.unpack(self.weight).reshape(self.out_features, self.in_features)
        return F.linear(x, weight.to(x.dtype), self.bias)


def unpack(blocks: Tensor, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The numbers of GGUF blocks (uint8, whole rows), on the blocks' device; float16 or float32, as they say."""
    return _format(dtype).unpack(blocks).reshape(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """One of GGUF's formats: how many numbers are in how many bytes, and what takes them apart."""

    n_numbers: int
    n_bytes: int
    numbers_of: Callable[[Tensor, int, int], Tensor]

    def unpack(self, blocks: Tensor) -> Tensor:
        return self.numbers_of(blocks.reshape(-1, self.n_bytes), self.n_numbers, self.n_bytes)


def _format(dtype: str) -> _Format:
    import gguf
    from diffusers.quantizers.gguf.utils import dequantize_functions

    kind = gguf.GGMLQuantizationType[dtype]
    n_numbers, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    return _Format(n_numbers=n_numbers, n_bytes=n_bytes, numbers_of=dequantize_functions[kind])


def read_component(
    file: Path,
    component: str,
    *,
    dtype: torch.dtype,
    device: str,
    without: tuple[str, ...] = (),
    only: Collection[str] | None = None,
    packs: bool = False,
) -> dict[str, Any]:
    """The weights of one component of a single file by the component's own names, floating point ones in `dtype`.

    packs: give matrices that GGUF stores in blocks as `Packed`. without: beginnings of names to pass over.
    only: the names to read, all where None.
    Raises BrokenCheckpoint, PickleRefused and UnsupportedByModel.
    """
    header = read_any_header(file)
    pieces = read_layout(header, label=str(file)).parts[component].pieces
    weights: dict[str, Any] = {}
    with _opened(file) as read:
        for name, piece in pieces.items():
            if name.startswith(without) or (only is not None and name not in only):
                continue
            if device == "meta":
                weights[name] = torch.empty(piece.shape(header.shapes), dtype=dtype, device="meta")
                continue
            if piece.then == "identity":
                weights[name] = torch.eye(header.shapes[piece.source][-1], dtype=dtype, device=device)
                continue
            tensor = read(piece.source, piece.rows)
            if isinstance(tensor, Packed) and (not packs or piece.then not in _BY_ROWS):
                tensor = tensor.unpacked()
            if isinstance(tensor, Packed):
                blocks = _turned(tensor.blocks, piece.then).to(device)
                weights[name] = Packed(blocks=blocks, dtype=tensor.dtype, shape=tensor.shape)
            else:
                weights[name] = _turned(tensor, piece.then).to(device=device, dtype=dtype).contiguous()
    return weights


def loaded_bytes(header: Header, dtype: torch.dtype) -> int:
    """Bytes that a component takes once it is loaded: packed matrices as they lie in the file, all else in `dtype`."""
    element_bytes = torch.empty((), dtype=dtype).element_size()
    return sum(
        n_bytes_of(shape, stored) if _stays_packed(stored, shape) else torch.Size(shape).numel() * element_bytes
        for shape, stored in ((shape, header.dtypes[name]) for name, shape in header.shapes.items())
    )


def unpacked_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that are plain numbers once a component is loaded."""
    return {name: shape for name, shape in header.shapes.items() if not _stays_packed(header.dtypes[name], shape)}


def pack_into(module: nn.Module, weights: Mapping[str, Any], *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Put an empty PackedLinear where a weight is packed; all weights as the module then takes them.

    A packed weight of another layer than a linear one is taken apart, into `dtype`. Raises BrokenCheckpoint for a
    matrix of the wrong shape.
    """
    ready: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not isinstance(weight, Packed):
            ready[name] = weight
            continue
        parent_name, _, own_name = name.removesuffix(".weight").rpartition(".")
        try:
            parent = module.get_submodule(parent_name)
            layer = parent.get_submodule(own_name)
        except AttributeError:
            continue
        if not isinstance(layer, nn.Linear):
            ready[name] = weight.unpacked().to(dtype)
            continue
        if weight.shape != (layer.out_features, layer.in_features):
            raise BrokenCheckpoint(
                f"{name} is {list(weight.shape)} where the config says {[layer.out_features, layer.in_features]}",
                hint="copy or download the file again",
            )
        setattr(parent, own_name, PackedLinear(weight, layer.bias))
        ready[name] = weight.blocks
    return ready


def check(folder: Path) -> None:
    """Whether every weight a config asks for is in the file, in the shape it asks for; no weight is read.

    folder: one that an import wrote. Raises BrokenCheckpoint with every fault of every component.
    """
    index = read_json(folder / "model_index.json")
    faults = []
    for component, entry in index.items():
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
            continue
        origin = read_origin(folder / component)
        if origin is None or origin.n_file_bytes is None:
            continue
        header = read_any_header(origin.path)
        found = whole(read_layout(header).parts, header, component).shapes
        wanted = wanted_shapes(entry[1], read_json(folder / component / "config.json"))
        missing = sorted(wanted.keys() - found.keys())
        if missing:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            faults.append(f"the {component} lacks {', '.join(missing[:_SHOWN])}{more}")
        wrong = [name for name in sorted(wanted.keys() & found.keys()) if wanted[name] != found[name]]
        faults += [
            f"{component}'s {name} is {list(found[name])} where the rest of the file asks for {list(wanted[name])}"
            for name in wrong[:_SHOWN]
        ]
    if faults:
        raise BrokenCheckpoint(
            f"the file does not hold together: {'; '.join(faults)}", hint="copy or download the file again"
        )


def wanted_shapes(class_name: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by name that a component of this config has, from a module without numbers."""
    build = own_network(class_name, config)
    if build is not None:
        module = build()
    elif class_name == "T5EncoderModel":
        from transformers import T5Config, T5EncoderModel

        with torch.device("meta"):
            module = T5EncoderModel(T5Config.from_dict(dict(config)))
    else:
        import diffusers

        with torch.device("meta"):
            module = getattr(diffusers, class_name).from_config(dict(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    # T5's table under its second name.
    shapes.pop("encoder.embed_tokens.weight", None)
    return shapes


def _stays_packed(dtype: str, shape: tuple[int, ...]) -> bool:
    return dtype in PACKED and len(shape) == 2


def _turned(tensor: Tensor, then: Then) -> Tensor:
    match then:
        case "transposed":
            return tensor.T
        case "matrix":
            return tensor.flatten(1)
        case "halves_swapped":
            return torch.cat(tensor.chunk(2)[::-1])
        case _:
            return tensor


Read = Callable[[str, tuple[int, int] | None], Any]


@contextmanager
def _opened(file: Path) -> Iterator[Read]:
    """What reads one tensor of the file, or rows of it; only those bytes are touched."""
    if is_gguf(file):
        yield _gguf_reader(file)
        return
    try:
        with safe_open(file, framework="pt") as opened:

            def read(name: str, rows: tuple[int, int] | None) -> Tensor:
                tensor: Tensor = opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows[0] : rows[1]]
                return tensor

            yield read
    except (SafetensorError, OSError) as exc:
        raise BrokenCheckpoint(f"{file} cannot be read: {exc}", hint="copy or download this file again") from exc


def _gguf_reader(file: Path) -> Read:
    reader = open_gguf(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str, rows: tuple[int, int] | None) -> Tensor | Packed:
        found = tensors[name]
        dtype, shape = found.tensor_type.name, true_shape(reader, name, found.shape)
        if dtype == "BF16":
            numbers = _copied(found.data).view(torch.bfloat16).reshape(shape)
        elif dtype in PLAIN:
            numbers = _copied(found.data).reshape(shape)
        elif len(shape) == 2 and len(found.shape) == 2 and found.data.shape[0] == shape[0]:
            blocks = _copied(found.data if rows is None else found.data[rows[0] : rows[1]])
            return Packed(blocks=blocks, dtype=dtype, shape=(len(blocks), shape[1]))
        else:
            numbers = unpack(_copied(found.data), dtype, shape)
        return numbers if rows is None else numbers[rows[0] : rows[1]]

    return read


def _copied(data: npt.NDArray[np.generic]) -> Tensor:
    """A tensor of its own: the file is mapped for reading only."""
    return torch.from_numpy(data.copy())
