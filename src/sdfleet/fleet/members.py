"""The nodes as the router sees them: who they said they are, when they were last heard, what was sent to each.

A node that is silent is suspect after 6 s and dead after 15 s; a node that says another `boot` has lost what it did.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from sdfleet.domain import ImageRequest, JobId
from sdfleet.fleet.messages import DEAD_S, SUSPECT_S, AdapterHere, Heartbeat, Hello, ModelHere
from sdfleet.fleet.state import Device, DeviceId, Limits, LoadedModel, NodeId, RunningJob

log = logging.getLogger(__name__)

Standing = Literal["online", "suspect", "offline"]

# No device we measured gains from more rows in one step (engine/batcher.py); a node that claims more gets no more.
MOST_SLOTS = 64
# Free memory moves with every heartbeat; smaller moves than this change no decision.
MEMORY_STEP_BYTES = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What the owner of the fleet decided about a node; it outlives restarts. secret: signs what the node is told."""

    node: str
    secret: bytes = field(repr=False)
    name: str = ""
    is_draining: bool = False
    pinned: frozenset[str] = frozenset()
    limits: Limits = field(default_factory=Limits)
    max_pictures: int | None = None


@dataclass(slots=True, eq=False)
class Member:
    """One node. Times are of the router's loop.

    sent: jobs given to it whose computing has not ended. found: jobs that it draws, says its heartbeat, and that this
    router has not given to it: an earlier life of the router did, or another. closed_until_s: it said it was busy.
    strangers: models that it has and that are others than the fleet's of that name.
    """

    settled: Settled
    hello: Hello | None = None
    heartbeat: Heartbeat | None = None
    heard_s: float = float("-inf")
    sent: dict[JobId, RunningJob] = field(default_factory=dict)
    found: tuple[RunningJob, ...] = ()
    closed_until_s: float = float("-inf")
    strangers: frozenset[str] = frozenset()
    _picture_s: float = 0.0
    _counted_s: float = float("-inf")

    @property
    def node(self) -> str:
        return self.settled.node

    def standing(self, now_s: float) -> Standing:
        """By when it was last heard."""
        silent_s = now_s - self.heard_s
        if self.hello is None or silent_s >= DEAD_S:
            return "offline"
        return "suspect" if silent_s >= SUSPECT_S else "online"

    def has(self, job: JobId) -> bool:
        """Whether its newest heartbeat names the job, as being drawn or waiting to be fetched."""
        return job in self.held()

    def held(self) -> tuple[JobId, ...]:
        """Every job that its newest heartbeat names."""
        beat = self.heartbeat
        if beat is None:
            return ()
        return (*(each.job for each in beat.spool), *(each.job for each in beat.running))

    def models(self) -> Mapping[str, ModelHere]:
        """What can be drawn there."""
        if self.hello is None:
            return {}
        return {model.name: model for model in self.hello.models if model.name not in self.strangers}

    def adapters(self) -> frozenset[tuple[str, str]]:
        """Kind and name of every LoRA and embedding there."""
        return frozenset() if self.hello is None else frozenset((one.kind, one.name) for one in self.hello.adapters)

    def give(self, running: RunningJob, *, now_s: float) -> None:
        """The job is being drawn there from now on."""
        self._count(now_s)
        self.sent[running.job_id] = running

    def free(self, job: JobId, *, now_s: float) -> bool:
        """The job takes no room there any more; False if it took none."""
        self._count(now_s)
        return self.sent.pop(job, None) is not None

    def picture_s(self, now_s: float) -> float:
        """Pictures drawn at once, summed over the seconds: the difference over the time is their mean number."""
        self._count(now_s)
        return self._picture_s

    def _count(self, now_s: float) -> None:
        if self.sent:
            self._picture_s += sum(job.n_pictures for job in self.sent.values()) * (now_s - self._counted_s)
        self._counted_s = now_s

    def device(self, now_s: float) -> Device | None:
        """What placement is told; None while nothing can be sent there."""
        hello, beat = self.hello, self.heartbeat
        if hello is None or beat is None or self.standing(now_s) != "online" or beat.is_leaving:
            return None
        if now_s < self.closed_until_s:
            return None
        models = self.models()
        sizes = {name: model.n_bytes for name, model in models.items()}
        slots = min(beat.slots, MOST_SLOTS)
        if self.settled.max_pictures is not None:
            slots = min(slots, self.settled.max_pictures)
        return Device(
            device_id=DeviceId(self.node),
            node_id=NodeId(self.node),
            name=self.settled.name or hello.name,
            # A node that falls silent is taken off the board, so that none on it is ever suspect; and a heartbeat that
            # says nothing new changes nothing there.
            heartbeat_s=math.inf,
            memory_total_bytes=max(hello.memory_bytes, beat.memory_total_bytes),
            memory_free_bytes=beat.memory_free_bytes // MEMORY_STEP_BYTES * MEMORY_STEP_BYTES,
            capacity=max(1, slots),
            running=(*self.sent.values(), *self.found),
            loaded=tuple(LoadedModel(model=name, n_bytes=sizes.get(name, 0)) for name in beat.loaded),
            on_disk=sizes,
            pinned=frozenset(beat.pinned) | self.settled.pinned,
            is_draining=self.settled.is_draining,
            limits=self.settled.limits,
        )


class Members:
    """All nodes that may take part. changed: called with the id of a node whose device is another now."""

    def __init__(self, *, clock: Callable[[], float], changed: Callable[[str], None]) -> None:
        self.now_s = clock
        self._changed = changed
        self._members: dict[str, Member] = {}
        self._standings: dict[str, Standing] = {}
        self._votes: dict[str, Counter[str]] = {}
        self._models: Mapping[str, ModelHere] = {}
        self._is_deaf = False

    def admit(self, settled: Iterable[Settled]) -> tuple[str, ...]:
        """Who may take part from now on, and what was decided about them. Gives back who may not any more."""
        wanted = {each.node: each for each in settled}
        gone = tuple(node for node in self._members if node not in wanted)
        for node in gone:
            member = self._members.pop(node)
            self._standings.pop(node, None)
            self._compare_models(member, () if member.hello is None else member.hello.models, ())
            self._changed(node)
        for node, each in wanted.items():
            member = self._members.setdefault(node, Member(each))
            if member.settled != each:
                member.settled = each
                self._changed(node)
        return gone

    def all(self) -> tuple[Member, ...]:
        """Every node that may take part, heard of or not."""
        return tuple(self._members.values())

    def get(self, node: str) -> Member | None:
        """The node of that id."""
        return self._members.get(node)

    def take_hello(self, node: str, hello: Hello) -> None:
        """Take in who a node is."""
        member = self._members.get(node)
        if member is None:
            return
        before = member.hello
        if before is not None and before.boot != hello.boot:
            member.heartbeat = None  # of another process, which is over
            member.found = ()
        member.hello = hello
        member.heard_s = self.now_s()
        self._compare_models(member, () if before is None else before.models, hello.models)
        self._changed(node)

    def take_heartbeat(self, node: str, beat: Heartbeat) -> bool:
        """Take in how a node stands. False: who it is must be asked first."""
        member = self._members.get(node)
        if member is None:
            return True
        member.heard_s = self.now_s()
        if member.hello is None or member.hello.boot != beat.boot:
            return False
        last = member.heartbeat
        if last is not None and last.seq >= beat.seq:
            return True  # an older one came late
        member.heartbeat = beat
        return member.hello.hello >= beat.hello

    def hear_nothing(self, *, is_deaf: bool) -> None:
        """The router's own connection is lost (True): then silence says nothing about the nodes. Or it is back."""
        if self._is_deaf and not is_deaf:
            now_s = self.now_s()
            for member in self._members.values():
                if self._standings.get(member.node) in {"online", "suspect"}:
                    member.heard_s = now_s
        self._is_deaf = is_deaf

    def was_away(self) -> None:
        """The router itself stood still for a while: every node has its time anew to be heard."""
        if not self._is_deaf:
            self.hear_nothing(is_deaf=True)
            self.hear_nothing(is_deaf=False)

    def review(self) -> tuple[str, ...]:
        """Look at the clock; gives back the nodes that have died since the last look."""
        died = []
        if self._is_deaf:
            return ()
        for node, member in self._members.items():
            now = member.standing(self.now_s())
            before = self._standings.get(node, "offline")
            if now == before:
                continue
            self._standings[node] = now
            log.info("a node's standing has changed", extra={"node": node, "standing": now})
            if now == "offline":
                died.append(node)
            self._changed(node)
        return tuple(died)

    def is_silent(self, node: str, *, since_s: float, now_s: float) -> bool:
        """Whether a node is taken for dead. since_s: for one that was never heard, from when on that counts."""
        if self._is_deaf:
            return False
        member = self._members.get(node)
        if member is None:
            return True
        return now_s - (member.heard_s if math.isfinite(member.heard_s) else since_s) >= DEAD_S

    def close_for(self, node: str, seconds: float) -> None:
        """A node has said that it is busy: nothing is sent there for so long."""
        member = self._members.get(node)
        if member is not None:
            member.closed_until_s = self.now_s() + seconds
            self._changed(node)
            asyncio.get_running_loop().call_later(seconds + 0.001, self._changed, node)

    def models(self) -> Mapping[str, ModelHere]:
        """Every model of a node that may take part, here or away for a while. May be asked in any thread."""
        return self._models

    def at(self, model: str) -> tuple[str, ...]:
        """The nodes that can draw with a model."""
        online = [m for m in self._members.values() if m.standing(self.now_s()) != "offline"]
        return tuple(member.node for member in online if model in member.models())

    def able(self, request: ImageRequest) -> tuple[str, ...]:
        """The nodes that have the model and every LoRA of a request."""
        wanted = {("lora", use.name) for use in request.loras}
        return tuple(node for node in self.at(request.model) if wanted <= self._members[node].adapters())

    def adapters(self) -> Mapping[tuple[str, str], AdapterHere]:
        """Every LoRA and embedding of a node that may take part, by kind and name."""
        found: dict[tuple[str, str], AdapterHere] = {}
        for member in tuple(self._members.values()):
            for one in () if member.hello is None else member.hello.adapters:
                found.setdefault((one.kind, one.name), one)
        return found

    def _compare_models(self, member: Member, before: tuple[ModelHere, ...], now: tuple[ModelHere, ...]) -> None:
        """A node has other models than before. Of two different ones with one name, that of more nodes is the fleet's.

        Looks at this node alone, unless the choice of a name has changed: after a router's start a thousand nodes say
        who they are within seconds.
        """
        if before == now:
            return
        names = {model.name for model in (*before, *now)}
        chosen = {name: self._chosen(name) for name in names}
        for model in before:
            self._votes[model.name][model.identity] -= 1
        for model in now:
            self._votes.setdefault(model.name, Counter())[model.identity] += 1
        moved = {name for name in names if self._chosen(name) != chosen[name]}
        touched = [m for m in self._members.values() if moved and m.hello is not None] if moved else [member]
        for each in touched:
            self._find_strangers(each)
        models = dict(self._models)
        for name in names:
            models.pop(name, None)
            identity = self._chosen(name)
            for model in now:
                if model.name == name and model.identity == identity:
                    models[name] = model
            if name not in models and identity is not None:
                others = (m.models().get(name) for m in self._members.values())
                found = next((one for one in others if one is not None), None)
                if found is not None:
                    models[name] = found
        self._models = models

    def _chosen(self, name: str) -> str | None:
        """The identity of the fleet's model of that name; None where no node has one."""
        votes = {identity: n for identity, n in self._votes.get(name, {}).items() if n > 0}
        if not votes:
            self._votes.pop(name, None)
            return None
        return max(sorted(votes), key=votes.__getitem__)

    def _find_strangers(self, member: Member) -> None:
        models = () if member.hello is None else member.hello.models
        strangers = frozenset(model.name for model in models if model.identity != self._chosen(model.name))
        if strangers - member.strangers:
            log.warning(
                "a node's model is another than the fleet's of that name",
                extra={"node": member.node, "models": sorted(strangers - member.strangers)},
            )
        if strangers != member.strangers:
            member.strangers = strangers
            self._changed(member.node)


def with_progress(running: RunningJob, *, part_left: float, units: float, now_s: float) -> RunningJob:
    """A job that a node told about. part_left: 0 to 1; units: of one of its pictures."""
    return replace(running, picture_units_left=units * part_left, as_of_s=now_s, load_left_s=0.0)
