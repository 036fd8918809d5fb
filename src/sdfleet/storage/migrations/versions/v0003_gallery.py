"""What a gallery asks of finished pictures: which are favourites, what model drew them, and from what prompt."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns, with defaults for an older sdfleet that still writes rows, and fill them from the jobs."""
    op.add_column("outputs", sa.Column("favourite", sa.Integer, nullable=False, server_default="0"))
    op.add_column("outputs", sa.Column("model", sa.Text, nullable=False, server_default=""))
    op.add_column("outputs", sa.Column("prompt", sa.Text, nullable=False, server_default=""))
    op.add_column("outputs", sa.Column("prompt_folded", sa.Text, nullable=False, server_default=""))
    # The prompt as it was written lies within JSON, which the databases read each in its own way: of earlier pictures
    # the gallery shows it in small letters.
    job = "(SELECT {} FROM jobs WHERE jobs.id = outputs.job_id)"
    op.execute(
        f"UPDATE outputs SET model = {job.format('model')}, prompt = {job.format('substr(prompt_folded, 1, 500)')},"  # noqa: S608 - no text from outside
        f" prompt_folded = {job.format('prompt_folded')} WHERE job_id IN (SELECT id FROM jobs)"
    )
