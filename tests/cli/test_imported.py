"""From a folder to a picture with the real engine: `sdfleet models import`, then `sdfleet generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run


# Slow for the engine's process, which imports torch and diffusers.
@pytest.mark.slow
def test_an_imported_flux_draws(run: Run, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_BACKEND", "local")
    imported = run("models", "import", str(checkpoints("flux-schnell")), "--name", "schnell")
    assert imported.code == 0, imported.err
    drawn = run(
        "generate", "a fox", "--model", "schnell", "--size", "64x64", "--negative", "blur", "-o", "x.png", "--json"
    )
    assert drawn.code == 0, drawn.err
    assert (drawn.json["steps"], drawn.json["guidance"]) == (4, 0.0)
    assert drawn.json["warnings"] == ["schnell ignores negative_prompt"]
    assert Path("x.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), [("klein", "flux2"), ("zimage", "zimage")])
def test_an_imported_model_that_reads_with_qwen_draws(
    run: Run, checkpoints: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, family: str
) -> None:
    monkeypatch.setenv("SD_BACKEND", "local")
    imported = run("models", "import", str(checkpoints(name)), "--name", name)
    assert imported.code == 0, imported.err
    assert run("models", "show", name, "--json").json["family"] == family
    drawn = run("generate", "a fox", "--model", name, "--size", "64x64", "-o", "x.png", "--json")
    assert drawn.code == 0, drawn.err
    assert [counted["encoder"] for counted in drawn.json["tokens"]] == ["qwen3"]
    assert drawn.json["warnings"] == []
    assert Path("x.png").stat().st_size > 0


@pytest.mark.slow
def test_a_single_file_is_imported_and_draws(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import single_files

    monkeypatch.setenv("SD_BACKEND", "local")
    folder, file = single_files.write("sdxl", tmp_path)
    imported = run("models", "import", str(file), "--base", str(folder), "--prediction", "epsilon", "--json")
    assert imported.code == 0, imported.err
    assert (imported.json["name"], imported.json["family"], imported.json["notes"]) == ("sdxl", "sdxl", [])
    drawn = run("generate", "a fox", "--model", "sdxl", "--size", "64x64", "--steps", "2", "-o", "x.png", "--json")
    assert drawn.code == 0, drawn.err
    assert Path("x.png").stat().st_size > 0
