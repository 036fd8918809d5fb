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


def test_what_was_put_is_there_after_a_restart_and_half_a_file_is_not(tmp_path: Path) -> None:
    Spool(tmp_path).put(JOB, LEASE, b"pixels")
    (tmp_path / "new-ab").write_bytes(b"half")
    spool = Spool(tmp_path)
    assert [(one.job, one.lease, one.read()) for one in spool.all()] == [(JOB, LEASE, b"pixels")]
    assert spool.drop(JOB)
    assert not spool.drop(JOB)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_known_as_one_after_a_restart(tmp_path: Path) -> None:
    Spool(tmp_path).put(JOB, LEASE, b"it failed", is_failure=True)
    (found,) = Spool(tmp_path).all()
    assert (found.job, found.lease, found.is_failure, found.read()) == (JOB, LEASE, True, b"it failed")


def test_a_new_lease_is_known_at_once_and_moves_no_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    before = spool.put(JOB, LEASE, b"pixels")
    spool.renew(JOB, NEXT)
    after = spool.get(JOB)
    assert after is not None
    assert (after.lease, after.path) == (NEXT, before.path)


def test_a_full_disk_leaves_a_few_jobs_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool_file, "os", SimpleNamespace(fsync=full))
    monkeypatch.setattr(spool_file, "MOST_HELD_BYTES", 10)
    spool = Spool(tmp_path)
    held = spool.put(JOB, LEASE, b"pixels")
    assert (held.path, held.read()) == (None, b"pixels")
    with pytest.raises(OutputNotWritable, match="No space left"):
        spool.put(JobId("ab"), LEASE, b"pixels")
    assert spool.drop(JOB)
    assert spool.put(JobId("ab"), LEASE, b"pixels").read() == b"pixels"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("job", ["../etc", "A", "", "x" * 70])
def test_a_job_with_a_strange_name_gets_no_file(tmp_path: Path, job: str) -> None:
    with pytest.raises(OutputNotWritable):
        Spool(tmp_path).put(JobId(job), LEASE, b"pixels")
    assert list(tmp_path.iterdir()) == []
