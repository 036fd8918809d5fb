"""A PostgreSQL server of the tests' own: in a temporary folder, reached by a socket there, gone afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Where Debian and Fedora put the server's programs, which are on nobody's PATH.
_FOLDERS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin")


def programs() -> Path | None:
    """The folder of `initdb` and `pg_ctl`; None if the server is not installed."""
    on_path = shutil.which("initdb")
    if on_path is not None:
        return Path(on_path).resolve().parent
    found = [path for pattern in _FOLDERS for path in Path("/").glob(f"{pattern[1:]}/initdb")]
    return max(found).parent if found else None


@contextmanager
def server() -> Iterator[str]:
    """The URL of a running server, with `{name}` where a database's name goes."""
    found = programs()
    assert found is not None
    # Not under pytest's folder: nobody but its owner may enter that, and the server refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="sdfleet-pg-"))
    user = _unprivileged()
    if user is not None:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    data, log = folder / "data", folder / "log"

    def run(*command: str) -> None:
        subprocess.run(
            command, user=user, cwd=folder, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            timeout=120,
        )  # fmt: skip

    try:
        run(str(found / "initdb"), "-D", str(data), "-U", "sdfleet", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
        # No TCP port to clash on. Nothing here has to survive a power cut, so it need not wait for the disk.
        options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off -c max_connections=40"
        run(str(found / "pg_ctl"), "-D", str(data), "-l", str(log), "-w", "-t", "60", "-o", options, "start")
        try:
            yield f"postgresql://sdfleet@/{{name}}?host={folder}"
        finally:
            run(str(found / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


def _unprivileged() -> str | None:
    """Who runs the server when we are root; None: we do."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"
