"""The first tables: jobs, their input pictures, finished pictures, webhooks to deliver, keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "jobs",
        sa.Column("number", number, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("created_s", sa.Double(), nullable=False),
        sa.Column("started_s", sa.Double()),
        sa.Column("finished_s", sa.Double()),
        sa.Column("idempotency", sa.String(64)),
        sa.Column("fingerprint", sa.String(64)),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("width_px", sa.Integer()),
        sa.Column("height_px", sa.Integer()),
        sa.Column("prompt_folded", sa.Text(), nullable=False),
        sa.Column("has_webhook", sa.Integer(), nullable=False),
        sa.Column("submission", sa.Text(), nullable=False),
        sa.Column("warnings", sa.Text(), nullable=False),
        sa.Column("error", sa.Text()),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.Column("generation_s", sa.Double()),
        sa.PrimaryKeyConstraint("number", name="pk_jobs"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_jobs_id", "jobs", ["id"], unique=True)
    op.create_index("ix_jobs_owner_idempotency", "jobs", ["owner", "idempotency"], unique=True)
    op.create_index("ix_jobs_owner_number", "jobs", ["owner", "number"])
    op.create_index("ix_jobs_state_number", "jobs", ["state", "number"])
    op.create_index("ix_jobs_state_owner", "jobs", ["state", "owner"])
    op.create_index("ix_jobs_finished_s", "jobs", ["finished_s"])
    op.create_table(
        "pictures",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("role", sa.String(32), nullable=False),
        sa.Column("width_px", sa.Integer(), nullable=False),
        sa.Column("height_px", sa.Integer(), nullable=False),
        sa.Column("mode", sa.String(8), nullable=False),
        sa.Column("coding", sa.String(16), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "role", name="pk_pictures"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_pictures_job_id", ondelete="CASCADE"),
    )
    op.create_table(
        "outputs",
        sa.Column("number", number, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(96), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("seed", sa.String(20), nullable=False),
        sa.Column("width_px", sa.Integer(), nullable=False),
        sa.Column("height_px", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(8), nullable=False),
        sa.Column("n_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_outputs"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_outputs_id", "outputs", ["id"], unique=True)
    op.create_index("ix_outputs_job_id_position", "outputs", ["job_id", "position"])
    op.create_index("ix_outputs_owner_number", "outputs", ["owner", "number"])
    op.create_index("ix_outputs_created_s", "outputs", ["created_s"])
    op.create_table(
        "deliveries",
        sa.Column("number", number, autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_s", sa.Double()),
        sa.PrimaryKeyConstraint("number", name="pk_deliveries"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_deliveries_job_id", ondelete="CASCADE"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_deliveries_due_s", "deliveries", ["due_s"])
    op.create_index("ix_deliveries_job_id", "deliveries", ["job_id"])
    op.create_table(
        "keys",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("rate_per_minute", sa.Integer()),
        sa.Column("max_queued", sa.Integer()),
        sa.Column("created_s", sa.Double(), nullable=False),
        sa.Column("last_used_s", sa.Double()),
        sa.Column("revoked_s", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
    )
    op.create_index("ix_keys_name", "keys", ["name"])
