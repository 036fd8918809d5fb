"""Bringing a database to the tables of this version. Files in `versions/` are applied in order and never edited.

A migration says in its own words what it makes: it must not import `tables.py`, which moves on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from sdfleet.storage.tables import VERSION_TABLE

_HERE = Path(__file__).parent


def upgrade(connection: Connection, *, to: str = "head") -> None:
    """Apply what is missing, all of it or nothing: the connection is in a transaction that the caller commits."""
    script = scripts()

    def steps(revision: Any, _context: MigrationContext) -> Any:
        # What `alembic upgrade` calls; the public ways to it need a configuration file and an env.py.
        return script._upgrade_revs(to, revision)  # noqa: SLF001

    environment = EnvironmentContext(Config(), script, fn=steps)
    environment.configure(connection=connection, version_table=VERSION_TABLE)
    environment.run_migrations()


def scripts() -> ScriptDirectory:
    """The migrations that came with this version."""
    return ScriptDirectory(_HERE, version_locations=[_HERE / "versions"])
