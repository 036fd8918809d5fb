"""How long a job will take, from what finished jobs took.

What is measured is device time: while n pictures are drawn at once, each has 1/n of every second. So a number measured
in a full batch also holds for a queue in which the batches are full.

>>> estimates = Estimates()
>>> from dataclasses import replace
>>> shape = Shape(model="sd15", width_px=512, height_px=512, steps=20, n_pictures=1)
>>> estimates.seconds(shape) is None
True
>>> estimates.learn(shape, device_s=4.0)
>>> estimates.seconds(replace(shape, steps=30, n_pictures=2))
12.0
"""

from __future__ import annotations

from dataclasses import dataclass

# A new number counts a third: two or three jobs after a change of the load, the old speed is forgotten.
NEWEST_WEIGHT = 1 / 3
# Sizes of pictures are free for callers to choose: what is remembered of them is bounded.
MAX_REMEMBERED = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What decides how long a job takes."""

    model: str
    width_px: int
    height_px: int
    steps: int
    n_pictures: int

    @property
    def n_steps(self) -> int:
        """Steps of all pictures together."""
        return self.steps * self.n_pictures

    @property
    def cost(self) -> float:
        """Work in a unit that holds for every model: megapixels times steps."""
        return self.n_steps * self.width_px * self.height_px / 2**20


class Estimates:
    """Seconds of device time per step and picture, for each model and size."""

    def __init__(self) -> None:
        self._step_s: dict[tuple[str, int], float] = {}  # (model, area) -> seconds; the last learnt stands last

    def learn(self, shape: Shape, *, device_s: float) -> None:
        """Take in what a finished job took."""
        key = (shape.model, shape.width_px * shape.height_px)
        new_s = device_s / shape.n_steps
        old_s = self._step_s.pop(key, new_s)
        self._step_s[key] = old_s + (new_s - old_s) * NEWEST_WEIGHT
        if len(self._step_s) > MAX_REMEMBERED:
            del self._step_s[next(iter(self._step_s))]

    def seconds(self, shape: Shape) -> float | None:
        """Device time the job will take; None while nothing of its model was measured.

        A size not seen yet is taken from the nearest one, in proportion to the area.
        """
        area = shape.width_px * shape.height_px
        step_s = self._step_s.get((shape.model, area))
        if step_s is None:
            near = min(
                (key for key in self._step_s if key[0] == shape.model), key=lambda key: abs(key[1] - area), default=None
            )
            if near is None:
                return None
            step_s = self._step_s[near] * area / near[1]
        return step_s * shape.n_steps


class DeviceClock:
    """Shares every second among the pictures that are drawn in it.

    >>> clock = DeviceClock()
    >>> a = clock.begin(1, now_s=0.0)
    >>> b = clock.begin(3, now_s=2.0)
    >>> clock.end(a, now_s=6.0)  # 2 s alone, then a quarter of 4 s
    3.0
    >>> clock.end(b, now_s=7.0)  # three quarters of 4 s, then 1 s alone
    4.0
    """

    def __init__(self) -> None:
        self.n_pictures = 0
        self._per_picture_s = 0.0  # what one picture would have had, had it been there always
        self._now_s = 0.0

    def begin(self, n_pictures: int, *, now_s: float) -> tuple[int, float]:
        """A receipt for `end`."""
        self._advance(now_s)
        self.n_pictures += n_pictures
        return n_pictures, self._per_picture_s

    def end(self, begun: tuple[int, float], *, now_s: float) -> float:
        """The device time of a job, in seconds."""
        self._advance(now_s)
        n_pictures, since_s = begun
        self.n_pictures -= n_pictures
        return n_pictures * (self._per_picture_s - since_s)

    def _advance(self, now_s: float) -> None:
        if self.n_pictures:
            self._per_picture_s += (now_s - self._now_s) / self.n_pictures
        self._now_s = now_s
