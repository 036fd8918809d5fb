"""How long a step of so many pictures takes, as it was measured: for whoever decides where a job is drawn."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from sdfleet.engine.batcher import Batcher


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What a checkpoint drew last: the batcher's key for it, and the size of its pictures."""

    key: Hashable
    megapixels: float
    rows_per_picture: int


class StepCurves:
    """Of each checkpoint, for the kind of picture that it drew last."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._drawn: dict[str, _Drawn] = {}

    def note(self, checkpoint: str, key: Hashable, *, width_px: int, height_px: int, rows_per_picture: int) -> None:
        """Such a picture has had a step."""
        self._drawn[checkpoint] = _Drawn(key, width_px * height_px / 2**20, rows_per_picture)

    def told(self, checkpoints: tuple[str, ...]) -> list[Mapping[str, object]]:
        """For those of these that were measured: `picture_s` has pairs of pictures in a step, and its seconds."""
        found: list[Mapping[str, object]] = []
        for checkpoint in checkpoints:
            drawn = self._drawn.get(checkpoint)
            if drawn is None:
                continue
            pairs = [
                [n_rows // drawn.rows_per_picture, round(seconds, 5)]
                for n_rows, seconds in sorted(self._batcher.measured(drawn.key).items())
                if n_rows % drawn.rows_per_picture == 0
            ]
            if pairs:
                found.append({"checkpoint": checkpoint, "megapixels": drawn.megapixels, "picture_s": pairs})
        return found
