"""Folders that cannot be written to, disks without room, leftovers, rights, and a clock that is off."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdfleet.storage.database import open_database
from tests.doctor.stage import cure, look, machine, write
from tests.storage.conftest import Clock, Stage

DAY_S = 86_400.0


def test_a_data_folder_that_is_not_made_yet_can_be_written_to_and_is_not_made(tmp_path: Path) -> None:
    new = machine(tmp_path, home=tmp_path / "new/home")
    assert look("home-not-writable", new).verdict == "ok"
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_place_of_a_folder_is_a_fault(tmp_path: Path) -> None:
    write(tmp_path / "file")
    there = machine(tmp_path, outputs=tmp_path / "file/pictures")
    assert look("home-not-writable", there).what.endswith(f"{tmp_path / 'file/pictures'}: Not a directory")
    assert "SD_OUTPUTS" in cure("home-not-writable", there)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_another_user_is_a_fault(tmp_path: Path) -> None:
    there = machine(tmp_path)
    (tmp_path / "home").chmod(0o500)
    assert "Permission denied" in look("home-not-writable", there).what


def _doctor(*arguments: str, home: Path, before: str = "") -> dict[str, str]:
    """The first check that `sdfleet doctor` tells in a process of its own; `before` is done by a shell."""
    command = [sys.executable, "-m", "sdfleet", "doctor", *arguments, "--json"]
    if before:
        command = ["unshare", "-rm", "sh", "-c", f'{before} && exec "$@"', "sh", *command]
    env = {**os.environ, "SD_HOME": str(home)}  # noqa: TID251 - a process of its own
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout, done.stderr
    first: dict[str, str] = json.loads(done.stdout)["checks"][0]
    assert done.returncode == (1 if first["verdict"] == "fault" else 0)
    return first


def _may_mount() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    done = subprocess.run(["unshare", "-rm", "sh", "-c", "mount -t tmpfs t /mnt"], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.skipif(not _may_mount(), reason="this user may not mount anything")
def test_a_disk_that_is_really_full_is_a_fault(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    full = f"mount -t tmpfs -o size=1m t '{home}' && dd if=/dev/zero of='{home}/all' bs=1M 2>/dev/null; true"
    told = _doctor("disk-full", home=home, before=full)
    assert told["verdict"] == "fault"
    assert told["found"].startswith("0 MB are free")
    assert "sdfleet models du" in told["cure"]


@pytest.mark.skipif(not _may_mount(), reason="this user may not mount anything")
@pytest.mark.parametrize(
    ("options", "told"), [("size=1m,ro", "Read-only file system"), ("size=4k,nr_inodes=1", "No space left on device")]
)
def test_a_disk_that_takes_no_file_is_a_fault(tmp_path: Path, options: str, told: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    found = _doctor("home-not-writable", home=home, before=f"mount -t tmpfs -o {options} t '{home}'")
    assert (found["verdict"], told in found["found"]) == ("fault", True), found


def test_a_limit_on_the_size_of_files_is_met_by_writing(tmp_path: Path) -> None:
    there = machine(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        found = look("home-not-writable", there)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in found.what


def test_a_folder_without_leftovers_is_well(tmp_path: Path) -> None:
    assert look("leftovers", machine(tmp_path)).verdict == "ok"


def test_a_download_that_was_given_up_is_told_with_its_bytes_and_both_ways_on(tmp_path: Path) -> None:
    weights = tmp_path / "home/models/weights"
    part = write(weights / ".sd15.part/unet/x.safetensors", "x" * 3_000_000)
    now_s = part.stat().st_mtime
    assert look("leftovers", machine(tmp_path, clock=lambda: now_s + DAY_S)).verdict == "ok"
    there = machine(tmp_path, clock=lambda: now_s + 30 * DAY_S)
    assert look("leftovers", there).what == "a download of sd15 that stopped 30 days ago holds 3 MB"
    assert cure("leftovers", there) == f"sdfleet models pull sd15 (goes on), or rm -r '{weights / '.sd15.part'}'"


def test_a_folder_among_the_weights_that_is_no_download_is_told(tmp_path: Path) -> None:
    weights = tmp_path / "home/models/weights"
    write(weights / "sd15/sdfleet.json", "{}")
    write(weights / "copied/model_index.json", "{}")
    there = machine(tmp_path)
    assert cure("leftovers", there) == f"rm -r '{weights / 'copied'}'"


def test_a_cache_that_has_grown_is_told(tmp_path: Path) -> None:
    large = write(tmp_path / "home/cache/openvino/blob")
    with large.open("r+b") as file:
        file.truncate(11_000_000_000)  # holes take no room
    assert "the cache holds 11.0 GB" in look("leftovers", machine(tmp_path)).what


def test_files_with_secrets_that_others_can_read_are_told(tmp_path: Path) -> None:
    key, settings = write(tmp_path / "home/signing.key", "k"), write(tmp_path / "home/sdfleet.toml", "port = 0")
    key.chmod(0o600)
    settings.chmod(0o644)
    assert look("file-rights", machine(tmp_path)).verdict == "ok"
    key.chmod(0o644)
    assert cure("file-rights", machine(tmp_path)) == f"chmod 600 '{key}'"


def test_settings_with_a_token_are_a_secret(tmp_path: Path) -> None:
    settings = write(tmp_path / "home/sdfleet.toml", 'hf_token = "x"\n')
    settings.chmod(0o644)
    assert cure("file-rights", machine(tmp_path)) == f"chmod 600 '{settings}'"


def test_a_clock_from_before_this_release_is_a_fault(tmp_path: Path) -> None:
    assert look("clock", machine(tmp_path)).verdict == "ok"
    early = machine(tmp_path, clock=lambda: 0.0)
    assert "1970-01-01 00:00 UTC" in look("clock", early).what
    assert "timedatectl set-ntp true" in cure("clock", early)


def test_a_clock_behind_the_newest_job_is_told(tmp_path: Path) -> None:
    async def accept() -> None:
        database = await open_database(None, home=tmp_path / "home")
        await Stage(database, Clock(now_s=1_900_000_000.0)).accept()
        await database.close()

    there = machine(tmp_path, clock=lambda: 1_900_000_000.0 - 3 * DAY_S)
    assert look("clock", there).verdict == "ok"
    asyncio.run(accept())
    assert "the newest job was accepted 3 days after that" in look("clock", there).what
