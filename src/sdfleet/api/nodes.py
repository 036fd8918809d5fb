"""The nodes behind this server, as Ollama Herd's clients and our dashboard read them; one machine is a fleet of one."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import psutil

from sdfleet import __version__
from sdfleet.compose import House
from sdfleet.compose.machine import BYTES_PER_GB, hardware
from sdfleet.language.asking import LanguageModel

if TYPE_CHECKING:
    from sdfleet.fleet.control import Fleet
    from sdfleet.fleet.members import Member

_STATUS = {"online": "online", "suspect": "degraded", "offline": "offline"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeNow:
    """How one node stands. name: for people. status: online, degraded or offline. told: what is only known of some.

    slots: pictures that it draws at once. n_free: pictures that it would take now. language: models that write, embed
    or listen; n_answers: of which so many answers are under way.
    """

    node: str
    name: str
    status: str
    version: str
    device: str
    hardware: Mapping[str, object]
    memory_total_bytes: int
    memory_free_bytes: int
    cpu_percent: float
    models: Sequence[str]
    loaded: Sequence[str]
    pinned: Sequence[str]
    n_jobs: int
    n_free: int
    slots: int
    swap_used_bytes: int = 0
    swap_total_bytes: int = 0
    told: Mapping[str, object] = field(default_factory=dict)
    language: Sequence[LanguageModel] = ()
    n_answers: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a node of `/fleet/status`."""
        share = 1.0 - self.memory_free_bytes / self.memory_total_bytes if self.memory_total_bytes else 0.0
        node: dict[str, Any] = {
            "node_id": self.node,
            "name": self.name,
            "status": self.status,
            "hardware": dict(self.hardware),
            "cpu": {"cores_physical": self.hardware.get("cores_physical", 1), "utilization_pct": self.cpu_percent},
            "memory": {
                "total_gb": _gb(self.memory_total_bytes),
                "used_gb": _gb(self.memory_total_bytes - self.memory_free_bytes),
                "available_gb": _gb(self.memory_free_bytes),
                "pressure": "critical" if share > 0.95 else "warn" if share > 0.85 else "normal",
                "wired_gb": 0,
                "compressed_gb": 0,
                "swap_used_gb": _gb(self.swap_used_bytes),
                "swap_total_gb": _gb(self.swap_total_bytes),
            },
            "ollama_url": "",
            "ollama": {
                "models_loaded": [model.name for model in self.language if model.is_warm],
                "models_available": [
                    model.name for model in self.language if "transcription" not in model.capabilities
                ],
                "requests_active": self.n_jobs + sum(self.n_answers.values()),
                "version": self.version,
            },
            "models_loaded_count": len(self.loaded),
            "free_slots": self.n_free,
            "slots": self.slots,
            "pinned": list(self.pinned),
            "device": {
                "name": self.device,
                "memory_total_bytes": self.memory_total_bytes,
                "memory_free_bytes": self.memory_free_bytes,
            },
            **self.told,
        }
        if self.models:  # absent, not null, where nothing draws
            node["image"] = {
                "models_available": [{"name": name, "binary": "sdfleet"} for name in self.models],
                "models_loaded": list(self.loaded),
                "generating": self.n_jobs > 0,
            }
        speech = [model.name for model in self.language if "transcription" in model.capabilities]
        if speech:
            node["transcription"] = {
                "models_available": [{"name": name, "binary": "faster-whisper"} for name in speech],
                "transcribing": any(self.n_answers.get(name) for name in speech),
            }
        return node


async def nodes_of(house: House) -> tuple[NodeNow, ...]:
    """Every node: those of the router's fleet, or this machine."""
    if house.fleet is not None:
        return tuple(_member(house.fleet, member) for member in house.fleet.members())
    return (await _this_machine(house),)


def holders_of(house: House, model: str) -> list[str]:
    """The nodes that can draw with a model now."""
    return [node_id()] if house.fleet is None else list(house.fleet.with_model(model))


def node_id() -> str:
    """This machine's name in the fleet."""
    return platform.node().partition(".")[0] or "localhost"


async def _this_machine(house: House) -> NodeNow:
    entries = await asyncio.to_thread(house.catalog.entries)
    names = {str(entry.folder): entry.card.name for entry in entries}
    standing, load, memory = house.runtime.capabilities(), house.desk.load(), psutil.virtual_memory()
    here, swap = house.runtime.residents.here(), psutil.swap_memory()
    return NodeNow(
        node=node_id(),
        name=node_id(),
        status="degraded" if standing.state in {"unavailable", "closed"} else "online",
        version=__version__,
        device=str(standing.facts.get("device", "unknown")),
        hardware=await asyncio.to_thread(hardware),
        memory_total_bytes=memory.total,
        memory_free_bytes=memory.available,
        cpu_percent=psutil.cpu_percent(),
        models=[entry.card.name for entry in entries],
        loaded=[names.get(each.checkpoint, each.checkpoint) for each in here],
        pinned=[names.get(each.checkpoint, each.checkpoint) for each in here if each.is_pinned],
        n_jobs=load.n_running,
        n_free=max(0, house.settings.max_queued - load.n_queued),
        slots=house.settings.max_pictures,
        swap_used_bytes=swap.used,
        swap_total_bytes=swap.total,
        told={"reason": standing.reason},
        language=house.language.models(),
        n_answers=house.language.running(),
    )


def _member(fleet: Fleet, member: Member) -> NodeNow:
    now_s = fleet.now_s()
    standing = member.standing(now_s)
    hello, beat = member.hello, member.heartbeat
    jobs = () if beat is None else beat.running
    n_pictures = sum(job.n_pictures for job in member.sent.values())
    device = member.device(now_s)
    slots = 0 if hello is None else hello.slots if device is None else device.capacity
    is_taking = device is not None and not device.is_draining
    facts = {} if hello is None else dict(hello.facts)
    return NodeNow(
        node=member.node,
        name=member.settled.name if hello is None else hello.name,
        status=_STATUS[standing],
        version="" if hello is None else hello.version,
        device="" if hello is None else hello.device,
        hardware=facts,
        memory_total_bytes=0 if hello is None else hello.memory_bytes,
        memory_free_bytes=0 if beat is None else beat.memory_free_bytes,
        cpu_percent=0.0 if beat is None else beat.cpu_percent,
        models=sorted(member.models()) if standing != "offline" else (),
        loaded=() if beat is None or standing == "offline" else beat.loaded,
        pinned=sorted(member.settled.pinned),
        n_jobs=len(member.sent),
        n_free=max(0, slots - n_pictures) if is_taking else 0,
        slots=slots,
        language=_language(member) if standing != "offline" else (),
        n_answers={} if beat is None else {one.model: one.n_running for one in beat.language},
        told={
            "is_draining": member.settled.is_draining,
            "reason": _reason(member, standing),
            "heard_s_ago": None if hello is None else round(now_s - member.heard_s, 1),
            "speed": round(fleet.speed(member.node), 3),
            "strangers": sorted(member.strangers),
            "running": [
                {"job_id": job.job, "part": round(job.part, 3), "eta_s": job.eta_s, "n_pictures": job.n_pictures}
                for job in jobs
            ],
        },
    )


def _language(member: Member) -> list[LanguageModel]:
    """Its language models, as its newest heartbeat has them."""
    hello, beat = member.hello, member.heartbeat
    warm = set() if beat is None else {one.model for one in beat.language if one.is_warm}
    models = () if hello is None else hello.language
    return [replace(model, is_warm=model.name in warm) for model in models]


def _reason(member: Member, standing: str) -> str:
    """Why a node draws nothing, in words; empty where it does."""
    if member.hello is None:
        return "not heard of since this router began: start it with `sdfleet node`"
    if standing != "online":
        return "not heard of: is it on, and does `sdfleet node` run there?"
    if member.settled.is_draining:
        return f"draining: sdfleet fleet undrain {member.node}"
    if member.heartbeat is not None and member.heartbeat.is_leaving:
        return "it is being stopped"
    return "" if member.heartbeat is None else member.heartbeat.reason


def _gb(n_bytes: int) -> float:
    return round(max(0, n_bytes) / BYTES_PER_GB, 2)
