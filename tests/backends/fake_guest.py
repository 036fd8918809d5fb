"""A made-up guest (no MLX, no model), so that what is around the real ones can be tested anywhere.

Run in the child's process by `engine/guests/launch.py`, with the standard library only. The first word of a prompt:

draw        stripes that depend on the seed
endless     a thousand small waits, told one by one
die         kills its own process in the second step
fault       raises what no one foresaw; short: says once that memory ran out; starved: every time
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
import weakref

from sdfleet.domain import Drawing, Picture, TokenCount
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.guests.fitting import Fit
from sdfleet.engine.guests.guest import GuestEngine, Memory, Sitting

CHECKPOINT_BYTES = 100


class FakeModel:
    dtype = "stripes"

    def __init__(self, guest: FakeGuest) -> None:
        self._guest = guest

    def read(self, drawing: Drawing) -> tuple[tuple[TokenCount, ...], tuple[str, ...]]:
        n_tokens = len(drawing.prompt.split())
        return (TokenCount(encoder="fake", n_tokens=n_tokens, window=9, n_chunks=1),), ("fake",)

    def draw(self, drawing: Drawing, seed: int, sitting: Sitting) -> Picture:
        sitting.enter("denoise")
        for step in range(1, drawing.steps + 1):
            if step == 2:
                self._guest.misbehave(drawing.prompt.split(maxsplit=1)[0])
            time.sleep(0.001)  # the work of a step
            sitting.step(step, drawing.steps, lambda: Picture(width_px=1, height_px=1, mode="L", data=b"\x00"))
        sitting.enter("decode")
        n_bytes = drawing.width_px * drawing.height_px * 3
        data = (hashlib.sha256(str(seed).encode()).digest() * (n_bytes // 32 + 1))[:n_bytes]
        return Picture(width_px=drawing.width_px, height_px=drawing.height_px, mode="RGB", data=data)


class FakeGuest:
    title = "fake 1"
    device = "fake"

    def __init__(self, *, room_bytes: int = 10 * CHECKPOINT_BYTES) -> None:
        self._room_bytes = room_bytes
        self._models: weakref.WeakSet[FakeModel] = weakref.WeakSet()
        self._n_faults = 0

    def fit(self, drawing: Drawing) -> Fit:
        del drawing
        return Fit(
            guest="mflux", kind="flux_dev", takes_guidance=True, takes_negative_prompt=False,
            weights_bytes=CHECKPOINT_BYTES,
        )  # fmt: skip

    def load(self, drawing: Drawing, fitted: Fit) -> FakeModel:
        del drawing, fitted
        model = FakeModel(self)
        self._models.add(model)
        return model

    def memory(self) -> Memory:
        held = len(self._models) * CHECKPOINT_BYTES
        total = self._room_bytes
        return Memory(active_bytes=held, peak_bytes=held, free_bytes=total - held, total_bytes=total)

    def release(self) -> None:
        pass

    def is_out_of_memory(self, exc: BaseException) -> bool:
        return isinstance(exc, MemoryError)

    def misbehave(self, word: str) -> None:
        self._n_faults += 1
        match word:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "fault":
                raise RuntimeError("the library fell over")
            case "short":
                if self._n_faults == 1:
                    raise MemoryError
            case "starved":
                raise MemoryError
            case _:
                pass


def open_engine(options: EngineOptions) -> GuestEngine:
    return GuestEngine(FakeGuest, options)


def open_narrow(options: EngineOptions) -> GuestEngine:
    """With room for two checkpoints and no third."""
    return GuestEngine(lambda: FakeGuest(room_bytes=int(2.5 * CHECKPOINT_BYTES)), options)


def open_pressed(options: EngineOptions) -> GuestEngine:
    """With hardly more room than one checkpoint takes."""
    return GuestEngine(lambda: FakeGuest(room_bytes=CHECKPOINT_BYTES + 1), options)
