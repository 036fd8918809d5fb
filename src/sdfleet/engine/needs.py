"""What a drawing takes on this device before anything is loaded: memory in each mode and format, and time.

The same networks and the same plan as when it is loaded, see footprint.py and residency.py; no weight is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sdfleet.domain import Drawing
from sdfleet.engine.components import Components
from sdfleet.engine.devices import Device, choose_device
from sdfleet.engine.events import DeviceChoice, DtypeChoice, MemoryMode, TextWeightsChoice, WeightFormat, WeightsChoice
from sdfleet.engine.families import FAMILIES, LatentFamily
from sdfleet.engine.footprint import Footprint
from sdfleet.engine.memory import MemoryPlan, Residency, Weights, plan
from sdfleet.engine.prompt_cache import PromptCache
from sdfleet.engine.speed import SpeedBook
from sdfleet.engine.tape import Call, Work
from sdfleet.engine.weight_formats import refuse_where_it_cannot_be
from sdfleet.errors import InvalidValue, OutOfMemory

# The fastest arrangement and the leanest; `auto` takes the first of them, or of those in between, that fits.
MODES: tuple[MemoryMode, ...] = ("fast", "eco")
_FORMATS: tuple[WeightFormat, ...] = ("int8", "fp8", "nf4")
# More than any device has: what would be needed is asked for, not what fits.
_ENDLESS_BYTES = 2**60


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One mode and format: the bytes of all weights, the most that is held at one time, and whether there is room.

    weights: what large weights are kept in; None: in dtype. with_t5: whether the prompt is read with a T5.
    may_skip_t5: whether the model can do without.
    why: what stands against it, as a sentence; None where it fits.
    """

    mode: MemoryMode
    dtype: str
    weights: str | None
    with_t5: bool
    may_skip_t5: bool
    weights_bytes: int
    peak_bytes: int
    residency: Residency
    tiles_vae: bool
    why: str | None

    @property
    def fits(self) -> bool:
        """Whether there is room now."""
        return self.why is None


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureTime:
    """Predicted seconds of one picture alone: reading the prompts, one step, decoding.

    measured_share: [0, 1], how much of it rests on operations that were timed on this machine one by one.
    was_busy: other programs had the processors meanwhile: likely it takes less, and the next plan measures again.
    """

    dtype: str
    steps: int
    encode_s: float
    step_s: float
    decode_s: float
    measured_share: float
    was_busy: bool = False

    @property
    def picture_s(self) -> float:
        """All of it, once the checkpoint is loaded."""
        return self.encode_s + self.steps * self.step_s + self.decode_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureWork:
    """What a picture makes of its networks: `step` is one call, with both rows where it is guided."""

    encode: Work
    step: Work
    decode: Work


def needs(
    drawing: Drawing,
    *,
    device: DeviceChoice = "auto",
    dtype: DtypeChoice = "auto",
    weights: WeightsChoice = "auto",
    text_weights: TextWeightsChoice = "auto",
    limit_bytes: int | None = None,
    free_bytes: int | None = None,
    all_formats: bool = True,
    footprint: Footprint | None = None,
) -> tuple[Need, ...]:
    """What this drawing needs here, one line a mode and format; the format that would be used comes first.

    limit_bytes: as in the settings. free_bytes: what to take for free in the place of what is, as for another machine.
    all_formats: without it, formats that would not be used are looked at only where the one that would does not fit.
    footprint: of the format that would be used, where somebody has it. Raises CheckpointError and UnsupportedByModel
    as the engine does.
    """
    chosen = choose_device(device, dtype, weights, text_weights)
    found: list[Need] = []
    footprints: dict[tuple[torch.dtype, bool], Footprint] = {}
    if footprint is not None:
        footprints[chosen.dtype, chosen.weights is not None] = footprint
    for each in (chosen, *_others(chosen, dtype), *_quantised(chosen)):
        if not all_formats and any(need.fits for need in found):
            break
        free = each.free_bytes() if free_bytes is None else free_bytes
        free = free if limit_bytes is None else min(free, limit_bytes)
        family = _family(drawing, each)
        # Weights that are kept otherwise are widened layer by layer, whatever they are kept in.
        family.footprint = footprints.setdefault((each.dtype, each.weights is not None), family.footprint)
        asked = _with_and_without_t5(drawing, family)
        for one in asked:
            found += [_need(one, family, mode=mode, free_bytes=free, may_skip_t5=len(asked) > 1) for mode in MODES]
    return tuple(found)


def picture_footprint(drawing: Drawing, device: Device) -> Footprint:
    """What finds out the work of the drawing's networks on this device, and keeps what it found."""
    return _family(drawing, device).footprint


def picture_work(drawing: Drawing, device: Device, footprint: Footprint | None = None) -> PictureWork:
    """The operations of one picture of this drawing on this device, written down and not made."""
    family, size = _family(drawing, device), _size(drawing)
    footprint = footprint or family.footprint
    n_rows, edits = 2 if family.is_guided(drawing) else 1, drawing.image is not None
    return PictureWork(
        encode=footprint.encode(drawing),
        step=footprint.denoise(**size, n_rows=n_rows, edits=edits),
        decode=footprint.decode(**size),
    )


def picture_time(
    drawing: Drawing,
    *,
    device: DeviceChoice = "auto",
    dtype: DtypeChoice = "auto",
    book_folder: Path | None = None,
    budget_s: float = 10.0,
    n_threads: int | None = None,
    footprint: Footprint | None = None,
) -> PictureTime | None:
    """How long one picture of this drawing will take here; None where this machine's speed is not known.

    book_folder: where measured times are kept. budget_s: how long may be spent on measuring what is not known yet; 0
    measures nothing, as is right while something is drawn. For the main thread of a process that draws nothing.
    Weights are taken to be kept in dtype, and torch to run them: other executors are chosen where they are faster.
    footprint: of the drawing's networks in this format, where somebody has it.
    """
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    chosen = choose_device(device, dtype)
    work = picture_work(drawing, chosen, footprint)
    book = SpeedBook(chosen, book_folder)
    book.learn(_all_calls(work, n_steps=drawing.steps), budget_s=budget_s)
    book.save()
    parts = [book.estimate(part.calls, n_views=part.n_views) for part in (work.encode, work.step, work.decode)]
    encode, step, decode = parts
    if encode is None or step is None or decode is None:
        return None
    weighed = ((encode, 1), (step, drawing.steps), (decode, 1))
    total_s = sum(part.seconds * n for part, n in weighed)
    return PictureTime(
        dtype=chosen.dtype_name,
        steps=drawing.steps,
        encode_s=encode.seconds,
        step_s=step.seconds,
        decode_s=decode.seconds,
        measured_share=sum(part.measured_share * part.seconds * n for part, n in weighed) / total_s,
        was_busy=book.was_busy,
    )


def _all_calls(work: PictureWork, *, n_steps: int) -> Iterable[tuple[Call, int]]:
    calls: Counter[Call] = Counter()
    for part, n in ((work.encode, 1), (work.step, n_steps), (work.decode, 1)):
        calls.update({call: n * n_times for call, n_times in part.calls.items()})
    return calls.items()


def _family(drawing: Drawing, device: Device) -> LatentFamily:
    return FAMILIES[drawing.family](Components(Path(drawing.checkpoint), device), device, PromptCache(0))


def _size(drawing: Drawing) -> dict[str, int]:
    return {"width_px": drawing.width_px, "height_px": drawing.height_px}


def _others(chosen: Device, dtype: DtypeChoice) -> list[Device]:
    if dtype != "auto":
        return []
    devices = []
    for name in ("bfloat16", "float16", "float32"):
        if getattr(torch, name) == chosen.dtype:
            continue
        try:
            other = choose_device(chosen.kind, name)  # type: ignore[arg-type]
        except InvalidValue:
            # Float16 on a CPU, say: not offered because it cannot be had.
            continue
        devices.append(replace(other, weights=chosen.weights, text_weights=chosen.text_weights))
    return devices


def _quantised(chosen: Device) -> Iterator[Device]:
    """The chosen format with large weights kept in fewer bits, as far as this device can."""
    if chosen.weights is not None or chosen.text_weights is not None:
        return
    for kept in _FORMATS:
        try:
            refuse_where_it_cannot_be("weights", kept, kind=chosen.kind)
        except InvalidValue:
            continue
        yield replace(chosen, weights=kept, text_weights=kept)


def _with_and_without_t5(drawing: Drawing, family: LatentFamily) -> tuple[Drawing, ...]:
    """The drawing, and where it may do without T5 also so."""
    without = replace(drawing, t5="skip")
    may_skip = drawing.t5 == "auto" and family.text_encoders(without) != family.text_encoders(drawing)
    return (drawing, without) if may_skip else (drawing,)


def _need(drawing: Drawing, family: LatentFamily, *, mode: MemoryMode, free_bytes: int, may_skip_t5: bool) -> Need:
    n_rows = 2 if family.is_guided(drawing) else 1
    left_bytes = family.left_by_prompts_bytes(drawing)
    activation_bytes = left_bytes + family.peak_bytes(**_size(drawing), n_rows=n_rows, edits=drawing.image is not None)
    decode_bytes = left_bytes + family.decode_bytes(**_size(drawing), n_rows=n_rows)

    def weights(*, by_layer: bool = False) -> Weights:
        return family.components.weights(
            text_encoders=family.text_encoders(drawing), has_checker=family.is_checked(drawing), by_layer=by_layer
        )

    def planned(free: int, weights: Weights) -> MemoryPlan:
        return plan(weights, activation_bytes=activation_bytes, decode_bytes=decode_bytes, free_bytes=free, mode=mode)

    whole = weights()
    needed, why = planned(_ENDLESS_BYTES, whole), None
    try:
        planned(free_bytes, whole)
    except OutOfMemory as exc:
        why = exc.message
    if why is not None and mode != "fast":
        # Asked for only now, as in residency.py: what is held by layer takes a second to find out.
        try:
            needed, why = planned(free_bytes, weights(by_layer=True)), None
        except OutOfMemory as exc:
            why = exc.message
    return Need(
        mode=mode,
        dtype=family.device.dtype_name,
        weights=family.device.weights,
        with_t5=family.has_t5 and drawing.t5 != "skip",
        may_skip_t5=may_skip_t5,
        weights_bytes=whole.total,
        peak_bytes=needed.peak_bytes,
        residency=needed.residency,
        tiles_vae=needed.tile_vae,
        why=why,
    )
