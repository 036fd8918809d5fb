"""Which checkpoints are on the device, in what arrangement, and what is given up when memory runs out."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from pathlib import Path

from sdfleet.domain import Drawing
from sdfleet.engine.batcher import MOST_ROWS
from sdfleet.engine.compiling import Compiling
from sdfleet.engine.components import DENOISERS, TEXT_ENCODERS, ComponentName, Components
from sdfleet.engine.devices import Device
from sdfleet.engine.events import EngineOptions, MemoryMode
from sdfleet.engine.executors import Executors
from sdfleet.engine.families import FAMILIES
from sdfleet.engine.families.base import LatentFamily, Phase
from sdfleet.engine.memory import MemoryPlan, Residency, plan
from sdfleet.engine.prompt_cache import PromptCache
from sdfleet.errors import OutOfMemory, UnknownName

log = logging.getLogger(__name__)

_MODULES: tuple[ComponentName, ...] = (*TEXT_ENCODERS, *DENOISERS, "vae", "tiny_vae", "safety_checker")
# Encoded prompts kept for repeats: SDXL's pair is 0.6 MB, SD3's with T5 10 MB in half precision.
_PROMPT_CACHE_BYTES = 256_000_000
_FROM_RICHEST: tuple[Residency, ...] = ("all", "by_phase", "by_layer")
# A step never takes more rows than this share of what is free would hold.
_SHARE_FOR_ROWS = 0.8
# A checkpoint that takes less than this share of what is free, by generous bounds, is not looked at more closely: that
# would take a tenth of a second for the built-in model and nearly one for the largest.
_SHARE_WITHOUT_LOOKING = 0.5


@dataclass(slots=True)
class Loaded:
    """A checkpoint in use. `row_caps`: most rows by batch key, lowered when memory ran out."""

    family: LatentFamily
    residency: Residency
    tile_vae: bool
    row_caps: dict[Hashable, int] = field(default_factory=dict)


class DeviceResidency:
    """Keeps checkpoints on one device by bytes; the least recently used idle one leaves first."""

    def __init__(self, device: Device, options: EngineOptions) -> None:
        self._device = device
        self._mode = options.memory_mode
        self._limit_bytes = options.memory_limit_bytes
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self.pinned: tuple[str, ...] = ()
        self.prompts = PromptCache(_PROMPT_CACHE_BYTES)
        self.executors = Executors(device, options)
        self.compiling = Compiling(device, options)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Folders of the checkpoints held now, least recently used first."""
        return tuple(self._loaded)

    def resident_bytes(self) -> int:
        """Bytes of weights on the device, LoRAs among them."""
        families = [loaded.family for loaded in self._loaded.values()]
        return sum(family.components.resident_bytes() + family.loras.resident_bytes() for family in families)

    def bytes_by_checkpoint(self) -> dict[str, int]:
        """Bytes of weights on the device, by the folder of the checkpoint, with the LoRAs made for it."""
        families = {name: loaded.family for name, loaded in self._loaded.items()}
        return {name: f.components.resident_bytes() + f.loras.resident_bytes() for name, f in families.items()}

    def n_by_layer(self) -> int:
        """How many checkpoints are here whose networks come block by block."""
        return sum(loaded.residency == "by_layer" for loaded in self._loaded.values())

    def pin(self, checkpoints: Collection[str]) -> None:
        """These, and no others, do not leave to make room; they need not be here yet."""
        self.pinned = tuple(checkpoints)

    def unload(self, checkpoint: str) -> None:
        """Let a checkpoint leave, and the memory that it took go back to the system."""
        self.prompts.forget(checkpoint)
        if checkpoint in self._loaded:
            self._evict(checkpoint)
            self._device.give_back()

    def acquire(self, drawing: Drawing, *, busy: Collection[str]) -> Loaded:
        """The checkpoint of a drawing, planned for its size and loaded; by phase, weights come as phases need them.

        busy: checkpoints with pictures in the making, which stay. Raises OutOfMemory with the numbers when
        the drawing cannot fit even alone, before anything is loaded.
        """
        checkpoint = drawing.checkpoint
        loaded = self._loaded.get(checkpoint) or self._open(drawing)
        if drawing.n_images:
            loaded.family.check(drawing)
        arrangement = self._planned(loaded, drawing, busy=busy)
        self._rearrange(loaded, arrangement.residency)
        loaded.tile_vae = loaded.tile_vae or arrangement.tile_vae
        self._loaded[checkpoint] = loaded
        self._loaded.move_to_end(checkpoint)
        if loaded.residency == "all":
            # Now rather than in the middle of a step: what is wrong with a file is then wrong with this job alone.
            family = loaded.family
            for name in (*family.text_encoders(drawing), family.denoiser, *family.components_for("decode")):
                if name != "safety_checker" or family.is_checked(drawing):
                    family.components.use(name)
            self.executors.watch(family.components)
            self.compiling.watch(family.components, family.denoiser)
        return loaded

    def told(self, checkpoint: str) -> tuple[str, tuple[str, ...]]:
        """The formats a checkpoint is drawn in, and what a job should be warned of."""
        dtype, warnings = self.executors.told(checkpoint)
        loaded = self._loaded.get(checkpoint)
        if loaded is not None and loaded.residency == "by_layer":
            # No other executor can bring its weights so.
            dtype, warnings = None, ("the model does not fit: its blocks are brought in one by one, which is slow",)
        formats = [dtype or self._device.dtype_name]
        if loaded is not None:
            kept = loaded.family.components.told_of_formats()
            formats += kept
            warnings = (*warnings, *(f"{told}: the picture differs from the full one" for told in kept))
        return ", ".join(formats), warnings

    def get(self, checkpoint: str) -> Loaded:
        """A checkpoint that was acquired and is still held."""
        return self._loaded[checkpoint]

    def enter(self, loaded: Loaded, phase: Phase) -> None:
        """Make room for a phase: in a by-phase arrangement everything it does not use leaves the device."""
        if loaded.residency != "all":
            needed = loaded.family.components_for(phase)
            loaded.family.components.put_away([name for name in _MODULES if name not in needed])

    def find_settled(self, checkpoint: str) -> Loaded | None:
        """A checkpoint with all its parts in memory and nothing left to try out; None if it is not here or not so."""
        loaded = self._loaded.get(checkpoint)
        is_whole = loaded is not None and loaded.residency == "all"
        return loaded if is_whole and self.executors.is_settled(checkpoint) else None

    def row_cap(self, loaded: Loaded, drawing: Drawing, key: Hashable) -> int:
        """Most rows one network call of this key may take, by bytes; at least one guided picture."""
        if key not in loaded.row_caps:
            size = {"width_px": drawing.width_px, "height_px": drawing.height_px}
            components = loaded.family.components
            room = self._room_for(loaded) - components.resident_bytes() - components.coming_bytes()
            most = loaded.family.peak_bound_bytes(**size, n_rows=MOST_ROWS)
            per_row = most // MOST_ROWS
            if room * _SHARE_FOR_ROWS < most:
                edits = drawing.image is not None
                # Two rows less one: what a layer's weights take on their way is taken once.
                one, two = (loaded.family.peak_bytes(**size, n_rows=n, edits=edits) for n in (1, 2))
                per_row = max(two - one, two // 3)
            loaded.row_caps[key] = max(2, int(room * _SHARE_FOR_ROWS) // max(per_row, 1))
        cap = loaded.row_caps[key]
        # A batch that is filled up takes the memory of the larger one.
        return 1 << (cap.bit_length() - 1) if self.compiling.fills_up(loaded.family.components) else cap

    def decode_cap(self, loaded: Loaded, drawing: Drawing) -> int:
        """Most pictures that are decoded together, by bytes; at least one. Many that end at once take turns."""
        if loaded.tile_vae:
            return 1
        size = {"width_px": drawing.width_px, "height_px": drawing.height_px}
        components = loaded.family.components
        room = (self._room_for(loaded) - components.resident_bytes() - components.coming_bytes()) * _SHARE_FOR_ROWS
        most = loaded.family.decode_bound_bytes(**size, n_pictures=MOST_ROWS)
        if room >= most:
            return int(room * MOST_ROWS // most)
        return max(1, int(room // loaded.family.decode_bytes(**size)))

    @property
    def has_chore(self) -> bool:
        """Whether there is something to try out while nothing is drawn."""
        whole = self._whole()
        return self.executors.has_chore(whole) or self.compiling.has_chore(whole)

    def do_chore(self) -> str | None:
        """Try a little of it; the checkpoint whose speed is another from now on."""
        whole = self._whole()
        room_bytes = {c: self._room_for(self._loaded[c]) - self.resident_bytes() for c in whole}
        if self.executors.has_chore(whole):
            return self.executors.do_chore(whole, room_bytes=room_bytes)
        return self.compiling.do_chore(whole)

    def drop_idle(self, *, busy: Collection[str]) -> bool:
        """Rung: checkpoints that draw nothing now leave the device. Whether anything left."""
        idle = [checkpoint for checkpoint in self._loaded if checkpoint not in {*busy, *self.pinned}]
        for checkpoint in idle:
            self._evict(checkpoint)
        # What is needed again is read again: less than a checkpoint takes.
        dropped = [loaded.family.loras.drop() for loaded in self._loaded.values()]
        return bool(idle) or any(dropped)

    def take_off_loras(self) -> None:
        """Every checkpoint is as it was without LoRAs, before somebody times it or looks at its answers."""
        for loaded in self._loaded.values():
            loaded.family.loras.take_off()

    def offload_text_encoders(self, loaded: Loaded) -> bool:
        """Rung: text encoders leave until the next prompt. Whether any was there."""
        return loaded.family.components.put_away(TEXT_ENCODERS) > 0

    def offload_all(self, loaded: Loaded, phase: Phase) -> bool:
        """Rung: from now on only what a phase uses is on the device. Whether that is new."""
        if not self._rearrange(loaded, "by_phase"):
            return False
        self.enter(loaded, phase)
        return True

    def offload_layers(self, loaded: Loaded, phase: Phase) -> bool:
        """Rung: from now on a phase's networks come block by block, where they can. Whether that is new."""
        if loaded.residency == "by_layer" or not loaded.family.components.can_come_by_layer:
            return False
        self._rearrange(loaded, "by_layer")
        self.enter(loaded, phase)
        return True

    def close(self) -> None:
        """Everything leaves."""
        for checkpoint in list(self._loaded):
            self._evict(checkpoint)
        self.executors.close()

    def _whole(self) -> list[str]:
        """Checkpoints with all their parts in memory: where that is short, there is no place for two denoisers."""
        return [checkpoint for checkpoint, loaded in self._loaded.items() if loaded.residency == "all"]

    def _open(self, drawing: Drawing) -> Loaded:
        family = FAMILIES.get(drawing.family)
        if family is None:
            raise UnknownName("family", drawing.family, FAMILIES)
        components = Components(Path(drawing.checkpoint), self._device)
        self.executors.adopt(components, family.denoiser)
        return Loaded(family=family(components, self._device, self.prompts), residency="all", tile_vae=False)

    @staticmethod
    def _rearrange(loaded: Loaded, residency: Residency) -> bool:
        """Hold a checkpoint in a leaner way, never in a richer one again while it is here. Whether that is new."""
        is_new = _FROM_RICHEST.index(residency) > _FROM_RICHEST.index(loaded.residency)
        if is_new:
            loaded.residency = residency
        if is_new and residency == "by_layer":
            loaded.family.components.bring_by_layer()
        return is_new

    def _planned(self, loaded: Loaded, drawing: Drawing, *, busy: Collection[str]) -> MemoryPlan:
        family = loaded.family
        n_rows = 2 if family.is_guided(drawing) else 1
        text_encoders = family.text_encoders(drawing)
        by_layer = loaded.residency == "by_layer"
        activation_bytes, decode_bytes = self._live_bytes(loaded, drawing, n_rows=n_rows)
        while True:
            stays = {*busy, *self.pinned}
            idle = [c for c in self._loaded if c not in stays and self._loaded[c] is not loaded]
            # While an idle checkpoint could leave, no slower arrangement is considered.
            mode: MemoryMode = "fast" if idle and self._mode == "auto" else self._mode
            try:
                return plan(
                    family.components.weights(
                        text_encoders=text_encoders, has_checker=family.is_checked(drawing), by_layer=by_layer
                    ),
                    activation_bytes=activation_bytes + family.loras.coming_bytes(drawing),
                    decode_bytes=decode_bytes,
                    free_bytes=self._room_for(loaded),
                    mode=mode,
                )
            except OutOfMemory as exc:
                if idle:
                    self._evict(idle[0])
                elif not by_layer and self._mode != "fast":
                    # Asked for only now: what is held by layer takes a second to find out.
                    by_layer = True
                elif pinned := self._pinned_beside(loaded):
                    raise OutOfMemory(f"{exc.message}; {pinned}", hint="unpin one of them, or a smaller size") from exc
                elif "text_encoder_3" in text_encoders:
                    hint = f"leave the T5 text encoder out (t5 'skip'), or {exc.hint}"
                    raise OutOfMemory(exc.message, hint=hint) from exc
                else:
                    raise

    def _live_bytes(self, loaded: Loaded, drawing: Drawing, *, n_rows: int) -> tuple[int, int]:
        """(one network call, decoding one picture): most bytes beside the weights. Roughly where that fits by far."""
        family, edits = loaded.family, drawing.image is not None
        size = {"width_px": drawing.width_px, "height_px": drawing.height_px}
        bounds = family.peak_bound_bytes(**size, n_rows=n_rows), family.decode_bound_bytes(**size)
        if family.components.weights().total + sum(bounds) < self._room_for(loaded) * _SHARE_WITHOUT_LOOKING:
            return bounds
        left = family.left_by_prompts_bytes(drawing)
        live = family.peak_bytes(**size, n_rows=n_rows, edits=edits), family.decode_bytes(**size, n_rows=n_rows)
        return left + live[0], left + live[1]

    def _pinned_beside(self, loaded: Loaded) -> str:
        """What stays although it is idle, with its bytes; "" if nothing does."""
        held = self.bytes_by_checkpoint()
        beside = [c for c in self.pinned if c in held and self._loaded[c] is not loaded]
        told = [f"{Path(c).name} ({held[c] / 1e9:.1f} GB)" for c in beside]
        return f"pinned are {', '.join(told)}" if told else ""

    def _room_for(self, loaded: Loaded) -> int:
        """Bytes this checkpoint may hold: what is free and what it holds already, within the limit if one is set."""
        own = loaded.family.components.resident_bytes()
        room = self._device.free_bytes() + own
        if self._limit_bytes is not None:
            room = min(room, self._limit_bytes - (self.resident_bytes() - own))
        return room

    def _evict(self, checkpoint: str) -> None:
        loaded = self._loaded.pop(checkpoint)
        freed = loaded.family.components.resident_bytes()
        loaded.family.components.close()
        loaded.family.loras.drop()
        self.executors.let_go(checkpoint)
        self.compiling.let_go(checkpoint)
        log.info("checkpoint left the device", extra={"checkpoint": checkpoint, "freed_bytes": freed})
