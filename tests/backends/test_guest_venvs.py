"""Virtual environments for engines of other projects: what is shown, what counts as installed, what is told."""

from __future__ import annotations

import asyncio
import json
import re
import venv
from pathlib import Path

import pytest

from sdfleet.backends.guests.backend import GuestBackend
from sdfleet.backends.guests.venv import GUESTS, NOTE, GuestVenv, InstallConsent, guest_of, pins_of, why_not_here
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.guests.fitting import GuestId
from sdfleet.errors import BackendFailed, BackendUnavailable, EngineFailed, InvalidValue, UnknownName
from tests.backends.drawings import drawing


def pretend(here: GuestVenv, *, fingerprint: str | None = None) -> None:
    """A whole installation, as far as files tell."""
    here.folder.mkdir(parents=True)
    venv.create(here.folder / "venv", with_pip=False, symlinks=True)
    (here.folder / NOTE).write_text(json.dumps({"fingerprint": fingerprint or here.pins.fingerprint}))


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_everything_is_pinned_once_with_its_licence(guest: GuestId, system: str) -> None:
    pins = pins_of(guest, system=system)
    names = [package.name for package in pins.packages]
    assert names[0] == guest
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", package.version) for package in pins.packages)
    assert all(package.licence for package in pins.packages)
    # The parts of MLX are one.
    assert len({package.version for package in pins.packages if package.name.startswith("mlx")}) == 1
    assert ("mlx-metal" if system == "darwin" else "mlx-cpu") in names
    # It would bring a second PyTorch, or a CUDA stack; neither guest draws with it.
    assert "torch" not in names


def test_a_kind_of_machine_that_mlx_does_not_run_on_is_told() -> None:
    assert "this is a Mac with x86_64" in why_not_here(system="darwin", machine="x86_64")
    assert "this is win32" in why_not_here(system="win32", machine="AMD64")


def test_an_unknown_name_is_answered_with_those_that_are_known() -> None:
    assert guest_of("MFLUX") == "mflux"
    with pytest.raises(UnknownName, match="did you mean 'mflux'"):
        guest_of("mflx")


def test_what_is_half_made_or_of_other_pins_is_not_installed(tmp_path: Path) -> None:
    here = GuestVenv(tmp_path, "mflux")
    assert "is not installed: sdfleet backend install mflux" in here.reason()
    pretend(here)
    assert here.reason() == ""
    (here.folder / NOTE).write_text("{}")
    assert "cannot be read" in here.reason()
    (here.folder / NOTE).unlink()
    assert "is not installed" in here.reason()


def test_another_version_is_not_taken_for_the_one_that_was_tried(tmp_path: Path) -> None:
    here = GuestVenv(tmp_path, "mflux")
    pretend(here, fingerprint="0" * 16)
    assert "another mflux is installed than this sdfleet was tried with" in here.reason()


def test_an_environment_whose_python_is_gone_says_so(tmp_path: Path) -> None:
    here = GuestVenv(tmp_path, "mflux")
    pretend(here)
    here.python.unlink()
    assert "is gone; make it again" in here.reason()


def test_nothing_is_made_without_a_yes_to_these_pins(tmp_path: Path) -> None:
    here = GuestVenv(tmp_path, "mflux")
    with pytest.raises(InvalidValue, match="given to other packages"):
        here.install(InstallConsent(fingerprint="others"), say=lambda _: None)
    assert not here.is_here


def test_what_is_whole_is_left_alone(tmp_path: Path) -> None:
    here = GuestVenv(tmp_path, "mflux")
    pretend(here)
    said: list[str] = []
    here.install(here.consent(), say=said.append)
    assert said == [f"mflux {here.pins.version} is installed already"]


def test_removing_gives_back_the_bytes_and_may_be_done_twice(tmp_path: Path) -> None:
    here = GuestVenv(tmp_path, "mflux")
    pretend(here)
    (here.folder / "large").write_bytes(bytes(10_000))
    assert here.remove() >= 10_000
    assert (here.is_here, here.remove()) == (False, 0)


def test_an_installation_that_fails_says_what_failed_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip is told that there is no index, as on a machine without a network; the venv is a real one."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_INPUT", "1")
    here = GuestVenv(tmp_path, "mflux")
    said: list[str] = []
    with pytest.raises(BackendFailed, match=r"packages could not be installed: .*mflux") as failed:
        here.install(here.consent(), say=said.append)
    assert failed.value.hint == "when that is mended, run `sdfleet backend install mflux` again"
    assert said[-1] == f"installing {len(here.pins.packages)} packages"
    assert "is not installed" in here.reason()


def test_a_backend_that_is_not_installed_says_how_to_get_it(tmp_path: Path) -> None:
    async def told() -> None:
        backend = GuestBackend(GuestVenv(tmp_path, "mflux"), EngineOptions())
        assert backend.capabilities().reason == "mflux is not installed: sdfleet backend install mflux"
        for work in (backend.start(), backend.generate(drawing()), backend.load(drawing())):
            with pytest.raises(BackendUnavailable, match="sdfleet backend install mflux"):
                await work
        await backend.close()
        assert backend.capabilities().state == "closed"

    asyncio.run(told())


def test_an_environment_that_lacks_the_library_says_which(tmp_path: Path) -> None:
    """What a start tells where somebody has taken a package away: the child's own words."""

    async def told() -> None:
        here = GuestVenv(tmp_path, "mflux")
        pretend(here)
        backend = GuestBackend(here, EngineOptions())
        try:
            with pytest.raises(EngineFailed, match="No module named 'mlx'") as failed:
                await backend.start()
            assert "sdfleet backend install" in failed.value.hint
        finally:
            await backend.close()

    asyncio.run(told())
