"""The devices as placement sees them: numbers prepared, and lists by model in the order in which they become free.

Devices of about the same speed are one class. Within a class and a model only the time until a device is free matters,
so the first few of a sorted list stand for all of it: a choice among 10 000 devices looks at some dozens.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping

from sdfleet.fleet.cost import Curve, Predictor, Share, ends_s
from sdfleet.fleet.state import Device, DeviceId, Limits, WaitingJob

# A device not heard of for three heartbeats of 2 s gets no new job; after 15 s its node is dead and the router says so.
SUSPECT_AFTER_S = 6.0
# Speeds within a quarter are one class. Wider, and a choice within a class could cost a quarter of a job's drawing;
# narrower, and a fleet of all kinds has more classes to look at for each job.
_CLASS_WIDTH = math.log(1.25)
# So many of a class are weighed one by one, which makes the choice exact in a fleet of a few machines; of longer lists
# only the first, because its devices are then nearly alike (10 000 devices: see benchmarks/fleet_sim.py --scale).
_ALL_OF = 8
_FIRST_OF_MANY = 2
# Up to here every device is weighed for every job (96 jobs, 8 devices: under a millisecond).
_EXACT_FLEET = 8
# Devices that must refuse a job (silent, limits, memory) are passed over; after so many the list is given up.
_MOST_PASSED = 64

_Key = tuple[float, float, int]


class View:
    """What a device has: now, or with the jobs that the present walk would give it.

    all_s, open_s: when all its work is done, when it has room for another picture; -inf: already.
    n_taken: pictures being drawn. shares: their jobs, as at `as_of_s`; only kept where several share steps.
    warm: models in memory and their bytes, the longest unused first.
    """

    __slots__ = ("all_s", "as_of_s", "free_bytes", "n_taken", "open_s", "shares", "warm")

    def __init__(self, *, warm: dict[str, int], free_bytes: int) -> None:
        self.all_s = self.open_s = -math.inf
        self.as_of_s = 0.0
        self.n_taken = 0
        self.shares: list[Share] = []
        self.warm = warm
        self.free_bytes = free_bytes

    def copy(self) -> View:
        """The same, to be changed alone."""
        other = View(warm=dict(self.warm), free_bytes=self.free_bytes)
        other.all_s, other.open_s, other.as_of_s = self.all_s, self.open_s, self.as_of_s
        other.n_taken, other.shares = self.n_taken, list(self.shares)
        return other

    def set_shares(self, shares: list[Share], *, as_of_s: float, capacity: int) -> None:
        """Take in who draws now, and from it when there is room."""
        self.shares, self.as_of_s = shares, as_of_s
        self.n_taken = sum(share.n_pictures for share in shares)
        if not shares:
            self.all_s = self.open_s = -math.inf
            return
        ends = ends_s(shares)
        self.all_s = as_of_s + max(ends)
        self.open_s = -math.inf if self.n_taken < capacity else as_of_s + min(ends)

    def shares_at(self, now_s: float) -> list[Share]:
        """Who draws, each with what is left of it at `now_s`."""
        passed_s = now_s - self.as_of_s
        if passed_s <= 0 or not self.shares:
            return self.shares
        stretch = total_stretch(self.shares)
        return [
            Share(max(one.left_s - passed_s / stretch, 0.0), one.n_pictures, one.kind, one.curve) for one in self.shares
        ]


class Seat:
    """One device on the board, with what was predicted for it when its last snapshot came."""

    __slots__ = (
        "_curves",
        "_is_special",
        "_loads",
        "_most_bytes",
        "_predictor",
        "_units",
        "device",
        "key",
        "now",
        "number",
        "plan",
        "speed",
        "speed_class",
    )

    def __init__(self, device: Device, predictor: Predictor, *, number: int) -> None:
        self.device = device
        self.number = number
        self.speed = predictor.speed(device.device_id)
        self.speed_class = round(math.log(self.speed) / _CLASS_WIDTH)  # one class: within a quarter of each other
        self._predictor = predictor
        self._is_special = device.is_draining or bool(device.pinned) or device.limits != Limits()
        self._units: dict[str, float] = {}
        self._loads: dict[str, float] = {}
        self._curves: dict[str, Curve] = {}
        in_order = sorted(device.loaded, key=lambda one: one.last_used_s)
        self.now = View(warm={one.model: one.n_bytes for one in in_order}, free_bytes=device.memory_free_bytes)
        self.plan: View | None = None
        # Other programs may hold memory too: what is free and what models could give back is all there can be.
        self._most_bytes = min(device.memory_total_bytes, self.now.free_bytes + sum(self.now.warm.values()))
        self._take_in_running()
        # Idle devices come first, the fastest of them first.
        self.key: _Key = (self.now.all_s, -self.speed, number)

    @property
    def n_free(self) -> int:
        """How many more pictures it takes now."""
        return max(0, self.device.capacity - self.now.n_taken)

    def has_room(self, view: View, n_pictures: int) -> bool:
        """Whether so many pictures could begin: beside the others, or alone if they are more than the capacity."""
        return view.n_taken == 0 or view.n_taken + n_pictures <= self.device.capacity

    def unit_s(self, model: str) -> float:
        """Seconds per unit of one picture alone."""
        known_s = self._units.get(model)
        if known_s is None:
            known_s = self._units[model] = self._predictor.unit_s(self.device.device_id, model)
        return known_s

    def load_s(self, model: str) -> float:
        """Seconds to load a model from this device's disk."""
        known_s = self._loads.get(model)
        if known_s is None:
            n_bytes = self.device.on_disk.get(model, 0)
            known_s = self._loads[model] = self._predictor.load_s(self.device.device_id, model, n_bytes=n_bytes)
        return known_s

    def curve(self, model: str) -> Curve:
        """How a step grows with the pictures in it."""
        known = self._curves.get(model)
        if known is None:
            known = self._curves[model] = self._predictor.curve(self.device.device_id, model)
        return known

    def share_of(self, job: WaitingJob, *, load_s: float = 0.0) -> Share:
        """The job as one of those that share the device's steps."""
        left_s = job.picture_units * self.unit_s(job.model) + load_s
        return Share(left_s, job.n_pictures, (job.model, job.megapixels), self.curve(job.model))

    def in_use(self) -> set[str]:
        """Models that jobs on the device draw with."""
        return {job.model for job in self.device.running}

    def evictions(self, view: View, job: WaitingJob, *, is_idle: bool) -> tuple[str, ...] | None:
        """Models that must leave for the job, the longest unused first; None if it does not fit even so.

        is_idle: the job would begin when nothing else is drawn; else the models in use stay too.
        """
        need_bytes = job.work_bytes
        if job.model not in view.warm:
            need_bytes += self.device.on_disk[job.model]
        if need_bytes <= view.free_bytes:
            return ()
        kept = self.device.pinned | {job.model} | (set() if is_idle else self.in_use())
        gone: list[str] = []
        free_bytes = view.free_bytes
        for model, n_bytes in view.warm.items():
            if model in kept:
                continue
            gone.append(model)
            free_bytes += n_bytes
            if need_bytes <= free_bytes:
                return tuple(gone)
        return None

    def refusal(self, job: WaitingJob, *, now_s: float) -> str:
        """Why the device cannot have this job however long it waits, in words; empty if it can."""
        device, limits = self.device, self.device.limits
        silent_s = now_s - device.heartbeat_s
        if device.is_draining:
            return "it takes no new jobs (draining)"
        if silent_s > SUSPECT_AFTER_S:
            return f"not heard of for {silent_s:.0f} s"
        if job.model not in device.on_disk:
            return f"{job.model} is not there and would have to be pulled"
        if limits.only is not None and job.model not in limits.only:
            return f"its owner does not allow {job.model} there"
        if job.not_on and device.node_id in job.not_on:
            return "the job has failed there before"
        for limit, asked, name in (
            (limits.max_megapixels, job.megapixels, "megapixels"),
            (limits.max_steps, job.steps, "steps"),
            (limits.max_pictures, job.n_pictures, "pictures"),
        ):
            if limit is not None and asked > limit:
                return f"its owner allows {limit:g} {name} there, the job has {asked:g}"
        need_bytes = device.on_disk[job.model] + job.work_bytes
        pinned_bytes = sum(n for model, n in self.now.warm.items() if model in device.pinned and model != job.model)
        if need_bytes > self._most_bytes - pinned_bytes:
            beside = f" beside {pinned_bytes / 2**30:.1f} of pinned models" if pinned_bytes else ""
            most = (self._most_bytes - pinned_bytes) / 2**30
            return f"the job needs {need_bytes / 2**30:.1f} GiB, there are at most {most:.1f}{beside}"
        return ""

    def takes(self, job: WaitingJob, *, now_s: float) -> bool:
        """Whether `refusal` has nothing to say, without the words: asked for every device weighed."""
        device = self.device
        if now_s - device.heartbeat_s > SUSPECT_AFTER_S or self._is_special or job.not_on:
            return not self.refusal(job, now_s=now_s)
        n_bytes = device.on_disk.get(job.model)
        return n_bytes is not None and n_bytes + job.work_bytes <= self._most_bytes

    def _take_in_running(self) -> None:
        device = self.device
        if not device.running:
            return
        as_of_s = max(job.as_of_s for job in device.running)
        shares = []
        for job in device.running:
            left_s = job.picture_units_left * self.unit_s(job.model) + job.load_left_s - (as_of_s - job.as_of_s)
            shares.append(Share(max(left_s, 0.0), job.n_pictures, (job.model, job.megapixels), self.curve(job.model)))
        self.now.set_shares(shares, as_of_s=as_of_s, capacity=device.capacity)


class Bound:
    """What the best device found so far would cost."""

    __slots__ = ("cost_s",)

    def __init__(self) -> None:
        self.cost_s = math.inf


class Board:
    """All devices, and for each model those that have it in memory and those that have it only on disk."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.seats: dict[DeviceId, Seat] = {}
        self.total_speed = 0.0
        self.rooms: dict[DeviceId, Seat] = {}  # devices that take another picture now
        self.fresh: set[DeviceId] = set()  # those that have got room, or another model, since this was emptied
        self._numbers: dict[DeviceId, int] = {}
        self._n_seen = 0
        self._lists: dict[tuple[str, bool], dict[int, list[tuple[_Key, Seat]]]] = {}
        # Devices with a plan: all of them, and in a larger fleet by the models they would have, class by class.
        self._touched: list[Seat] = []
        self._planned: dict[str, dict[int, list[tuple[_Key, Seat]]]] = {}

    def __len__(self) -> int:
        return len(self.seats)

    def upsert(self, device: Device) -> Seat:
        """Take in a snapshot."""
        if device.device_id not in self._numbers:
            self._n_seen += 1
            self._numbers[device.device_id] = self._n_seen
        seat = self.seat_of(device)
        self.put(seat)
        return seat

    def seat_of(self, device: Device) -> Seat:
        """A known device as it might be, not yet on the board."""
        return Seat(device, self._predictor, number=self._numbers[device.device_id])

    def put(self, seat: Seat) -> None:
        """This is what the device is now."""
        device = seat.device
        before = self.seats.get(device.device_id)
        if before is not None:
            self._drop(before)
        self.seats[device.device_id] = seat
        self.total_speed += seat.speed
        for model, is_warm in self._listed(seat):
            classes = self._lists.setdefault((model, is_warm), {})
            insort(classes.setdefault(seat.speed_class, []), (seat.key, seat))
        if seat.n_free and not device.is_draining:
            self.rooms[device.device_id] = seat
        if before is None or _has_more_to_offer(before, seat):
            self.fresh.add(device.device_id)

    def remove(self, device_id: DeviceId) -> None:
        """Forget the device."""
        seat = self.seats.pop(device_id, None)
        if seat is not None:
            self._drop(seat)
            del self._numbers[device_id]
            self.fresh.discard(device_id)

    def has(self, model: str) -> bool:
        """Whether any device that takes jobs has the model."""
        return bool(self._lists.get((model, True)) or self._lists.get((model, False)))

    def near(self, job: WaitingJob, *, now_s: float, bound: Bound | None = None) -> Iterator[Seat]:
        """The devices worth weighing for this job: of each class those that are free first and take it.

        bound: what the best so far costs, kept by the caller; a device that is busy for longer is not given.

        In a larger fleet those that would have to load and have no room now are left out, unless there are no others.
        """
        bound = bound or Bound()
        is_exact = len(self.seats) <= _EXACT_FLEET
        n_found = 0
        for is_warm in (True, False):
            until_s = math.inf if is_warm or is_exact else now_s
            for entries in self._lists.get((job.model, is_warm), _NONE).values():
                for seat in _first(entries, job, now_s=now_s, until_s=until_s, bound=bound):
                    n_found += 1
                    yield seat
            if is_warm:
                for entries in self._planned.get(job.model, _NONE).values():
                    for seat in _first(entries, job, now_s=now_s, until_s=math.inf, bound=bound, is_planned=True):
                        n_found += 1
                        yield seat
        if is_exact:
            for seat in self._touched:
                if seat.takes(job, now_s=now_s):
                    yield seat
        elif not n_found:
            for entries in self._lists.get((job.model, False), _NONE).values():
                yield from _first(entries, job, now_s=now_s, until_s=math.inf, bound=bound)

    def set_plan(self, seat: Seat, plan: View) -> None:
        """From here to `clear_plans` the device is weighed with these times and models."""
        before, seat.plan = seat.plan, plan
        if before is None:
            self._touched.append(seat)
        if len(self.seats) <= _EXACT_FLEET:
            return
        if before is not None:
            for model in before.warm:
                _remove(self._planned[model][seat.speed_class], (before.all_s, 0.0, seat.number))
        for model in plan.warm:
            classes = self._planned.setdefault(model, {})
            insort(classes.setdefault(seat.speed_class, []), ((plan.all_s, 0.0, seat.number), seat))

    def clear_plans(self) -> None:
        """Back to what the devices have."""
        for seat in self._touched:
            seat.plan = None
        self._touched = []
        self._planned = {}

    def _drop(self, seat: Seat) -> None:
        self.total_speed -= seat.speed
        self.rooms.pop(seat.device.device_id, None)
        for listed in self._listed(seat):
            classes = self._lists[listed]
            entries = classes[seat.speed_class]
            _remove(entries, seat.key)
            if not entries:
                del classes[seat.speed_class]
                if not classes:
                    del self._lists[listed]

    @staticmethod
    def _listed(seat: Seat) -> Iterator[tuple[str, bool]]:
        if not seat.device.is_draining:
            for model in seat.device.on_disk:
                yield model, model in seat.now.warm


_NONE: Mapping[int, list[tuple[_Key, Seat]]] = {}


def total_stretch(shares: Iterable[Share]) -> float:
    """How many times longer a step of every kind takes than one step of one picture."""
    pictures: dict[object, int] = {}
    curves: dict[object, Curve] = {}
    for share in shares:
        pictures[share.kind] = pictures.get(share.kind, 0) + share.n_pictures
        curves[share.kind] = share.curve
    return sum(curves[kind].stretch(n) for kind, n in pictures.items())


def _has_more_to_offer(before: Seat, after: Seat) -> bool:
    if after.n_free > before.n_free or (before.device.is_draining and not after.device.is_draining):
        return True
    if not after.n_free:
        return False
    return (
        before.now.warm.keys() != after.now.warm.keys() or before.device.on_disk.keys() != after.device.on_disk.keys()
    )


def _first(
    entries: list[tuple[_Key, Seat]],
    job: WaitingJob,
    *,
    now_s: float,
    until_s: float,
    bound: Bound,
    is_planned: bool = False,
) -> Iterator[Seat]:
    n_wanted = _ALL_OF if len(entries) <= _ALL_OF else _FIRST_OF_MANY
    n_passed = 0
    for key, seat in entries:
        # Who shares steps may be joined before all its work is done.
        if key[0] > until_s or (key[0] - now_s >= bound.cost_s and seat.device.capacity == 1):
            return
        # One with a plan stands among the planned, with another time.
        if (seat.plan is not None) is is_planned and seat.takes(job, now_s=now_s):
            yield seat
            n_wanted -= 1
            if not n_wanted:
                return
        else:
            n_passed += 1
            if n_passed > _MOST_PASSED:
                return


def _remove(entries: list[tuple[_Key, Seat]], key: _Key) -> None:
    del entries[bisect_left(entries, key, key=lambda entry: entry[0])]
