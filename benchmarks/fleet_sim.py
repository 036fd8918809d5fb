"""The real placement code under a virtual clock, against simpler ways to choose a device.

    python benchmarks/fleet_sim.py                       # the table: 30, 60, 85, 95 % load, 4 seeds x 4000 jobs
    python benchmarks/fleet_sim.py --burst 4 --sigma 0.6 --models 8 --loads 60 85
    python benchmarks/fleet_sim.py --batching            # devices that draw several pictures in shared steps
    python benchmarks/fleet_sim.py --scale               # CPU time of a decision, 5 to 10 000 devices

Five devices of speed 1, 1, 2, 4, 8 with memory for 1, 1, 2, 2, 3 models, which load in 30, 24, 15, 10, 5 s. Models are
asked for by Zipf's law, work is lognormal, and a job takes a lognormal factor (sigma) more or less than predicted.
`herd image` scores devices by what the last heartbeat (5 s) said: generating, free memory, CPU. `herd scorer` has seven
signals, points for a model in memory, a queue for each device and model, and moves jobs between long and short queues.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from sdfleet.domain import JobId
from sdfleet.fleet.board import total_stretch
from sdfleet.fleet.cost import Curve, Predictor, Share
from sdfleet.fleet.placement import Placement
from sdfleet.fleet.state import Device, DeviceId, LoadedModel, NodeId, RunningJob, WaitingJob

SPEEDS = (1.0, 1.0, 2.0, 4.0, 8.0)
PLACES = (1, 1, 2, 2, 3)
LOADS_S = (30.0, 24.0, 15.0, 10.0, 5.0)
# Seconds of a job on a device of speed 1. A model takes 8 GB.
MEAN_WORK_S, WORK_SIGMA = 60.0, 0.7
MODEL_GB = 8
MEMORY_GB = (16, 16, 32, 32, 64)
SAME_SIZE = 0.001
FOREVER_S = 1e18


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is simulated. load: [0, 1) of the fleet's speed that arrives as work. capacity, shared: of every device."""

    load: float
    n_jobs: int = 4000
    n_models: int = 4
    sigma: float = 0.25
    burst: int = 1
    capacity: int = 1
    shared: float = 0.0


@dataclass(slots=True)
class Task:
    """A job: work_s is predicted, true_s happens; both on a device of speed 1 that draws nothing else."""

    number: int
    model: str
    arrived_s: float
    work_s: float
    true_s: float
    left_s: float = 0.0
    finished_s: float = math.nan


@dataclass(slots=True)
class Machine:
    """A device as it is: what it draws, what it has in memory (the longest unused first), what was queued there."""

    number: int
    speed: float
    places: int
    load_s: float
    capacity: int
    curve: Curve
    running: list[Task] = field(default_factory=list)
    loading: list[tuple[Task, float]] = field(default_factory=list)  # each with the moment when it is loaded
    models: list[str] = field(default_factory=list)
    queue: deque[Task] = field(default_factory=deque)
    as_of_s: float = 0.0
    version: int = 0
    n_loads: int = 0
    told: tuple[bool, int] = (False, 0)  # generating and models in memory, as of the last heartbeat

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.loading

    def advance(self, now_s: float) -> None:
        """Let the running jobs come nearer to their ends."""
        if self.running:
            passed_s = (now_s - self.as_of_s) / self.stretch()
            for task in self.running:
                task.left_s -= passed_s
        self.as_of_s = now_s

    def stretch(self) -> float:
        return total_stretch(Share(0.0, 1, task.model, self.curve) for task in self.running)

    def next_end_s(self) -> float:
        if not self.running:
            return FOREVER_S
        return self.as_of_s + max(0.0, min(task.left_s for task in self.running)) * self.stretch()


class Policy:
    """Chooses a device when a job comes; each device then draws its queue in order."""

    name = ""
    beats = False  # whether it wants a heartbeat every 5 s

    def __init__(self, machines: list[Machine], seed: int) -> None:
        self.machines = machines
        self.random = random.Random(seed)

    def choose(self, task: Task, now_s: float) -> Machine:
        raise NotImplementedError

    def arrived(self, task: Task, now_s: float) -> list[tuple[Task, Machine]]:
        machine = self.choose(task, now_s)
        machine.queue.append(task)
        return self.freed(machine, now_s)

    def freed(self, machine: Machine, now_s: float) -> list[tuple[Task, Machine]]:
        return [(machine.queue.popleft(), machine)] if machine.is_idle and machine.queue else []

    def finished(self, task: Task, machine: Machine, now_s: float) -> None:
        """A job has ended."""

    def beat(self, now_s: float) -> list[tuple[Task, Machine]]:
        return []


class Random(Policy):
    name = "random"

    def choose(self, task: Task, now_s: float) -> Machine:
        return self.random.choice(self.machines)


class RoundRobin(Policy):
    name = "round robin"

    def choose(self, task: Task, now_s: float) -> Machine:
        return self.machines[task.number % len(self.machines)]


class LeastQueue(Policy):
    name = "least queue"

    def choose(self, task: Task, now_s: float) -> Machine:
        return min(self.machines, key=lambda m: (len(m.queue) + (not m.is_idle), self.random.random()))


class HerdImage(Policy):
    """Its score: -50 while generating, half a point per free GB, a fifth per percent of CPU (20 % while generating)."""

    name = "herd image"
    beats = True

    def choose(self, task: Task, now_s: float) -> Machine:
        return max(self.machines, key=self._points)

    def _points(self, machine: Machine) -> float:
        is_generating, n_models = machine.told
        return 0.5 * (MEMORY_GB[machine.number % 5] - n_models * MODEL_GB) - (54.0 if is_generating else 0.0)

    def beat(self, now_s: float) -> list[tuple[Task, Machine]]:
        for machine in self.machines:
            machine.told = (not machine.is_idle, len(machine.models))
        return []


class HerdScorer(Policy):
    """Its seven signals as far as they differ between devices, and its rebalancer; a full device is a last resort."""

    name = "herd scorer"
    beats = True

    def __init__(self, machines: list[Machine], seed: int) -> None:
        super().__init__(machines, seed)
        self.typical_s: dict[tuple[int, str], float] = {}

    def choose(self, task: Task, now_s: float) -> Machine:
        able = [m for m in self.machines if task.model in m.models or len(m.models) < m.places]
        return self._best(able or self.machines, task.model)

    def _best(self, machines: Sequence[Machine], model: str) -> Machine:
        return max(machines, key=lambda machine: (self._points(machine, model), self.random.random()))

    def _points(self, machine: Machine, model: str) -> float:
        depth = self._depth(machine, model)
        free = machine.places - len(machine.models)
        fit = 20.0 if model in machine.models or free > 2 else 15.0 if free == 2 else 3.0
        wait_s = depth * self.typical_s.get((machine.number, model), 30.0)
        thermal = 50.0 if model in machine.models else 10.0
        return thermal + fit - min(30.0, 6.0 * depth) - min(25.0, wait_s / 10.0)

    def finished(self, task: Task, machine: Machine, now_s: float) -> None:
        key = (machine.number, task.model)
        spent_s = task.true_s / machine.speed
        self.typical_s[key] = self.typical_s.get(key, spent_s) * 0.8 + spent_s * 0.2

    def beat(self, now_s: float) -> list[tuple[Task, Machine]]:
        begun = []
        for source, model in [(m, model) for m in self.machines for model in sorted({t.model for t in m.queue})]:
            queued = [task for task in source.queue if task.model == model]
            if len(queued) < 4:
                continue
            able = [m for m in self.machines if m is not source and self._depth(m, model) < 4]
            cold = [m for m in able if model not in m.models and len(m.models) < m.places]
            if cold:  # warmed in advance, in no time
                use(self._best(cold, model).models, model, len(MODELS))
            hot = [m for m in able if model in m.models]
            if hot:
                target = self._best(hot, model)
                for moved in queued[-min(3, len(queued) // 2) :]:
                    source.queue.remove(moved)
                    target.queue.append(moved)
                begun += self.freed(target, now_s)
        return begun

    @staticmethod
    def _depth(machine: Machine, model: str) -> int:
        queued = sum(task.model == model for task in machine.queue)
        return queued + sum(task.model == model for task in [*machine.running, *(task for task, _ in machine.loading)])


class EarliestFinish(Policy):
    """At arrival, with the same predictions as ours, and no price on loads."""

    name = "earliest finish"

    def __init__(self, machines: list[Machine], seed: int) -> None:
        super().__init__(machines, seed)
        self.free_s = {m.number: 0.0 for m in machines}
        self.models: dict[int, list[str]] = {m.number: [] for m in machines}

    def choose(self, task: Task, now_s: float) -> Machine:
        def finish_s(machine: Machine) -> float:
            load_s = 0.0 if task.model in self.models[machine.number] else machine.load_s
            return max(self.free_s[machine.number], now_s) + load_s + task.work_s / machine.speed

        best = min(self.machines, key=finish_s)
        self.free_s[best.number] = finish_s(best)
        use(self.models[best.number], task.model, best.places)
        return best

    def finished(self, task: Task, machine: Machine, now_s: float) -> None:
        left_s = sum(each.work_s for each in machine.queue) / machine.speed
        self.free_s[machine.number] = now_s + left_s


class Pull(Policy):
    """An idle device takes the first waiting job whose model it has, else the first."""

    name = "pull, warm first"

    def __init__(self, machines: list[Machine], seed: int) -> None:
        super().__init__(machines, seed)
        self.waiting: list[Task] = []

    def arrived(self, task: Task, now_s: float) -> list[tuple[Task, Machine]]:
        self.waiting.append(task)
        idle = [m for m in self.machines if m.is_idle]
        if not idle:
            return []
        return self.freed(self.random.choice(idle), now_s)

    def freed(self, machine: Machine, now_s: float) -> list[tuple[Task, Machine]]:
        if not machine.is_idle or not self.waiting:
            return []
        task = next((task for task in self.waiting if task.model in machine.models), self.waiting[0])
        self.waiting.remove(task)
        return [(task, machine)]


class Ours(Policy):
    """sdfleet.fleet.placement, told what a router would be told. knows_curve: whether nodes report their steps."""

    name = "sdfleet"
    knows_curve = True

    def __init__(self, machines: list[Machine], seed: int) -> None:
        super().__init__(machines, seed)
        self.waiting: dict[int, WaitingJob] = {}
        self.tasks: dict[str, Task] = {}
        self.units: dict[int, float] = {}
        self.cpu_s = 0.0
        self.n_asked = 0
        predictor = Predictor()
        self.placement = Placement(predictor)
        for m in machines:
            predictor.seed(device_id(m), speed=m.speed)
            for model in MODELS:
                predictor.learn_load(device_id(m), model, n_bytes=MODEL_GB << 30, spent_s=m.load_s)
                if self.knows_curve:
                    steps = {k: m.curve.stretch(k) for k in (1, 2, 4, 8)}
                    predictor.note_curve(device_id(m), model, steps)
                else:
                    predictor.note_curve(device_id(m), model, self.believed())
            self.placement.upsert(self.snapshot(m, 0.0))
        self.predictor = predictor

    @staticmethod
    def believed() -> dict[int, float]:
        return {}

    def arrived(self, task: Task, now_s: float) -> list[tuple[Task, Machine]]:
        # All pictures are of one size, so that they may share steps: work is steps, a thousand of them to a second.
        job = WaitingJob(
            job_id=JobId(str(task.number)),
            model=task.model,
            megapixels=SAME_SIZE,
            steps=max(1, round(task.work_s * 1000)),
        )
        self.waiting[task.number] = job
        self.tasks[job.job_id] = task
        return self.ask(now_s)

    def freed(self, machine: Machine, now_s: float) -> list[tuple[Task, Machine]]:
        self.placement.upsert(self.snapshot(machine, now_s))
        return self.ask(now_s)

    def finished(self, task: Task, machine: Machine, now_s: float) -> None:
        if machine.capacity == 1:  # with neighbours a router learns from steps, see `learn`; not needed here
            self.predictor.learn(
                device_id(machine),
                task.model,
                units=task.work_s,
                n_pictures=1,
                spent_s=task.true_s / machine.speed,
            )

    def ask(self, now_s: float) -> list[tuple[Task, Machine]]:
        begun_s = time.process_time()
        begun: list[tuple[Task, Machine]] = []
        while True:
            sent = self.placement.decide(self.in_line(now_s), n_waiting=len(self.waiting), now_s=now_s)
            self.n_asked += 1
            for dispatch in sent:
                task = self.tasks.pop(dispatch.job_id)
                del self.waiting[task.number]
                begun.append((task, self.machines[int(dispatch.device_id)]))
            if not sent:
                self.cpu_s += time.process_time() - begun_s
                return begun

    def in_line(self, now_s: float) -> Iterator[WaitingJob]:
        for job in self.waiting.values():
            yield replace(job, waited_s=now_s - self.tasks[job.job_id].arrived_s)

    def snapshot(self, machine: Machine, now_s: float) -> Device:
        return Device(
            device_id=device_id(machine),
            node_id=NodeId(str(machine.number)),
            name=f"d{machine.number}",
            heartbeat_s=FOREVER_S,
            memory_total_bytes=machine.places * MODEL_GB << 30,
            memory_free_bytes=(machine.places - len(machine.models)) * MODEL_GB << 30,
            capacity=machine.capacity,
            running=tuple(
                RunningJob(
                    job_id=JobId(str(task.number)),
                    model=task.model,
                    megapixels=SAME_SIZE,
                    n_pictures=1,
                    picture_units_left=max(0.0, task.left_s / task.true_s * machine.speed) * task.work_s,
                    as_of_s=now_s,
                    load_left_s=max(0.0, ready_s - now_s),
                )
                for task, ready_s in [*((task, now_s) for task in machine.running), *machine.loading]
            ),
            loaded=tuple(
                LoadedModel(model=model, n_bytes=MODEL_GB << 30, last_used_s=place)
                for place, model in enumerate(machine.models)
            ),
            on_disk=dict.fromkeys(MODELS, MODEL_GB << 30),
        )


class Curveless(Ours):
    """Ours where every place is taken for a device of its own: a step is believed to cost the same for any number."""

    name = "curve believed flat"
    knows_curve = False

    @staticmethod
    def believed() -> dict[int, float]:
        return {1: 1.0, 8: 1.0}


class Serial(Ours):
    """Ours where a second picture is believed to gain nothing."""

    name = "curve believed steep"
    knows_curve = False

    @staticmethod
    def believed() -> dict[int, float]:
        return {1: 1.0, 8: 8.0}


MODELS: list[str] = []
POLICIES: tuple[type[Policy], ...] = (
    Random, RoundRobin, LeastQueue, HerdImage, HerdScorer, EarliestFinish, Pull, Ours
)  # fmt: skip


def device_id(machine: Machine) -> DeviceId:
    return DeviceId(str(machine.number))


def use(models: list[str], model: str, places: int) -> bool:
    """Whether the model had to be loaded; it is the last used now."""
    is_cold = model not in models
    if not is_cold:
        models.remove(model)
    elif len(models) >= places:
        del models[0]
    models.append(model)
    return is_cold


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How long jobs took from their arrival, and how often a model was loaded for each of them."""

    spans_s: tuple[float, ...]
    loads_per_job: float
    cpu_per_job_s: float = 0.0

    @property
    def mean_s(self) -> float:
        return statistics.fmean(self.spans_s)

    def percentile_s(self, percent: int) -> float:
        return sorted(self.spans_s)[min(len(self.spans_s) - 1, len(self.spans_s) * percent // 100)]


def tasks_of(world: World, seed: int) -> list[Task]:
    """The jobs of a run: the same for every policy."""
    rng = random.Random(seed)
    names = [f"model{n}" for n in range(world.n_models)]
    weights = [1 / (n + 1) for n in range(world.n_models)]
    total = sum(SPEEDS) * (world.capacity / Curve(shared=world.shared).stretch(world.capacity))
    per_s = world.load * total / MEAN_WORK_S / world.burst
    tasks, now_s = [], 0.0
    for number in range(world.n_jobs):
        if number % world.burst == 0:
            now_s += rng.expovariate(per_s)
        work_s = rng.lognormvariate(math.log(MEAN_WORK_S) - WORK_SIGMA**2 / 2, WORK_SIGMA)
        factor = rng.lognormvariate(-(world.sigma**2) / 2, world.sigma)
        model = rng.choices(names, weights)[0]
        tasks.append(Task(number, model, now_s, work_s, work_s * factor))
    return tasks


def simulate(policy_of: type[Policy], world: World, seed: int) -> Outcome:
    """One policy through one run."""
    MODELS[:] = [f"model{n}" for n in range(world.n_models)]
    curve = Curve(shared=world.shared)
    machines = [
        Machine(number, speed, places, load_s, world.capacity, curve)
        for number, (speed, places, load_s) in enumerate(zip(SPEEDS, PLACES, LOADS_S, strict=True))
    ]
    return play(policy_of(machines, seed), machines, tasks_of(world, seed))


def play(policy: Policy, machines: Sequence[Machine], tasks: Sequence[Task]) -> Outcome:
    """These jobs on these machines, to the last one's end. MODELS must name what they ask for."""
    order = itertools.count()
    events: list[tuple[float, int, str, Task | None, Machine | None, int]] = [
        (task.arrived_s, next(order), "arrive", task, None, 0) for task in tasks
    ]
    heapq.heapify(events)
    if policy.beats:
        heapq.heappush(events, (0.0, next(order), "beat", None, None, 0))
    n_open = len(tasks)

    def watch(machine: Machine) -> None:
        machine.version += 1
        heapq.heappush(events, (machine.next_end_s(), next(order), "end", None, machine, machine.version))

    def begin(begun: Sequence[tuple[Task, Machine]], now_s: float) -> None:
        for task, machine in begun:
            task.left_s = task.true_s / machine.speed
            is_cold = use(machine.models, task.model, machine.places)
            machine.n_loads += is_cold
            ready_s = now_s + machine.load_s * is_cold
            machine.loading.append((task, ready_s))
            heapq.heappush(events, (ready_s, next(order), "ready", task, machine, 0))

    while n_open:
        now_s, _, kind, task, machine, version = heapq.heappop(events)
        if kind == "arrive":
            assert task is not None
            begin(policy.arrived(task, now_s), now_s)
        elif kind == "beat":
            begin(policy.beat(now_s), now_s)
            heapq.heappush(events, (now_s + 5.0, next(order), "beat", None, None, 0))
        elif kind == "ready":
            assert task is not None
            assert machine is not None
            machine.advance(now_s)
            machine.loading = [one for one in machine.loading if one[0] is not task]
            machine.running.append(task)
            watch(machine)
        elif machine is not None and version == machine.version:
            machine.advance(now_s)
            done = min(machine.running, key=lambda each: each.left_s)
            machine.running.remove(done)
            done.finished_s = now_s
            n_open -= 1
            watch(machine)
            policy.finished(done, machine, now_s)
            begin(policy.freed(machine, now_s), now_s)
    return Outcome(
        spans_s=tuple(task.finished_s - task.arrived_s for task in tasks),
        loads_per_job=sum(machine.n_loads for machine in machines) / len(tasks),
        cpu_per_job_s=getattr(policy, "cpu_s", 0.0) / len(tasks),
    )


def measured(policy_of: type[Policy], world: World, *, n_seeds: int) -> Outcome:
    """All seeds of one cell of the table."""
    outcomes = [simulate(policy_of, world, seed) for seed in range(n_seeds)]
    return Outcome(
        spans_s=tuple(itertools.chain.from_iterable(outcome.spans_s for outcome in outcomes)),
        loads_per_job=statistics.fmean(outcome.loads_per_job for outcome in outcomes),
        cpu_per_job_s=statistics.fmean(outcome.cpu_per_job_s for outcome in outcomes),
    )


# Our mean and p95 over those of another policy must be at most this, by load in percent.
GOALS: dict[str, dict[int, tuple[float | None, float | None]]] = {
    "herd image": {30: (0.62, 0.46), 60: (0.62, 0.46), 85: (0.15, None)},
    "herd scorer": {30: (0.65, 0.45), 60: (0.65, 0.45), 85: (0.65, 0.45)},
    "least queue": {30: (0.52, 0.32), 60: (0.52, 0.32), 85: (0.52, 0.32)},
    "pull, warm first": {30: (0.36, None), 60: (0.7, None), 85: (1.05, None)},
}


def print_table(policies: Sequence[type[Policy]], world: World, loads: Sequence[int], *, n_seeds: int) -> None:
    """A line for each policy and load, and ours over it."""
    print(f"{'policy':<22}{'load':>5}{'mean s':>9}{'p95':>8}{'p99':>8}{'loads/100':>11}   ours over it (goal)")
    for load in loads:
        at = replace(world, load=load / 100)
        ours = measured(Ours, at, n_seeds=n_seeds)
        for policy in policies:
            it = ours if policy is Ours else measured(policy, at, n_seeds=n_seeds)
            line = f"{policy.name:<22}{load:>4}%{it.mean_s:>9.1f}{it.percentile_s(95):>8.0f}{it.percentile_s(99):>8.0f}"
            line += f"{it.loads_per_job * 100:>11.1f}"
            if policy is Ours:
                print(f"{line}   {it.cpu_per_job_s * 1e6:.0f} us of CPU per job", flush=True)
                continue
            ratios = ours.mean_s / it.mean_s, ours.percentile_s(95) / it.percentile_s(95)
            goals = GOALS.get(policy.name, {}).get(load, (None, None))
            told = (f"{name} {ratio:.2f}" + (f" ({goal})" if goal else "") for name, ratio, goal in zip(
                ("mean", "p95"), ratios, goals, strict=True))  # fmt: skip
            print(f"{line}   {', '.join(told)}, loads {ours.loads_per_job / it.loads_per_job:.2f}", flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """CPU seconds of one event each: a snapshot of a device that has become free, and the decision for it."""

    n_devices: int
    n_sent: int
    events_s: tuple[float, ...]

    def percentile_s(self, percent: float) -> float:
        return sorted(self.events_s)[min(len(self.events_s) - 1, int(len(self.events_s) * percent / 100))]


def cost_of_decisions(n_devices: int, n_waiting: int, n_events: int, *, capacity: int = 1, seed: int = 0) -> Cost:
    """A fleet of all speeds, each with 10 of 20 models on disk and 2 in memory, and a queue that never gets shorter."""
    rng = random.Random(seed)
    names = [f"model{n}" for n in range(20)]
    weights = [1 / (n + 1) for n in range(20)]
    predictor = Predictor()
    placement = Placement(predictor)
    devices: dict[DeviceId, Device] = {}
    for number in range(n_devices):
        own = DeviceId(str(number))
        predictor.seed(own, speed=2 ** rng.uniform(0, 5))
        on_disk = dict.fromkeys(rng.sample(names, 10), MODEL_GB << 30)
        loaded = tuple(LoadedModel(model=model, n_bytes=MODEL_GB << 30) for model in rng.sample(sorted(on_disk), 2))
        devices[own] = Device(
            device_id=own,
            node_id=NodeId(own),
            name=own,
            heartbeat_s=FOREVER_S,
            memory_total_bytes=2 * MODEL_GB << 30,
            memory_free_bytes=0,
            capacity=capacity,
            loaded=loaded,
            on_disk=on_disk,
        )
        placement.upsert(devices[own])
    numbers = itertools.count()

    def new_job() -> WaitingJob:
        work_s = rng.lognormvariate(math.log(MEAN_WORK_S), WORK_SIGMA)
        model = rng.choices(names, weights)[0]
        return WaitingJob(job_id=JobId(str(next(numbers))), model=model, megapixels=work_s / 20, steps=20)

    waiting = {job.job_id: job for job in (new_job() for _ in range(min(n_waiting, 4000)))}
    came_s = dict.fromkeys(waiting, 0.0)
    ends: list[tuple[float, JobId, DeviceId]] = []

    def event(now_s: float) -> int:
        in_line = (replace(job, waited_s=now_s - came_s[job.job_id]) for job in waiting.values())
        sent = placement.decide(in_line, n_waiting=n_waiting, now_s=now_s)
        for one in sent:
            job = waiting.pop(one.job_id)
            del came_s[one.job_id]
            fresh = new_job()
            waiting[fresh.job_id] = fresh
            came_s[fresh.job_id] = now_s
            devices[one.device_id] = devices[one.device_id].with_job(one.running, evicts=one.evicts)
            draw_s = predictor.draw_s(one.device_id, job.model, units=job.units)
            end_s = now_s + one.running.load_left_s + draw_s * rng.lognormvariate(0.0, 0.25)
            heapq.heappush(ends, (end_s, one.job_id, one.device_id))
        return len(sent)

    while event(0.0):  # fill the fleet
        pass
    events_s, n_sent = [], 0
    for _ in range(n_events):
        if not ends:
            break
        now_s, job_id, own = heapq.heappop(ends)
        devices[own] = devices[own].without_job(job_id)
        begun_s = time.process_time()
        placement.upsert(devices[own])
        n_sent += event(now_s)
        events_s.append(time.process_time() - begun_s)
    return Cost(n_devices=n_devices, n_sent=n_sent, events_s=tuple(events_s))


def print_scale(n_waiting: int, n_events: int) -> None:
    print(f"{n_waiting} jobs wait; CPU of one event (a device became free: snapshot, decision, record of why), in us")
    print(f"{'devices':>8}{'pictures':>9}{'mean':>8}{'p50':>8}{'p99':>8}{'most':>8}{'sent per event':>16}")
    for capacity, n_devices in itertools.product((1, 4), (5, 50, 500, 2000, 10_000)):
        cost = cost_of_decisions(n_devices, n_waiting, n_events, capacity=capacity)
        figures = statistics.fmean(cost.events_s), *(cost.percentile_s(percent) for percent in (50, 99, 100))
        row = "".join(f"{figure * 1e6:>8.0f}" for figure in figures)
        print(f"{n_devices:>8}{capacity:>9}{row}{cost.n_sent / len(cost.events_s):>16.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--loads", type=int, nargs="+", default=[30, 60, 85, 95], help="percent of the fleet's speed")
    parser.add_argument("--jobs", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--sigma", type=float, default=0.25, help="how wrong predictions are")
    parser.add_argument("--burst", type=int, default=1, help="jobs that come at once")
    parser.add_argument("--policies", nargs="+", help="parts of their names; without it all")
    parser.add_argument("--batching", action="store_true", help="devices of 4 pictures, steps shared to 70 % and 20 %")
    parser.add_argument("--scale", action="store_true", help="CPU time of a decision, 5 to 10 000 devices")
    parser.add_argument("--waiting", type=int, default=100_000, help="with --scale: how many jobs wait")
    parser.add_argument("--events", type=int, default=2000, help="with --scale: events measured")
    asked = parser.parse_args()
    world = World(load=0.0, n_jobs=asked.jobs, n_models=asked.models, sigma=asked.sigma, burst=asked.burst)
    if asked.scale:
        print_scale(asked.waiting, asked.events)
    elif asked.batching:
        for shared in (0.7, 0.2):
            print(f"devices of 4 pictures, {shared:.0%} of a step is shared by all of them")
            batching = replace(world, capacity=4, shared=shared)
            print_table((Curveless, Serial, Ours), batching, asked.loads, n_seeds=asked.seeds)
    else:
        wanted = [one for one in POLICIES if not asked.policies or any(part in one.name for part in asked.policies)]
        print_table(wanted, world, asked.loads, n_seeds=asked.seeds)


if __name__ == "__main__":
    main()
