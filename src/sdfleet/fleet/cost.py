"""How long a job takes on a device: learnt from what jobs took, guessed from other models and devices before that.

One unit of work is one megapixel for one step. Seconds per unit are taken apart into how slow the device is and how
heavy the model is, so that a model never run on a device is known from both. What a pair has shown itself counts more.

>>> predictor = Predictor()
>>> slow, fast = DeviceId("slow"), DeviceId("fast")
>>> predictor.seed(slow, speed=1.0)
>>> predictor.seed(fast, speed=4.0)
>>> for _ in range(20):
...     _ = predictor.learn(slow, "sdxl", units=20.0, n_pictures=1, spent_s=40.0)
>>> round(predictor.unit_s(slow, "sdxl"), 2), round(predictor.unit_s(fast, "sdxl"), 1)     # never run on `fast`
(2.0, 0.5)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdfleet.fleet.state import DeviceId

# A model of which nothing is known, on a device of speed 1: SDXL's order of magnitude on a small GPU.
_FIRST_UNIT_S = 1.0
# Variances of natural logarithms. A seeded device is known within about a third, an unknown one within a factor of 3,
# as is an unknown model; two jobs of one pair differ by about a quarter (the spread assumed in the simulations).
_SEEDED_VAR, _UNKNOWN_VAR, _JOB_VAR = 0.1, 1.2, 0.0625
# Speeds change (heat, drivers, other programs): what is known never becomes surer than this.
_LEAST_VAR = 0.005
# Of a pair, the newest job counts at least a fifth: ten jobs after a change nine tenths of the old speed are forgotten.
_NEWEST_WEIGHT = 0.2
# Half a gigabyte a second is a SATA disk, the slowest thing that people keep models on and still wait for.
_FIRST_LOAD_BYTES_PER_S = 0.5e9
# A load whose bytes are not known: a model of 5 GB from that disk.
_FIRST_LOAD_S = 10.0
# So many jobs right after a load are not counted where nothing else is known of the model there.
_MOST_COLD = 2
# What one more picture in a batch saves while nothing was measured: below the half from which it pays to join equals.
_FIRST_SHARED = 0.3
# No step is free for a second picture; also keeps a bad fit from promising it.
_MOST_SHARED = 0.97


@dataclass(frozen=True, slots=True)
class Curve:
    """How a step grows with the pictures in it. shared: [0, 1), the part that all of them pay together.

    With 0 a step of k pictures takes k times as long as one of one, near 1 it hardly takes longer.

    >>> Curve(shared=0.5).stretch(1), Curve(shared=0.5).stretch(4)
    (1.0, 2.5)
    """

    shared: float = _FIRST_SHARED

    def stretch(self, n_pictures: float) -> float:
        """How many times longer a step of n pictures takes than one of one."""
        return self.shared + (1.0 - self.shared) * n_pictures

    @classmethod
    def fit(cls, step_s_by_pictures: Mapping[int, float]) -> Curve:
        """The line `base + k * each` through measured steps (pictures -> seconds), by least squares.

        >>> Curve.fit({1: 0.3, 2: 0.4, 4: 0.6})
        Curve(shared=0.666667)
        >>> Curve.fit({4: 0.6})                      # one size says nothing
        Curve(shared=0.3)
        """
        points = [(k, s) for k, s in step_s_by_pictures.items() if k >= 1 and s > 0 and math.isfinite(s)]
        if len(points) < 2:
            return cls()
        mean_k = sum(k for k, _ in points) / len(points)
        mean_s = sum(s for _, s in points) / len(points)
        each_s = sum((k - mean_k) * (s - mean_s) for k, s in points) / sum((k - mean_k) ** 2 for k, _ in points)
        one_s = mean_s + each_s * (1 - mean_k)
        if one_s <= 0:
            return cls(shared=0.0)
        return cls(shared=round(min(max(1.0 - each_s / one_s, 0.0), _MOST_SHARED), 6))


@dataclass(frozen=True, slots=True)
class Share:
    """One job in a device's steps. left_s: seconds until it ends were it one picture alone. kind: what may share steps.

    Jobs of one kind (model and size) share each step; kinds take turns.
    """

    left_s: float
    n_pictures: int
    kind: object
    curve: Curve


def ends_s(shares: Sequence[Share]) -> list[float]:
    """When each of these jobs ends, in seconds from now, if nobody joins; in their order.

    >>> half = Curve(shared=0.5)
    >>> ends_s([Share(10.0, 1, "a", half), Share(4.0, 1, "a", half)])    # a step of two takes 1.5 times as long
    [12.0, 6.0]
    >>> ends_s([Share(10.0, 1, "a", half), Share(4.0, 1, "b", half)])    # two kinds take turns
    [14.0, 8.0]
    """
    ends = [0.0] * len(shares)
    drawn_s = now_s = 0.0
    pictures: dict[object, int] = {}
    for share in shares:
        pictures[share.kind] = pictures.get(share.kind, 0) + share.n_pictures
    curves = {share.kind: share.curve for share in shares}
    for index in sorted(range(len(shares)), key=lambda index: shares[index].left_s):
        share = shares[index]
        stretch = sum(curves[kind].stretch(n) for kind, n in pictures.items() if n)
        now_s += (share.left_s - drawn_s) * stretch
        drawn_s = share.left_s
        ends[index] = now_s
        pictures[share.kind] -= share.n_pictures
    return ends


@dataclass(slots=True)
class _Term:
    """The logarithm of something, and how unsure it is."""

    log: float
    var: float

    def learn(self, rest: float, *, total_var: float) -> None:
        gain = self.var / total_var
        self.log += gain * rest
        self.var = max(self.var * (1.0 - gain), _LEAST_VAR)


@dataclass(slots=True)
class _Pair:
    """What one model took on one device: the logarithm of seconds per unit, as a moving mean."""

    log: float
    n_jobs: int = 1

    def learn(self, log: float) -> None:
        self.n_jobs += 1
        self.log += (log - self.log) * max(1.0 / self.n_jobs, _NEWEST_WEIGHT)


class Predictor:
    """What was learnt of devices and models. Grows with the pairs that have run, nothing else."""

    def __init__(self) -> None:
        self._slowness: dict[DeviceId, _Term] = {}
        self._weight: dict[str, _Term] = {}
        self._pairs: dict[tuple[DeviceId, str], _Pair] = {}
        self._n_cold: dict[tuple[DeviceId, str], int] = {}
        self._loads: dict[tuple[DeviceId, str], float] = {}
        self._load_bytes_per_s: dict[DeviceId, float] = {}
        self._curves: dict[tuple[DeviceId, str], Curve] = {}
        self._curve_of_model: dict[str, Curve] = {}
        self._errors: dict[DeviceId, tuple[float, int]] = {}

    def seed(self, device_id: DeviceId, *, speed: float) -> None:
        """A benchmark's word on the device: units per second over those of a device of speed 1, any model.

        Only believed until jobs have run there that say as much.
        """
        known = self._slowness.get(device_id)
        if known is None or known.var >= _SEEDED_VAR:
            self._slowness[device_id] = _Term(-math.log(_positive(speed)), _SEEDED_VAR)

    def learn(
        self,
        device_id: DeviceId,
        model: str,
        *,
        units: float,
        n_pictures: int,
        spent_s: float,
        mean_pictures: float | None = None,
        is_cold: bool = False,
    ) -> float:
        """Take in a finished job; gives the seconds it was predicted to take.

        units: of all its pictures together. spent_s: from first to last step, without the load. mean_pictures: how
        many pictures the device drew meanwhile on the mean, its own among them; None: only its own.
        is_cold: it was the first after a load, when caches are empty and kernels are not compiled. Believed for slow, a
        device gets nothing that could show it is not; so such a job counts only if there are no others.
        Nothing is learnt from a job of no work or no time.
        """
        stretch = self.curve(device_id, model).stretch(max(float(n_pictures), mean_pictures or 0.0))
        predicted_s = units / n_pictures * self.unit_s(device_id, model) * stretch
        if not (units > 0 and spent_s > 0 and math.isfinite(spent_s)):
            return predicted_s
        if is_cold:
            n_cold = self._n_cold[device_id, model] = self._n_cold.get((device_id, model), 0) + 1
            if n_cold <= _MOST_COLD or (device_id, model) in self._pairs:
                return predicted_s
        self._note_error(device_id, math.log(spent_s / predicted_s))
        log = math.log(spent_s * n_pictures / (units * stretch))
        device, weight = self._device(device_id), self._model(model)
        total_var = device.var + weight.var + _JOB_VAR
        rest = log - device.log - weight.log
        device.learn(rest, total_var=total_var)
        weight.learn(rest, total_var=total_var)
        pair = self._pairs.get((device_id, model))
        if pair is None:
            self._pairs[device_id, model] = _Pair(log)
        else:
            pair.learn(log)
        return predicted_s

    def learn_load(self, device_id: DeviceId, model: str, *, n_bytes: int, spent_s: float) -> None:
        """Take in what loading a model took."""
        if not (spent_s > 0 and math.isfinite(spent_s)):
            return
        old_s = self._loads.get((device_id, model), spent_s)
        self._loads[device_id, model] = old_s + (spent_s - old_s) / 3
        if n_bytes > 0:
            bytes_per_s = n_bytes / spent_s
            old = self._load_bytes_per_s.get(device_id, bytes_per_s)
            self._load_bytes_per_s[device_id] = old + (bytes_per_s - old) / 3

    def note_curve(self, device_id: DeviceId, model: str, step_s_by_pictures: Mapping[int, float]) -> None:
        """Take in the node's own measurements: pictures in a step -> seconds of that step. The newest replace."""
        if len(step_s_by_pictures) >= 2:
            curve = Curve.fit(step_s_by_pictures)
            self._curves[device_id, model] = self._curve_of_model[model] = curve

    def unit_s(self, device_id: DeviceId, model: str) -> float:
        """Seconds per unit of one picture alone: the pair's own if it has run, else device times model."""
        pair = self._pairs.get((device_id, model))
        return math.exp(self._device(device_id).log + self._model(model).log if pair is None else pair.log)

    def draw_s(self, device_id: DeviceId, model: str, *, units: float, n_pictures: int = 1) -> float:
        """Seconds to draw a job alone on the device. units: of all its pictures, which share their steps."""
        stretch = self.curve(device_id, model).stretch(n_pictures)
        return units / n_pictures * self.unit_s(device_id, model) * stretch

    def load_s(self, device_id: DeviceId, model: str, *, n_bytes: int) -> float:
        """Seconds to load a model: what it took there, else from its bytes (0: not known)."""
        known_s = self._loads.get((device_id, model))
        if known_s is not None:
            return known_s
        if n_bytes <= 0:
            return _FIRST_LOAD_S
        return n_bytes / self._load_bytes_per_s.get(device_id, _FIRST_LOAD_BYTES_PER_S)

    def curve(self, device_id: DeviceId, model: str) -> Curve:
        """How steps grow there: as the node measured it, else as another device measured the model."""
        return self._curves.get((device_id, model)) or self._curve_of_model.get(model) or Curve()

    def speed(self, device_id: DeviceId) -> float:
        """Units per second over those of a device of speed 1."""
        return math.exp(-self._device(device_id).log)

    def error(self, device_id: DeviceId) -> float | None:
        """How far predictions for the device are off, typically: 0.25 means a quarter. None: no job has ended there."""
        known = self._errors.get(device_id)
        return None if known is None else math.exp(known[0]) - 1.0

    def to_json(self) -> dict[str, Any]:
        """Everything that a router's restart must not lose, as plain data."""
        return {
            "v": 1,
            "slowness": [[device_id, term.log, term.var] for device_id, term in self._slowness.items()],
            "weight": [[model, term.log, term.var] for model, term in self._weight.items()],
            "pairs": [[*key, pair.log, pair.n_jobs] for key, pair in self._pairs.items()],
            "loads": [[*key, load_s] for key, load_s in self._loads.items()],
            "load_bytes_per_s": [list(one) for one in self._load_bytes_per_s.items()],
            "curves": [[*key, curve.shared] for key, curve in self._curves.items()],
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Predictor:
        """What `to_json` gave. Data of another version is left out: it is learnt again within a few jobs."""
        predictor = cls()
        if told.get("v") != 1:
            return predictor
        predictor._slowness = {DeviceId(name): _Term(log, var) for name, log, var in told["slowness"]}
        predictor._weight = {model: _Term(log, var) for model, log, var in told["weight"]}
        predictor._pairs = {(DeviceId(name), model): _Pair(log, n) for name, model, log, n in told["pairs"]}
        predictor._loads = {(DeviceId(name), model): load_s for name, model, load_s in told["loads"]}
        predictor._load_bytes_per_s = {DeviceId(name): speed for name, speed in told["load_bytes_per_s"]}
        predictor._curves = {(DeviceId(name), model): Curve(shared) for name, model, shared in told["curves"]}
        predictor._curve_of_model = {model: curve for (_, model), curve in predictor._curves.items()}
        return predictor

    def forget_device(self, device_id: DeviceId) -> None:
        """The device will not come back."""
        self._slowness.pop(device_id, None)
        self._load_bytes_per_s.pop(device_id, None)
        self._errors.pop(device_id, None)
        self._pairs = {key: pair for key, pair in self._pairs.items() if key[0] != device_id}
        self._n_cold = {key: n for key, n in self._n_cold.items() if key[0] != device_id}
        self._loads = {key: load_s for key, load_s in self._loads.items() if key[0] != device_id}
        self._curves = {key: curve for key, curve in self._curves.items() if key[0] != device_id}

    def _device(self, device_id: DeviceId) -> _Term:
        term = self._slowness.get(device_id)
        return self._slowness.setdefault(device_id, _Term(0.0, _UNKNOWN_VAR)) if term is None else term

    def _model(self, model: str) -> _Term:
        term = self._weight.get(model)
        first = _Term(math.log(_FIRST_UNIT_S), _UNKNOWN_VAR)
        return self._weight.setdefault(model, first) if term is None else term

    def _note_error(self, device_id: DeviceId, log_ratio: float) -> None:
        mean, n_jobs = self._errors.get(device_id, (0.0, 0))
        n_jobs += 1
        self._errors[device_id] = mean + (abs(log_ratio) - mean) * max(1.0 / n_jobs, 0.1), n_jobs


def _positive(speed: float) -> float:
    return speed if speed > 0 and math.isfinite(speed) else 1.0
