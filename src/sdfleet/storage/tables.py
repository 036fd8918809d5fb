"""The tables of the database, as the newest migration leaves them.

What is filtered, sorted or counted has a column; the rest of a job is JSON (`job_rows.py`), so that a new field of a
request needs no migration. JSON columns are plain text of ASCII: every character survives on both databases.
Seeds are text: 64 bits without a sign fit no integer column.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

# The newest migration; a test compares it with the files in migrations/versions.
HEAD = "0004"
# A PostgreSQL database may hold other programs' tables, and Alembic's own name for this one is often taken.
VERSION_TABLE = "sdfleet_version"

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite counts only an INTEGER by itself.
_Number = BigInteger().with_variant(Integer(), "sqlite")

# number: counts up in the order of acceptance and is never given twice; pages are cut by it.
# idempotency, fingerprint: SHA-256 of the caller's own, which may be of any length.
# prompt_folded: the prompt without its case, what a search looks through. generation_s: drawing alone, without waiting.
# has_webhook: 0 or 1, whether the end of the job is to be told. node: which machine of a fleet drew it, when done.
jobs = Table(
    "jobs",
    metadata,
    Column("number", _Number, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False),
    Column("owner", String(128), nullable=False),
    Column("state", String(16), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("created_s", Double, nullable=False),
    Column("started_s", Double),
    Column("finished_s", Double),
    Column("idempotency", String(64)),
    Column("fingerprint", String(64)),
    Column("model", Text, nullable=False),
    Column("width_px", Integer),
    Column("height_px", Integer),
    Column("prompt_folded", Text, nullable=False),
    Column("has_webhook", Integer, nullable=False),
    Column("submission", Text, nullable=False),
    Column("warnings", Text, nullable=False),
    Column("error", Text),
    Column("facts", Text, nullable=False),
    Column("generation_s", Double),
    Column("node", Text, nullable=False, server_default=""),
    Index(None, "id", unique=True),
    Index(None, "owner", "idempotency", unique=True),
    # Pages of one owner; pages of one state; how many wait, and whose; retention and statistics.
    Index(None, "owner", "number"),
    Index(None, "state", "number"),
    Index(None, "state", "owner"),
    Index(None, "finished_s"),
    sqlite_autoincrement=True,
)

# Pixels that came with a request. role: the field of the request. coding: how `data` is packed.
pictures = Table(
    "pictures",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("role", String(32), primary_key=True),
    Column("width_px", Integer, nullable=False),
    Column("height_px", Integer, nullable=False),
    Column("mode", String(8), nullable=False),
    Column("coding", String(16), nullable=False),
    Column("data", LargeBinary, nullable=False),
)

# Finished pictures. They have no foreign key: a picture may be kept for longer than its job.
# safety: the verdict of the checkpoint's own safety checker, see domain.SafetyVerdict. favourite: 0 or 1.
# model, prompt, prompt_folded: the job's, for a gallery that may outlive it; prompt is its beginning.
outputs = Table(
    "outputs",
    metadata,
    Column("number", _Number, primary_key=True, autoincrement=True),
    Column("id", String(96), nullable=False),
    Column("job_id", String(64), nullable=False),
    Column("owner", String(128), nullable=False),
    Column("position", Integer, nullable=False),
    Column("seed", String(20), nullable=False),
    Column("width_px", Integer, nullable=False),
    Column("height_px", Integer, nullable=False),
    Column("format", String(8), nullable=False),
    Column("n_bytes", BigInteger, nullable=False),
    Column("created_s", Double, nullable=False),
    Column("safety", String(16), nullable=False, server_default="none"),
    Column("favourite", Integer, nullable=False, server_default="0"),
    Column("model", Text, nullable=False, server_default=""),
    Column("prompt", Text, nullable=False, server_default=""),
    Column("prompt_folded", Text, nullable=False, server_default=""),
    Index(None, "id", unique=True),
    Index(None, "job_id", "position"),
    Index(None, "owner", "number"),
    Index(None, "created_s"),
    sqlite_autoincrement=True,
)

# Ends of jobs that somebody wants to be told, written in the transaction that ends the job.
# due_s: when to try (again); NULL once nobody tries any more.
deliveries = Table(
    "deliveries",
    metadata,
    Column("number", _Number, primary_key=True, autoincrement=True),
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("due_s", Double),
    Index(None, "due_s"),
    Index(None, "job_id"),
    sqlite_autoincrement=True,
)

# secret_sha256: of the whole key as its owner holds it; the key itself is nowhere.
keys = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("secret_sha256", String(64), nullable=False),
    Column("scopes", Text, nullable=False),
    Column("rate_per_minute", Integer),
    Column("max_queued", Integer),
    Column("created_s", Double, nullable=False),
    Column("last_used_s", Double),
    Column("revoked_s", Double),
    Index(None, "name"),
)
