"""Verdicts are remembered: with each picture, and of those that were withheld with the job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection

from sdfleet.domain import Withheld
from sdfleet.storage.database import Database
from sdfleet.storage.migrations.upgrade import upgrade
from sdfleet.storage.tables import VERSION_TABLE, metadata
from tests.storage.conftest import Play, Stage, output, play_on


def test_verdicts_and_withheld_pictures_come_back(play: Play[Any]) -> None:
    async def story(stage: Stage) -> None:
        job = await stage.begun()
        made = [replace(output(job.id, 0), safety="passed"), replace(output(job.id, 2), safety="flagged")]
        withheld = (Withheld(index=1, seed=2**64 - 2),)
        assert await stage.jobs.finish(replace(job, outputs=tuple(made), withheld=withheld))

        found = await stage.jobs.job(job.id)
        assert found is not None
        assert found.withheld == withheld
        assert [(one.index, one.safety) for one in found.outputs] == [(0, "passed"), (2, "flagged")]

    play(story)


def test_pictures_of_the_first_version_were_not_checked(url: str) -> None:
    def first_version(database: Database) -> Callable[[Connection], None]:
        def work(connection: Connection) -> None:
            for name in (*metadata.tables, VERSION_TABLE):
                connection.exec_driver_sql(f"DROP TABLE {name}{' CASCADE' if database.is_postgresql else ''}")
            upgrade(connection, to="0001")
            connection.exec_driver_sql(
                "INSERT INTO outputs (id, job_id, owner, position, seed, width_px, height_px, format, n_bytes, "
                "created_s) VALUES ('a-0', 'a', 'local', 0, '5', 8, 8, 'png', 10, 1.0)"
            )

        return work

    async def make(stage: Stage) -> None:
        await stage.database.write(first_version(stage.database))

    async def story(stage: Stage) -> None:
        (found,), _ = await stage.jobs.outputs()
        assert (found.id, found.safety) == ("a-0", "none")

    play_on(url, make)
    play_on(url, story)
