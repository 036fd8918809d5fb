"""LoRAs on a checkpoint's components: each layer that one changes adds up(down(x)) * scale to its own answer.

The weights of the checkpoint are never written to, so that without a LoRA, or at scale 0, every number is what it was.
A merge would need a copy of the denoiser for each set, or rounding with each change of sets; added while computing,
a set is as large as its file, and any format of weights will do: packed, in 8 bits, in GGUF's blocks. What that costs
a step is in docs/loras.md.

The network has the LoRAs of one set on at a time; pictures of other sets are other batches (see `set_of`). Files that
were used stay in memory up to `_MOST_BYTES`, fitted to the layers and without a scale: another scale costs nothing.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from sdfleet.catalog.adapter_header import Place, Side, part_of, read_alphas, read_facts, refuse_other_kinds
from sdfleet.catalog.family_titles import FAMILY_TITLES
from sdfleet.catalog.headers import Header, read_header
from sdfleet.domain import AdapterFile, Drawing, Lora
from sdfleet.engine.components import DENOISERS, TEXT_ENCODERS, ComponentName, Components
from sdfleet.engine.devices import Device
from sdfleet.engine.lora_names import Stack, flat, names_of
from sdfleet.errors import BrokenCheckpoint, UnsupportedByModel

log = logging.getLogger(__name__)

# A LoRA of rank 32 has 50 MB for SD 1.5, 170 MB for SDXL, 350 MB for FLUX.1 in half precision: a few sets that take
# turns. What is on now stays whatever it takes.
_MOST_BYTES = 2**30
_SHOWN = 3
# By (content, scale): what a set is, and which pictures may share a step.
Set = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class _Change:
    """What a LoRA adds to one layer: up(down(x)) * factor.

    down: [rank, in], or [rank, in, kh, kw] for a convolution, which is then done with the layer's own stride and
    padding. up: [out, rank], or [out, rank, 1, 1].
    """

    down: Tensor
    up: Tensor
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    """How a file fits one component. without_place, misshapen: sentences' worth of names."""

    n_fitting: int
    without_place: tuple[str, ...]
    misshapen: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fitted:
    """A file's part for one component, by the component's own layers."""

    changes: Mapping[str, _Change]

    @property
    def n_bytes(self) -> int:
        # Layers that were one for their authors share one `down`.
        tensors = [tensor for change in self.changes.values() for tensor in (change.down, change.up)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@dataclass(slots=True)
class _On:
    """What a module has on."""

    set: Set
    handles: list[Any] = field(default_factory=list)


def set_of(loras: Sequence[Lora]) -> Set:
    """What the denoiser has on: pictures for which this is equal may share a step. The order means nothing."""
    return _summed((lora.file.content, lora.scale) for lora in loras)


def text_set_of(loras: Sequence[Lora]) -> Set:
    """What the text encoders have on: prompts for which this is equal have equal states."""
    return _summed((lora.file.content, lora.text_scale) for lora in loras)


class Loras:
    """Puts LoRAs on the components of one checkpoint, and takes them off. For one thread: the engine's."""

    def __init__(self, components: Components, device: Device, *, family: str, most_bytes: int = _MOST_BYTES) -> None:
        self._components = components
        self._device = device
        self._family = family
        self._most_bytes = most_bytes
        self._kept: OrderedDict[tuple[str, ComponentName], _Fitted] = OrderedDict()
        self._reports: dict[tuple[str, ComponentName], _Report] = {}
        self._on: weakref.WeakKeyDictionary[nn.Module, _On] = weakref.WeakKeyDictionary()

    def resident_bytes(self) -> int:
        """Bytes of the files that are kept."""
        return sum(fitted.n_bytes for fitted in self._kept.values())

    def coming_bytes(self, drawing: Drawing) -> int:
        """About the bytes that reading the drawing's LoRAs will add. Raises BrokenCheckpoint for one that is gone."""
        here = {content for content, _ in self._kept}
        return sum(_size(lora.file) for lora in drawing.loras if lora.file.content not in here)

    @contextlib.contextmanager
    def on_text(self, loras: Sequence[Lora], names: Sequence[ComponentName]) -> Iterator[None]:
        """These text encoders have the LoRAs on within; raises as `on_denoiser`."""
        for name in names:
            self._put_on(name, loras, text_set_of(loras))
        yield

    @contextlib.contextmanager
    def on_denoiser(self, loras: Sequence[Lora], name: ComponentName) -> Iterator[None]:
        """The denoiser has the LoRAs on within, and as torch's module. Raises UnsupportedByModel, BrokenCheckpoint.

        What was compiled was compiled without them, so such a call runs uncompiled.
        """
        wanted = set_of(loras)
        self._put_on(name, loras, wanted)
        with _uncompiled() if wanted else contextlib.nullcontext():
            yield

    def settle(self, drawing: Drawing, denoiser: ComponentName) -> tuple[str, ...]:
        """What to tell of how the LoRAs fit, after the text encoders had them on; the denoiser is loaded for it.

        Raises UnsupportedByModel, naming both sides, for one of which nothing fits.
        """
        told: list[str] = []
        if drawing.loras:
            self._put_on(denoiser, drawing.loras, set_of(drawing.loras))
        for lora in drawing.loras:
            asked = ((denoiser, lora.scale), *((name, lora.text_scale) for name in TEXT_ENCODERS))
            known = [(name, self._reports.get((lora.file.content, name))) for name, scale in asked if scale]
            reports = [report for _, report in known if report is not None]
            if not sum(report.n_fitting for report in reports):
                if lora.scale:
                    raise self._fits_nothing(lora.file, reports)
                told.append(
                    f"the LoRA {lora.file.name!r} has no part for the text encoders, and the rest is at scale 0"
                )
            told += _warnings(lora.file, reports)
            if lora.scale and self._components.is_served(denoiser):
                told.append("drawn by torch: the faster executor cannot have LoRAs on")
        return tuple(dict.fromkeys(told))

    def take_off(self) -> None:
        """Every component is as it was without LoRAs."""
        for module in list(self._on):
            self._undress(module)
        for name in DENOISERS:
            self._components.in_torch(name, is_wanted=False)

    def drop(self) -> bool:
        """Take everything off and forget the files; whether there was anything."""
        self.take_off()
        had = bool(self._kept)
        self._kept.clear()
        return self._components.drop_beside() or had

    def _put_on(self, name: ComponentName, loras: Sequence[Lora], wanted: Set) -> None:
        if not wanted:
            # Nothing is loaded for this: what is not there has nothing on.
            self._components.in_torch(name, is_wanted=False)
            module = self._components.held(name)
            if isinstance(module, nn.Module) and module in self._on:
                self._undress(module)
            return
        module = self._components.in_torch(name, is_wanted=True)
        on = self._on.get(module)
        if on is not None and on.set == wanted:
            return
        self._undress(module)
        files = {lora.file.content: lora.file for lora in loras}
        parts: dict[str, list[_Change]] = {}
        for content, scale in wanted:
            for layer, change in self._fitted(files[content], name, module, wanted).changes.items():
                parts.setdefault(layer, []).append(_Change(change.down, change.up, change.factor * scale))
        layers = dict(module.named_modules())
        handles = [layers[layer].register_forward_hook(_Adding(changes)) for layer, changes in parts.items()]
        self._on[module] = _On(set=wanted, handles=handles)

    def _undress(self, module: nn.Module) -> None:
        on = self._on.pop(module, None)
        for handle in on.handles if on is not None else ():
            handle.remove()

    def _fitted(self, file: AdapterFile, name: ComponentName, module: nn.Module, wanted: Set) -> _Fitted:
        key = (file.content, name)
        if key not in self._kept:
            fitted, self._reports[key] = self._fit(file, name, module)
            self._kept[key] = fitted
            in_use = {content for content, _ in wanted}
            while self.resident_bytes() > self._most_bytes:
                oldest = next((k for k in self._kept if k[0] not in in_use), None)
                if oldest is None:
                    break
                del self._kept[oldest]
            log.info("LoRA read", extra={"lora": file.name, "component": name, "n_layers": len(fitted.changes)})
        self._kept.move_to_end(key)
        return self._kept[key]

    def _fit(self, file: AdapterFile, name: ComponentName, module: nn.Module) -> tuple[_Fitted, _Report]:
        path = Path(file.path)
        header = read_header(path)
        refuse_other_kinds(header, label=f"the LoRA {file.name!r}")
        tensors, strange = _tensors(header, self._components, name)
        alphas = read_alphas(path, header)
        layers = {layer: found for layer, found in module.named_modules() if _shape(found) is not None}
        names = names_of(layers)
        changes: dict[str, _Change] = {}
        without_place, misshapen = list(strange), []
        # A layer's own part goes before what a stack has for it: some files hold both, which are the same.
        places = sorted(
            tensors, key=lambda place: len(names[flat(place.layer)].layers) if flat(place.layer) in names else 0
        )
        n_fitting = 0
        with _opened(path) as read:
            for place in places:
                stack = names.get(flat(place.layer))
                if stack is None:
                    without_place.append(place.layer)
                    continue
                down, up, factor = _low_rank(read, tensors[place], _alpha_of(alphas, name, place.layer))
                stacked = _cut(stack, layers, down, up)
                if isinstance(stacked, str):
                    misshapen.append(stacked)
                    continue
                n_fitting += 1
                down = down.to(self._device.torch_device, self._device.dtype)
                for layer, rows in stacked.items():
                    shaped = _turned(layers[layer], down, rows.to(self._device.torch_device, self._device.dtype))
                    changes.setdefault(layer, _Change(*shaped, factor))
        report = _Report(n_fitting=n_fitting, without_place=tuple(without_place), misshapen=tuple(misshapen))
        return _Fitted(changes=changes), report

    def _fits_nothing(self, file: AdapterFile, reports: Sequence[_Report]) -> UnsupportedByModel:
        header = read_header(Path(file.path))
        facts = read_facts(header, label=file.path)
        is_for = f"it is for {FAMILY_TITLES[facts.family]} and changes" if facts and facts.family else "it changes"
        layers = [layer for report in reports for layer in report.without_place]
        misshapen = [fault for report in reports for fault in report.misshapen]
        n_layers = facts.n_layers if facts else 0
        such_as = misshapen[0] if misshapen else f"such as {layers[0]}" if layers else "none that can be read"
        return UnsupportedByModel(
            f"the LoRA {file.name!r} fits no layer of this checkpoint: {is_for} {n_layers} layers, {such_as}; "
            f"the checkpoint is {FAMILY_TITLES.get(self._family, self._family)}",
            hint="draw with a checkpoint of the kind that it was made for",
        )


class _Adding:
    """A layer's answer with what the LoRAs add to it; a forward hook."""

    def __init__(self, changes: Sequence[_Change]) -> None:
        self._changes = tuple(changes)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], answer: Tensor) -> Tensor:
        x: Tensor = args[0]
        for change in self._changes:
            down, up = change.down.to(x.dtype), change.up.to(x.dtype)
            if isinstance(layer, nn.Conv2d):
                low = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
                answer = torch.add(answer, F.conv2d(low, up), alpha=change.factor)
            else:
                answer = torch.add(answer, F.linear(F.linear(x, down), up), alpha=change.factor)
        return answer


def _summed(uses: Iterator[tuple[str, float]]) -> Set:
    """One entry a file, those at 0 left out: the same file twice is once with both scales."""
    scales: dict[str, float] = {}
    for content, scale in uses:
        scales[content] = scales.get(content, 0.0) + scale
    return tuple(sorted((content, scale) for content, scale in scales.items() if scale))


def _size(file: AdapterFile) -> int:
    try:
        return Path(file.path).stat().st_size
    except OSError as exc:
        raise BrokenCheckpoint(
            f"the LoRA {file.name!r} at {file.path} cannot be read: {exc.strerror or exc}", hint="put the file back"
        ) from exc


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """torch.compile's products are not used within. Only what was imported can have compiled anything."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _tensors(
    header: Header, components: Components, name: ComponentName
) -> tuple[dict[Place, dict[Side, str]], tuple[str, ...]]:
    """The tensors of a file for one component, by place; for the denoiser also what is no part of a LoRA's layer."""
    found: dict[Place, dict[Side, str]] = {}
    strange: list[str] = []
    for tensor in header.shapes:
        part = part_of(tensor)
        if part is None:
            strange += [tensor] if name in DENOISERS else []
            continue
        if _component(part[0], components, otherwise=name) == name:
            found.setdefault(part[0], {})[part[1]] = tensor
    halves = [place.layer for place, sides in found.items() if not {"down", "up"} <= sides.keys()]
    whole = {place: sides for place, sides in found.items() if {"down", "up"} <= sides.keys()}
    return whole, (*strange, *halves)


def _component(place: Place, components: Components, *, otherwise: ComponentName) -> ComponentName:
    """FLUX's T5 is the third text encoder in kohya's files and the second here."""
    if not place.text_encoder:
        return otherwise if otherwise in DENOISERS else DENOISERS[0]
    name = TEXT_ENCODERS[place.text_encoder - 1]
    return "text_encoder_2" if name == "text_encoder_3" and not components.has(name) else name


def _alpha_of(alphas: Mapping[str, float], component: ComponentName, layer: str) -> float | None:
    for key in (f"{component}.{layer}", layer, f"{component}.", ""):
        if key in alphas:
            return alphas[key]
    return None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file.get_tensor
    except (SafetensorError, OSError) as exc:
        raise BrokenCheckpoint(f"{path} cannot be read: {exc}", hint="copy or download this file again") from exc


def _low_rank(read: Any, sides: Mapping[Side, str], alpha: float | None) -> tuple[Tensor, Tensor, float]:
    """down, up, and alpha over rank, as the file has them; a kernel between the two is put into `down`."""
    down, up = read(sides["down"]).float(), read(sides["up"]).float()
    rank = up.shape[1]
    if "mid" in sides:
        down = torch.einsum("orhw,ri->oihw", read(sides["mid"]).float(), down.flatten(1))
    if "alpha" in sides:
        alpha = float(read(sides["alpha"]).float())
    return down, up, 1.0 if alpha is None else alpha / max(rank, 1)


def _cut(stack: Stack, layers: Mapping[str, nn.Module], down: Tensor, up: Tensor) -> dict[str, Tensor] | str:
    """The rows of `up` for each layer of the stack; or how the shapes differ."""
    shapes = {layer: _shape(layers[layer]) for layer in stack.layers}
    n_out = [shape[0] for shape in shapes.values() if shape is not None]
    first = shapes[stack.layers[0]]
    assert first is not None  # only layers with a shape have names
    kernel = tuple(down.shape[2:]) or (1,) * len(first[2:])
    # A 1x1 kernel and a matrix are the same, and which of them a layer is has changed over the years.
    fits_kernel = kernel == first[2:] or (not first[2:] and set(kernel) == {1})
    if (up.shape[0], down.shape[1]) != (sum(n_out), first[1]) or not fits_kernel or up.shape[1] != down.shape[0]:
        theirs, ours = [up.shape[0], down.shape[1], *kernel], [sum(n_out), *first[1:]]
        return f"{stack.layers[0]} is {theirs} there and {ours} here"
    if stack.is_swapped:
        up = torch.cat(up.chunk(2)[::-1])
    return dict(zip(stack.layers, up.split(n_out), strict=True))


def _turned(layer: nn.Module, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(layer, nn.Conv2d):
        return down.flatten(1), up.flatten(1)
    return down.view(*down.shape[:2], *layer.kernel_size), up.view(*up.shape[:2], 1, 1)


def _shape(layer: nn.Module) -> tuple[int, ...] | None:
    """(out, in) of a linear layer however its weights are kept, (out, in, kh, kw) of a convolution; else None."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1 or layer.padding_mode != "zeros":
            return None
        return layer.out_channels, layer.in_channels, *layer.kernel_size
    n_out, n_in = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    return (n_out, n_in) if isinstance(n_out, int) and isinstance(n_in, int) else None


def _warnings(file: AdapterFile, reports: Sequence[_Report]) -> Iterator[str]:
    n_fitting = sum(report.n_fitting for report in reports)
    left_out = [name for report in reports for name in (*report.misshapen, *report.without_place)]
    if n_fitting and left_out:
        more = f" and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
        yield (
            f"{len(left_out)} of {len(left_out) + n_fitting} layers of the LoRA {file.name!r} have no place in this "
            f"checkpoint and were left out: {', '.join(left_out[:_SHOWN])}{more}"
        )
