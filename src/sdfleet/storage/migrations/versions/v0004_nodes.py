"""Which machine of a fleet drew a job, for statistics by node; jobs of before were drawn by the server itself."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column. It has a default in the database, so that an older sdfleet could still write rows."""
    op.add_column("jobs", sa.Column("node", sa.Text, nullable=False, server_default=""))
