"""What a checkpoint's safety checker said of each finished picture; of those from before, nothing was asked."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column. It has a default in the database, so that an older sdfleet could still write rows."""
    op.add_column("outputs", sa.Column("safety", sa.String(16), nullable=False, server_default="none"))
