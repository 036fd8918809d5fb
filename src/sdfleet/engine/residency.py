"""Which checkpoints are on the device, in what arrangement, and what is given up when memory runs out."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from pathlib import Path

from sdfleet.domain import Drawing
from sdfleet.engine.compiling import Compiling
from sdfleet.engine.components import DENOISERS, TEXT_ENCODERS, ComponentName, Components
from sdfleet.engine.devices import Device
from sdfleet.engine.events import EngineOptions, MemoryMode
from sdfleet.engine.executors import Executors
from sdfleet.engine.families import FAMILIES
from sdfleet.engine.families.base import LatentFamily, Phase
from sdfleet.engine.fp8_weights import TOLD as IN_FP8
from sdfleet.engine.memory import MemoryPlan, Residency, plan
from sdfleet.engine.prompt_cache import PromptCache
from sdfleet.errors import OutOfMemory, UnknownName

log = logging.getLogger(__name__)

_MODULES: tuple[ComponentName, ...] = (*TEXT_ENCODERS, *DENOISERS, "vae", "tiny_vae")
# Encoded prompts kept for repeats: SDXL's pair is 0.6 MB, SD3's with T5 10 MB in half precision.
_PROMPT_CACHE_BYTES = 256_000_000
# A step never takes more rows than this share of what is free would hold.
_SHARE_FOR_ROWS = 0.8


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
        self.prompts = PromptCache(_PROMPT_CACHE_BYTES)
        self.executors = Executors(device, options)
        self.compiling = Compiling(device, options)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Folders of the checkpoints held now, least recently used first."""
        return tuple(self._loaded)

    def resident_bytes(self) -> int:
        """Bytes of weights on the device."""
        return sum(loaded.family.components.resident_bytes() for loaded in self._loaded.values())

    def acquire(self, drawing: Drawing, *, busy: Collection[str]) -> Loaded:
        """The checkpoint of a drawing, planned for its size and loaded; by phase, weights come as phases need them.

        busy: checkpoints with pictures in the making, which stay. Raises OutOfMemory with the numbers when
        the drawing cannot fit even alone, before anything is loaded.
        """
        checkpoint = drawing.checkpoint
        loaded = self._loaded.get(checkpoint) or self._open(drawing)
        loaded.family.check(drawing)
        arrangement = self._planned(loaded, drawing, busy=busy)
        if arrangement.residency == "by_phase":
            loaded.residency = "by_phase"
        loaded.tile_vae = loaded.tile_vae or arrangement.tile_vae
        self._loaded[checkpoint] = loaded
        self._loaded.move_to_end(checkpoint)
        if loaded.residency == "all":
            # Now rather than in the middle of a step: what is wrong with a file is then wrong with this job alone.
            family = loaded.family
            for name in (*family.text_encoders(drawing), family.denoiser, *family.components_for("decode")):
                family.components.use(name)
            self.executors.watch(family.components)
            self.compiling.watch(family.components, family.denoiser)
        return loaded

    def told(self, checkpoint: str) -> tuple[str, tuple[str, ...]]:
        """The formats a checkpoint is drawn in, and what a job should be warned of."""
        dtype, warnings = self.executors.told(checkpoint)
        if self._device.keeps_fp8:
            warnings = (*warnings, f"{IN_FP8}: the picture differs from the full one")
            return f"{self._device.dtype_name}, {IN_FP8}", warnings
        return dtype or self._device.dtype_name, warnings

    def get(self, checkpoint: str) -> Loaded:
        """A checkpoint that was acquired and is still held."""
        return self._loaded[checkpoint]

    def enter(self, loaded: Loaded, phase: Phase) -> None:
        """Make room for a phase: in a by-phase arrangement everything it does not use leaves the device."""
        if loaded.residency == "by_phase":
            needed = loaded.family.components_for(phase)
            loaded.family.components.put_away([name for name in _MODULES if name not in needed])

    def row_cap(self, loaded: Loaded, drawing: Drawing, key: Hashable) -> int:
        """Most rows one network call of this key may take, by bytes; at least one guided picture."""
        if key not in loaded.row_caps:
            per_row = loaded.family.peak_bytes(width_px=drawing.width_px, height_px=drawing.height_px, n_rows=1)
            room = self._room_for(loaded) - loaded.family.components.resident_bytes()
            loaded.row_caps[key] = max(2, int(room * _SHARE_FOR_ROWS) // max(per_row, 1))
        cap = loaded.row_caps[key]
        # A batch that is filled up takes the memory of the larger one.
        return 1 << (cap.bit_length() - 1) if self.compiling.fills_up(loaded.family.components) else cap

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
        idle = [checkpoint for checkpoint in self._loaded if checkpoint not in busy]
        for checkpoint in idle:
            self._evict(checkpoint)
        return bool(idle)

    def offload_text_encoders(self, loaded: Loaded) -> bool:
        """Rung: text encoders leave until the next prompt. Whether any was there."""
        return loaded.family.components.put_away(TEXT_ENCODERS) > 0

    def offload_all(self, loaded: Loaded, phase: Phase) -> bool:
        """Rung: from now on only what a phase uses is on the device. Whether that is new."""
        if loaded.residency == "by_phase":
            return False
        loaded.residency = "by_phase"
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

    def _planned(self, loaded: Loaded, drawing: Drawing, *, busy: Collection[str]) -> MemoryPlan:
        family = loaded.family
        size = {"width_px": drawing.width_px, "height_px": drawing.height_px}
        n_rows = 2 if family.is_guided(drawing) else 1
        text_encoders = family.text_encoders(drawing)
        while True:
            idle = [c for c in self._loaded if c not in busy and self._loaded[c] is not loaded]
            # While an idle checkpoint could leave, no slower arrangement is considered.
            mode: MemoryMode = "fast" if idle and self._mode == "auto" else self._mode
            try:
                return plan(
                    family.components.weights(text_encoders=text_encoders),
                    activation_bytes=family.peak_bytes(**size, n_rows=n_rows),
                    decode_bytes=family.decode_bytes(**size),
                    free_bytes=self._room_for(loaded),
                    mode=mode,
                )
            except OutOfMemory as exc:
                if idle:
                    self._evict(idle[0])
                elif "text_encoder_3" in text_encoders:
                    hint = f"leave the T5 text encoder out (t5 'skip'), or {exc.hint}"
                    raise OutOfMemory(exc.message, hint=hint) from exc
                else:
                    raise

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
        self.executors.let_go(checkpoint)
        self.compiling.let_go(checkpoint)
        log.info("checkpoint left the device", extra={"checkpoint": checkpoint, "freed_bytes": freed})
