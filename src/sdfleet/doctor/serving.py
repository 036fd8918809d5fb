"""The server: its port, its door, its database, and how its jobs have been ending."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from collections import Counter
from typing import TYPE_CHECKING, Any

from sdfleet.doctor.entry import Entry, Finding, fault, not_applicable, ok, warning
from sdfleet.doctor.machine import Machine
from sdfleet.errors import InvalidValue, StorageError
from sdfleet.storage.examination import Seen, look
from sdfleet.storage.tables import HEAD

if TYPE_CHECKING:
    import psutil

DAY_S = 24 * 3600.0
# One failure among many jobs is told by its own answer; this many are a state of the machine.
MANY_FAILURES = 3
LARGE_SHARE = 0.1
# Longer than the engine's own watchdog waits between two signs of life.
HUNG_S = 1800.0
HUNG_TIMES = 20.0
# Codes that tell of the request or of a person's wish, not of the machine.
NOT_OF_THE_MACHINE = frozenset({"cancelled", "deadline_exceeded", "content_withheld", "moderated"})


def port(machine: Machine) -> Finding:
    """Whether the server could listen, or who listens there."""
    host, number = machine.settings.host, machine.settings.port
    if number == 0:
        return ok("a free port is taken at every start")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
            probe.listen(1)
        except OSError as exc:
            return _why_not(machine, exc)
    return ok(f"{host}:{number} is free")


def _why_not(machine: Machine, exc: OSError) -> Finding:
    host, number = machine.settings.host, machine.settings.port
    if exc.errno == errno.EACCES:
        return fault(f"{host}:{number} may be listened on by root only", "take a port above 1023: SD_PORT=7860")
    if exc.errno != errno.EADDRINUSE:
        return fault(f"{host}:{number} cannot be listened on: {exc.strerror or exc}", "SD_HOST=127.0.0.1")
    holder = _listener(number)
    if holder is None:
        return fault(f"{host}:{number} is in use, by a process that this user may not see")
    about = f"{holder.name()} (process {holder.pid})"
    if holder.pid in _family(_server_pid(machine)):
        return ok(f"the sdfleet server of this data folder listens on {host}:{number}, as {about}")
    return fault(f"{host}:{number} is in use by {about}", f"SD_PORT={number + 1}, or end it: kill {holder.pid}")


def server(machine: Machine) -> Finding:
    """Whether a server uses this data folder."""
    pid = _server_pid(machine)
    if pid is None:
        return ok("no server uses this data folder")
    if pid == os.getpid():
        return ok("this server uses the data folder, and no other can")
    hint = "a second server needs a data folder of its own: SD_HOME"
    return ok(f"a server (process {pid}) uses {machine.settings.home}", hint)


def open_door(machine: Machine) -> Finding:
    """Whether others could use the server without a key."""
    host = machine.settings.host
    if _is_loopback(host):
        return ok(f"on {host} this machine alone reaches the server")
    if machine.settings.api_key is not None:
        return ok(f"on {host} callers need the key of SD_API_KEY")
    seen = _seen(machine)
    if seen is not None and seen.n_keys:
        return ok(f"on {host} callers need one of {seen.n_keys} keys")
    return fault(f"on {host} everybody in the network could use the server, and there is no key: it will not start")


def database(machine: Machine) -> Finding:
    """Whether the database can be read and written, and is of this version."""
    seen = _look(machine)
    if seen is None:
        return ok("there is no database yet; the first server or key makes it")
    if seen.is_newer:
        return fault(
            f"{seen.name} was written by a newer sdfleet: its tables are of version {seen.version}, ours are {HEAD}",
            "install that sdfleet again, or name another database with SD_HOME or SD_DATABASE_URL",
        )
    if not seen.is_current:
        return ok(f"{seen.name} is of an earlier version; the next start brings it up")
    return ok(f"{seen.name} answers, {seen.n_done} jobs were done in the last day")


def failing_jobs(machine: Machine) -> Finding:
    """How the jobs of the last day ended."""
    seen = _seen(machine)
    if seen is None or not seen.is_current:
        return not_applicable("there is no database to look into, see database")
    counts = Counter({f.code: f.n for f in seen.failures if f.code not in NOT_OF_THE_MACHINE})
    n_failed, n_done = counts.total(), seen.n_done
    if not n_failed:
        return ok(f"of {n_done} jobs that ended in the last day none failed")
    told = f"of {n_done + n_failed} jobs that ended in the last day {n_failed} failed"
    by_code = {failure.code: failure for failure in seen.failures}
    reasons = [f"{n}x {code} ({by_code[code].message[:160]})" for code, n in counts.most_common(3)]
    worst = by_code[counts.most_common(1)[0][0]]
    what = f"{told}: {'; '.join(reasons)}"
    if n_failed >= MANY_FAILURES and n_failed >= LARGE_SHARE * (n_done + n_failed):
        return warning(what, worst.hint or "sdfleet jobs list --state failed")
    return ok(what, worst.hint)


def hung_engine(machine: Machine) -> Finding:
    """Whether a job is being drawn for longer than is believable."""
    seen = _seen(machine)
    if seen is None or not seen.is_current or seen.running is None:
        return not_applicable("no job is being drawn")
    spent_s = machine.clock() - seen.running.started_s
    told = f"job {seen.running.job_id} with {seen.running.model} has been drawn for {_long(spent_s)}"
    if _server_pid(machine) is None:
        return warning(f"{told}, and no server runs: it is taken up by the next start", "sdfleet serve")
    usual = seen.running.typical_s
    if spent_s > HUNG_S and (usual is None or spent_s > HUNG_TIMES * usual):
        than = "" if usual is None else f"; the slowest before took {_long(usual)}"
        return warning(f"{told}{than}", f"sdfleet jobs cancel {seen.running.job_id}, or start the server again")
    return ok(told)


def _seen(machine: Machine) -> Seen | None:
    """As `_look`; None also for a database that cannot be used, of which the check `database` tells."""
    with contextlib.suppress(StorageError, InvalidValue):
        return _look(machine)
    return None


def _look(machine: Machine) -> Seen | None:
    url = machine.settings.database_url
    text = None if url is None else url.get_secret_value()
    return look(text, home=machine.settings.home, since_s=machine.clock() - DAY_S)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _server_pid(machine: Machine) -> int | None:
    """The process of the server that has this data folder; None where the one that had it is gone."""
    import psutil

    try:
        pid = int((machine.settings.home / "server.pid").read_text(encoding="ascii"))
        lock = (machine.settings.home / "server.lock").resolve()
        process = psutil.Process(pid)
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None
    try:
        # The lock is freed with the process; its number may have been given to another since.
        return pid if any(os.path.realpath(file.path) == str(lock) for file in process.open_files()) else None
    except psutil.AccessDenied:
        return pid
    except psutil.NoSuchProcess:
        return None


def _family(pid: int | None) -> set[int]:
    import psutil

    if pid is None:
        return set()
    with contextlib.suppress(psutil.Error):
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    return {pid}


def _listener(number: int) -> psutil.Process | None:
    """The process that listens on a port, where the system lets us see it."""
    import psutil

    try:
        pids = [one.pid for one in psutil.net_connections(kind="tcp") if _listens(one, number)]
        return next((psutil.Process(pid) for pid in pids if pid is not None), None)
    except psutil.Error:
        pass  # macOS tells this of all processes to root alone; of our own it tells us below
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(_listens(one, number) for one in process.net_connections(kind="tcp")):
                return process
    return None


def _listens(connection: Any, number: int) -> bool:
    """Whether this is somebody waiting on the port; connection: psutil's own kinds, of one or of all processes."""
    return connection.status == "LISTEN" and bool(connection.laddr) and connection.laddr.port == number


def _long(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 7200
        else f"{seconds / 60:.0f} min"
        if seconds >= 120
        else f"{seconds:.0f} s"
    )


ENTRIES = (
    Entry(
        id="port-in-use",
        title="The port is in use",
        symptoms=("Address already in use", "cannot be listened on", "OSError: [Errno 98]", "[Errno 48]"),
        cause="Another program, or a server of sdfleet that was started before, listens there.",
        looks="the address is listened on for a moment; if it cannot be, the process that has it is named",
        cure="sdfleet serve --port 7861, or end the program that has it",
        check=port,
        signs=(
            r"address already in use", r"errno (98|48)\b", r"winerror 100(48|13)\b", r"cannot be listened on",
            r"only one usage of each socket address", r"port.{0,20}(already )?in use",
        ),
    ),
    Entry(
        id="other-server",
        title="Another server uses the data folder",
        symptoms=("another server (process 1234) uses",),
        cause="Two servers over one data folder would draw every job twice, so the second one does not start.",
        looks="the process that holds the lock of the data folder",
        cure="end the other one, or give this one a data folder of its own: SD_HOME",
        check=server,
        signs=(r"another server \(process",),
    ),
    Entry(
        id="open-door",
        title="The server would be open to the network",
        symptoms=(
            "everybody in the network could use this server without a key", "the server does not start on 0.0.0.0",
        ),
        cause="SD_HOST names more than this machine, and there is no key.",
        looks="the address to listen on, SD_API_KEY and the keys in the database",
        cure="sdfleet keys create NAME; or SD_HOST=127.0.0.1",
        check=open_door,
        signs=(r"could use this server without a key",),
    ),
    Entry(
        id="database",
        title="The database cannot be used",
        symptoms=("database is locked", "unable to open database file", "file is not a database"),
        cause="Another program holds its lock, its file is damaged or not ours, its disk is full, or it was written by "
        "a newer sdfleet.",
        looks="its lock is taken and given back, and its tables are read; nothing is changed",
        cure="close what else has the file open (a backup, a database browser); a damaged one: restore a copy",
        check=database,
        signs=(
            r"database is locked", r"unable to open database", r"file is not a database", r"disk image is malformed",
            r"another program holds its lock", r"written by a newer sdfleet", r"the database .* cannot be used",
        ),
        codes=("storage_error", "store_unavailable", "ledger_full", "not_let_in"),
    ),
    Entry(
        id="failing-jobs",
        title="Many jobs fail",
        symptoms=("jobs end as failed", "the same error again and again"),
        cause="The most frequent reason of the last day, as the jobs themselves tell it.",
        looks="the jobs of the last day in the database",
        cure='sdfleet jobs list --state failed; then sdfleet doctor --explain "the message"',
        check=failing_jobs,
        signs=(r"a fault of sdfleet itself", r"engine_failed", r"render_failed"),
        codes=("engine_failed", "internal_error"),
    ),
    Entry(
        id="hung-engine",
        title="The engine hangs",
        symptoms=("a job has been running for hours", "no progress", "silent for longer than is believable"),
        cause="A driver or a disk that does not answer. The engine is ended by its watchdog and the job drawn again; "
        "before a job's first step it waits for an hour.",
        looks="the job that is being drawn for longest, against the slowest that was done",
        cure="sdfleet jobs cancel ID; if it comes back: SD_COMPILE=off, and sdfleet doctor compile-workers",
        check=hung_engine,
        signs=(r"silent for", r"no progress", r"(engine|job).{0,30}\bhangs?\b", r"closed its pipes and stayed"),
    ),
    Entry(
        id="no-key",
        title="The server answers 401 or 403",
        symptoms=(
            "invalid_api_key", "this server wants a key", "does not answer to the name", "a page of another site",
        ),
        cause="No key came along, one that was revoked, one without the right; or a browser's page that is not ours.",
        cure="send `Authorization: Bearer KEY` (sdfleet keys create NAME); a page or a name: SD_ALLOWED_ORIGINS, "
        "SD_ALLOWED_HOSTS",
        signs=(
            r"this server wants a key", r"invalid_api_key", r"the key is not known here", r"not_allowed",
            r"does not answer to the name", r"a page of another site", r"blocked by cors",
        ),
        codes=("invalid_api_key", "not_allowed", "access_denied"),
    ),
    Entry(
        id="cannot-connect",
        title="A client cannot reach the server",
        symptoms=(
            "connection refused", "ECONNREFUSED 127.0.0.1:7860", "works in the browser, not in n8n or Open WebUI",
        ),
        cause="The server does not run or listens elsewhere; or the client is in a container, whose localhost is "
        "its own.",
        cure="curl http://127.0.0.1:7860/health on the server's machine; from a container use "
        "http://host.docker.internal:7860 and SD_HOST=0.0.0.0 with a key",
        checked_by="port-in-use",
        signs=(r"connection refused", r"econnrefused", r"errno (111|61)\b", r"winerror 10061\b"),
    ),
    Entry(
        id="busy",
        title="The server says that it is busy",
        symptoms=("429 queue_full", "503 not_ready", "rate_limit_exceeded"),
        cause="More jobs wait than may, the key's rate is used up, or the model is still being loaded.",
        cure="try again after the seconds in Retry-After; SD_MAX_QUEUED and SD_RATE_PER_MINUTE set the limits",
        signs=(r"queue_full", r"not_ready", r"rate_limit_exceeded", r"the server is getting ready", r"shutting_down"),
        codes=("busy", "queue_full", "rate_limit_exceeded", "not_ready", "shutting_down"),
    ),
    Entry(
        id="too-many-files",
        title="Too many open files",
        symptoms=("OSError: [Errno 24] Too many open files",),
        cause="The system lets a process hold a few hundred files; sdfleet raises that as far as it may.",
        cure="ulimit -n 65536 before the start; LimitNOFILE=65536 in a systemd unit",
        signs=(r"too many open files", r"errno 24\b", r"\bemfile\b"),
    ),
)  # fmt: skip
