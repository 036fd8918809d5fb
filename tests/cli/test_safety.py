"""A checkpoint with its safety checker, from the import to the withheld picture, with the real engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.cli.conftest import Run


# Slow for the engine's process, which imports torch.
@pytest.mark.slow
def test_a_flagged_picture_is_withheld_and_flag_gives_it_out(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD_BACKEND", "local")
    folder = tiny.write("sd15-checked", tmp_path)
    file = folder / "safety_checker/model.safetensors"
    weights = load_file(file)
    weights["concept_embeds_weights"].fill_(-2.0)
    save_file(weights, file, metadata={"format": "pt"})
    assert run("models", "import", str(folder), "--name", "strict").code == 0
    asked = ("generate", "a fox", "--model", "strict", "--size", "64x64", "--steps", "2", "--seed", "3", "-o", "x.png")

    withheld = run(*asked)
    assert withheld.code == 1
    assert "the picture with seed 3 was withheld: the safety checker of strict flagged it" in withheld.err
    assert not Path("x.png").exists()

    flagged = run(*asked, "--safety-checker", "flag", "--json")
    assert flagged.code == 0, flagged.err
    assert [image["safety"] for image in flagged.json["images"]] == ["flagged"]
    assert run("show", "x.png", "--json").json["safety"] == "flagged"
