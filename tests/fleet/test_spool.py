"""A node's finished jobs on its disk: whole or not there, and kept in memory while the disk is full."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdfleet.domain import JobId
from sdfleet.errors import OutputNotWritable
from sdfleet.fleet import spool as spool_file
from sdfleet.fleet.spool import Spool

JOB, LEASE, NEXT = JobId("0123456789ab"), "1." + "a" * 32, "2." + "b" * 32


def _kept(folder: Path, packed: bytes = b"pixels", *, is_failure: bool = False) -> Spool:
    spool = Spool(folder)
    spool.keep(spool.put(JOB, LEASE, packed, is_failure=is_failure))
    return spool


def test_what_was_kept_is_there_after_a_restart_and_half_a_file_is_not(tmp_path: Path) -> None:
    _kept(tmp_path)
    (tmp_path / "new-ab").write_bytes(b"half")
    spool = Spool(tmp_path)
    assert [(one.job, one.lease, one.read()) for one in spool.all()] == [(JOB, LEASE, b"pixels")]
    assert spool.drop(JOB)
    assert not spool.drop(JOB)
    assert list(tmp_path.iterdir()) == []


def test_what_was_put_can_be_sent_before_it_is_on_the_disk_and_leaves_memory_then(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    put = spool.put(JOB, LEASE, b"pixels")
    assert [one.read() for one in spool.all()] == [b"pixels"]
    assert list(tmp_path.iterdir()) == []
    spool.keep(put)
    (kept,) = spool.all()
    assert (kept.packed, kept.read()) == (None, b"pixels")


def test_a_failure_is_known_as_one_after_a_restart(tmp_path: Path) -> None:
    _kept(tmp_path, b"it failed", is_failure=True)
    (found,) = Spool(tmp_path).all()
    assert (found.job, found.lease, found.is_failure, found.read()) == (JOB, LEASE, True, b"it failed")


def test_a_new_lease_is_known_at_once_and_moves_no_file(tmp_path: Path) -> None:
    spool = _kept(tmp_path)
    before = spool.get(JOB)
    spool.renew(JOB, NEXT)
    after = spool.get(JOB)
    assert before is not None
    assert after is not None
    assert (after.lease, after.path) == (NEXT, before.path)


def test_a_lease_that_is_renewed_while_the_file_is_written_stays_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path)
    put = spool.put(JOB, LEASE, b"pixels")
    monkeypatch.setattr(spool_file, "os", SimpleNamespace(fsync=lambda _: spool.renew(JOB, NEXT)))
    spool.keep(put)
    kept = spool.get(JOB)
    assert kept is not None
    assert (kept.lease, kept.packed, kept.read()) == (NEXT, None, b"pixels")


@pytest.mark.parametrize("is_given_again", [False, True])
def test_what_the_router_has_before_it_is_written_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_given_again: bool
) -> None:
    spool = Spool(tmp_path)
    put = spool.put(JOB, LEASE, b"pixels")

    def stored_meanwhile(_: int) -> None:
        spool.drop(JOB)
        if is_given_again:
            spool.put(JOB, NEXT, b"drawn anew")

    monkeypatch.setattr(spool_file, "os", SimpleNamespace(fsync=stored_meanwhile))
    spool.keep(put)
    assert list(tmp_path.iterdir()) == []
    assert [one.read() for one in spool.all()] == ([b"drawn anew"] if is_given_again else [])


def test_what_has_left_before_its_turn_on_the_disk_is_not_written(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    put = spool.put(JOB, LEASE, b"pixels")
    assert spool.drop(JOB)
    spool.keep(put)
    assert (list(tmp_path.iterdir()), spool.all()) == ([], ())


def test_a_full_disk_leaves_jobs_in_memory_until_that_is_full_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool_file, "os", SimpleNamespace(fsync=full))
    monkeypatch.setattr(spool_file, "MOST_HELD_BYTES", 10)
    spool = Spool(tmp_path)
    held = spool.put(JOB, LEASE, b"pixels")
    spool.keep(held)
    assert (spool.is_in_memory(held), held.read(), spool.has_room) == (True, b"pixels", True)
    spool.put(JobId("ab"), LEASE, b"pixels")
    assert not spool.has_room
    assert spool.drop(JOB)
    assert spool.has_room
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("job", ["../etc", "A", "", "x" * 70])
def test_a_job_with_a_strange_name_gets_no_file(tmp_path: Path, job: str) -> None:
    with pytest.raises(OutputNotWritable):
        Spool(tmp_path).put(JobId(job), LEASE, b"pixels")
    assert list(tmp_path.iterdir()) == []
