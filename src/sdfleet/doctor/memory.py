"""Whether the models that are here fit into the memory that is: the machine's, and what its container may take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdfleet.doctor.entry import Entry, Finding, fault, not_applicable, ok, warning
from sdfleet.doctor.machine import Machine, gb
from sdfleet.errors import CheckpointError, SdfleetError

# Beside its weights a process has torch, activations and a picture. Measured 1.1 GB for torch and a small model.
BESIDE_WEIGHTS_BYTES = 1_500_000_000
# Version 1 says "no limit" with a number near the largest it has.
NO_LIMIT_BYTES = 2**60


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A control group with a limit of memory. n_killed: processes that the system killed for it."""

    name: str
    limit_bytes: int
    used_bytes: int | None
    n_killed: int


def container(machine: Machine) -> Finding:
    """Whether the container, service or job that this runs in may take as much memory as the largest model needs."""
    groups = list(_groups(machine))
    if not groups:
        return not_applicable("no control group limits the memory here")
    least = min(groups, key=lambda group: group.limit_bytes)
    killed = sum(group.n_killed for group in groups)
    has = f"the control group {least.name} allows {gb(least.limit_bytes)}"
    model, n_bytes = _largest(machine)
    needed = n_bytes + BESIDE_WEIGHTS_BYTES
    if machine.settings.device in {"auto", "cpu"} and needed > least.limit_bytes:
        return fault(f"{has}; {model} needs {gb(needed)}: the system will kill the engine (SIGKILL, exit code 137)")
    if killed:
        return warning(f"{has}; the system has killed {killed} of its processes for memory so far")
    return ok(f"{has}; the largest model here needs {gb(needed)}")


def room(machine: Machine) -> Finding:
    """Whether the default model fits into what is free now."""
    memory = machine.memory()
    name, n_bytes = _weights(machine, machine.settings.model)
    if not name:
        return not_applicable(f"the weights of {machine.settings.model} are not here")
    limit = machine.settings.memory_limit
    most = memory.total if limit is None else min(memory.total, limit)
    needed = n_bytes + BESIDE_WEIGHTS_BYTES
    if needed > most:
        whose = "this machine has" if limit is None else "SD_MEMORY_LIMIT gives"
        return fault(
            f"{name} needs {gb(needed)} and {whose} {gb(most)}",
            "SD_MEMORY_MODE=eco with SD_WEIGHTS=fp8, or a smaller model: sdfleet models list",
        )
    if needed > memory.available:
        return warning(f"{name} needs {gb(needed)} and {gb(memory.available)} of {gb(memory.total)} are free now")
    return ok(f"{gb(memory.available)} of {gb(memory.total)} are free; {name} needs {gb(needed)}")


def swap(machine: Machine) -> Finding:
    """Whether the machine is pushing memory to the disk."""
    memory = machine.memory()
    if not memory.swap_total:
        return ok("there is no swap: what does not fit is killed, not slow")
    used = f"{gb(memory.swap_used)} of {gb(memory.swap_total)} of swap are used"
    is_tight = memory.available < memory.total / 10
    if is_tight and memory.swap_used > memory.swap_total / 4:
        return warning(f"{used}, and {gb(memory.available)} of memory are left: steps wait for the disk")
    return ok(used)


def _groups(machine: Machine) -> Iterator[Group]:
    """The groups with a limit, from our own up to the root; of both versions of the system's interface."""
    try:
        lines = (machine.proc / "self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", "", ""][:3]
        if controllers == "":
            tree, limit, used = machine.cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            tree, limit, used = machine.cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # Within a container the path may be one of the host, of which only the container's own top is seen.
        own = tree / path.lstrip("/")
        for folder in dict.fromkeys((own, *own.parents)):
            if folder == tree.parent or not folder.is_relative_to(tree):
                break
            limit_bytes = _number(folder / limit)
            if limit_bytes is not None and limit_bytes < NO_LIMIT_BYTES:
                shown = str(folder.relative_to(tree))
                yield Group(
                    name="/" if shown == "." else f"/{shown}",
                    limit_bytes=limit_bytes,
                    used_bytes=_number(folder / used),
                    n_killed=_killed(folder),
                )


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _killed(folder: Path) -> int:
    for name in ("memory.events.local", "memory.events", "memory.oom_control"):
        try:
            lines = (folder / name).read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            continue
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill ") and line.split()[1].isdigit())
    return 0


def _largest(machine: Machine) -> tuple[str, int]:
    catalog = machine.catalog()
    try:
        names = [entry.card.name for entry in catalog.entries()]
    except CheckpointError:
        names = []
    return max((_weights(machine, name) for name in names), key=lambda found: found[1], default=("no model", 0))


def _weights(machine: Machine, name: str) -> tuple[str, int]:
    """A model's own name and the bytes of its weights as stored; ("", 0) where it is not here or broken."""
    catalog = machine.catalog()
    try:
        entry = catalog.resolve(name)
        return entry.card.name, catalog.inspect(entry).n_bytes
    except SdfleetError:
        return "", 0


ENTRIES = (
    Entry(
        id="container-memory",
        title="The container may take less memory than the model needs",
        symptoms=("the engine's process was killed by SIGKILL", "exit code 137", "OOMKilled"),
        cause="A limit on the container, service or job (cgroup) is smaller than the machine's memory, and smaller "
        "than the model: the system ends the process without a word.",
        looks="the limits of the control groups above this process, against the largest model here",
        cure="raise the limit (docker run --memory, Kubernetes resources.limits.memory, systemd MemoryMax), "
        "or SD_MEMORY_MODE=eco",
        check=container,
        signs=(
            r"killed by sigkill", r"\bexit code:? 137\b", r"\boomkilled\b", r"memory cgroup out of memory", r"oom-kill",
            r"^killed$", r"returncode:? -9\b", r"exit code:? -9\b", r"sigkill is what a system out of memory",
        ),
        codes=("engine_died",),
    ),
    Entry(
        id="out-of-memory",
        title="Not enough memory for the model or the picture",
        symptoms=("CUDA out of memory", "MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory"),
        cause="Weights, activations and the decoded picture do not fit together; another program may hold the rest.",
        looks="the default model's weights against the memory that is free",
        cure="ask for a smaller size or fewer pictures; SD_MEMORY_MODE=eco; SD_WEIGHTS=fp8; close other programs",
        check=room,
        signs=(
            r"out of memory", r"can't allocate memory", r"outofmemoryerror", r"not enough memory",
            r"cublas_status_alloc_failed", r"\bmemoryerror\b", r"unable to allocate \S+ (mi|gi|ti)b",
            r"errno 12\b", r"cannot allocate memory", r"invalid buffer size",
        ),
        codes=("out_of_memory",),
    ),
    Entry(
        id="swap",
        title="The machine is swapping",
        symptoms=("everything stands still while a model is loaded", "the disk is busy while pictures are drawn"),
        cause="Memory is full and parts of the model lie on the disk: each step waits for them.",
        looks="how much swap is used while memory is short",
        cure="close other programs; SD_MEMORY_MODE=eco; SD_ENGINES=1; or a smaller model",
        check=swap,
        signs=(r"\bswap(ping| is full)\b", r"thrash"),
    ),
)  # fmt: skip
