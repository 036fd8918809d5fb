"""Packages that are missing, old, twice or half there, in folders that Python would look into."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests.doctor.stage import cure, look, machine, write


def _install(site: Path, name: str, version: str, *, requires: tuple[str, ...] = (), has_code: bool = True) -> None:
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    write(site / f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
    if has_code:
        write(site / name / "__init__.py")


def test_this_python_is_new_enough(tmp_path: Path) -> None:
    assert look("python-version", machine(tmp_path)).verdict == "ok"


def test_an_old_python_is_told_with_the_one_that_is_needed(tmp_path: Path) -> None:
    old = machine(tmp_path, python=(3, 10))
    assert "Python 3.10; sdfleet needs 3.11" in look("python-version", old).what
    assert "python3.11 -m venv" in cure("python-version", old)


def test_two_torches_on_the_path_are_both_named_and_the_hidden_one_last(tmp_path: Path) -> None:
    user, site = tmp_path / "user-site", tmp_path / "site"
    _install(user, "torch", "2.1.0")
    _install(site, "torch", "2.13.0")
    found = look("two-torches", machine(tmp_path, search_path=(str(user), str(site))))
    assert found.verdict == "fault"
    assert f"torch is imported from {user / 'torch'} and hides {site / 'torch'}" in found.what
    assert f"{shlex.quote(sys.executable)} -m pip uninstall -y torch" in found.cure


def test_a_file_of_the_working_folder_that_hides_a_library_is_named(tmp_path: Path) -> None:
    write(tmp_path / "work/diffusers.py")
    _install(tmp_path / "site", "diffusers", "0.42.0")
    found = look("two-torches", machine(tmp_path, search_path=(str(tmp_path / "work"), str(tmp_path / "site"))))
    assert str(tmp_path / "work/diffusers.py") in found.what


def test_an_update_that_left_its_predecessor_on_record_is_named(tmp_path: Path) -> None:
    _install(tmp_path / "site", "torch", "2.1.0")
    _install(tmp_path / "site", "torch", "2.13.0", has_code=False)
    found = look("two-torches", machine(tmp_path, search_path=(str(tmp_path / "site"),)))
    assert found.verdict == "fault"
    assert {"2.1.0", "2.13.0"} <= set(found.what.split())


def test_one_copy_under_two_names_of_its_folder_is_one_copy(tmp_path: Path) -> None:
    _install(tmp_path / "lib", "torch", "2.13.0")
    (tmp_path / "lib64").symlink_to(tmp_path / "lib")
    both = (str(tmp_path / "lib"), str(tmp_path / "lib64"))
    assert look("two-torches", machine(tmp_path, search_path=both)).verdict == "ok"


def test_what_is_missing_and_what_is_too_old_are_told_apart(tmp_path: Path) -> None:
    site = tmp_path / "site"
    wants = ("torch>=2.13", "diffusers>=0.42", "uvloop; sys_platform == 'never'", "openvino; extra == 'openvino'")
    _install(site, "sdfleet", "1.0", requires=wants)
    _install(site, "torch", "2.0.0")
    broken = machine(tmp_path, search_path=(str(site),))
    assert look("packages", broken).what == "missing: diffusers; of another version: torch 2.0.0 (wanted: >=2.13)"
    assert "-m pip install --upgrade" in cure("packages", broken)


def test_the_packages_of_this_environment_are_as_they_should_be(tmp_path: Path) -> None:
    here = machine(tmp_path)
    assert look("packages", here).verdict in {"ok", "not_applicable"}
    assert look("two-torches", here).verdict == "ok"
    assert look("tokenizer-packages", here).verdict == "ok"


def test_without_protobuf_and_sentencepiece_both_are_to_be_installed(tmp_path: Path) -> None:
    bare = machine(tmp_path, search_path=(str(tmp_path / "site"),))
    assert cure("tokenizer-packages", bare).endswith("-m pip install sentencepiece protobuf")


def test_googles_folder_without_protobuf_in_it_is_not_protobuf(tmp_path: Path) -> None:
    write(tmp_path / "site/google/cloud/__init__.py")
    write(tmp_path / "site/sentencepiece/__init__.py")
    found = look("tokenizer-packages", machine(tmp_path, search_path=(str(tmp_path / "site"),)))
    assert found.what == "not installed: protobuf"


@pytest.mark.parametrize(("torch", "verdict"), [("2.13.0", "ok"), ("2.12.0", "fault")])
def test_a_torchvision_of_another_torch_is_told(tmp_path: Path, torch: str, verdict: str) -> None:
    site = tmp_path / "site"
    _install(site, "torch", torch)
    _install(site, "torchvision", "0.28.0", requires=("torch==2.13.0",))
    there = machine(tmp_path, search_path=(str(site),))
    assert look("torchvision-build", there).verdict == verdict
    if verdict == "fault":
        assert cure("torchvision-build", there) == "python -m pip uninstall -y torchvision"


def test_a_torchvision_for_cuda_beside_a_torch_for_cpus_is_told(tmp_path: Path) -> None:
    site = tmp_path / "site"
    _install(site, "torch", "2.13.0+cpu")
    _install(site, "torchvision", "0.28.0", requires=("torch==2.13.0",))
    assert look("torchvision-build", machine(tmp_path, search_path=(str(site),))).verdict == "warning"


def test_openvino_is_a_hint_and_no_fault(tmp_path: Path) -> None:
    found = look("openvino", machine(tmp_path, search_path=(str(tmp_path / "site"),)))
    assert found.verdict == "ok"
    assert found.cure.endswith("install 'sdfleet[openvino]'")
    write(tmp_path / "other/openvino/__init__.py")
    assert look("openvino", machine(tmp_path, search_path=(str(tmp_path / "other"),))).cure == ""
