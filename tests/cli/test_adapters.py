"""LoRAs and embeddings at the command line: imported, listed, shown, used, removed."""

from __future__ import annotations

from pathlib import Path

from tests.catalog.test_adapters import KOHYA, SD15, write
from tests.cli.conftest import Run


def test_a_lora_is_imported_listed_shown_and_removed(run: Run, home: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "Ink.safetensors", SD15)

    imported = run("models", "import", str(file), "--json").json

    assert (imported["name"], imported["kind"], imported["family"], imported["rank"]) == ("Ink", "lora", "sd", 4)
    assert imported["path"] == str(home / "models/loras/Ink.safetensors")
    assert [lora["name"] for lora in run("models", "list", "--json").json["loras"]] == ["Ink"]
    assert "--lora Ink:0.8" in run("models", "show", "Ink").out
    assert {"name": "Ink", "kind": "lora", "n_bytes": file.stat().st_size} in run("models", "du", "--json").json[
        "adapters"
    ]
    refused = run("models", "rm", "Ink")
    assert refused.code != 0
    assert "sdfleet models rm Ink --yes" in refused.err
    assert "removed Ink" in run("models", "rm", "Ink", "--yes").out
    assert run("models", "list", "--json").json["loras"] == []
    assert file.is_file()


def test_an_embedding_is_imported_and_says_how_to_use_it(run: Run, home: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "neg.safetensors", {"<bad>": (768,)})
    assert "write <bad> in a prompt" in run("models", "import", str(file)).out
    assert (home / "models/embeddings/neg.safetensors").is_file()


def test_a_pickle_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "neg.pt").write_bytes(b"\x80\x02}q\x00.")
    answer = run("models", "import", str(tmp_path / "neg.pt"))
    assert answer.code != 0
    assert "neg.pt" in answer.err


def test_a_lora_is_asked_for_noted_in_the_picture_and_repeated_with_it(run: Run, tmp_path: Path) -> None:
    run("models", "import", str(write(tmp_path / "ink.safetensors", SD15)))
    asked = run("generate", "a fox", "--lora", "ink:0.5", "--lora", "INK:0:1", "-o", "x.png", "--json").json["loras"]
    assert [(lora["name"], lora["scale"], lora["text_scale"]) for lora in asked] == [
        ("ink", 0.5, 0.5),
        ("ink", 1.0, 0.0),
    ]
    assert run("generate", "--like", "x.png", "--json").json["loras"] == asked
    assert "loras: ink at 0.5, ink at 1" in run("show", "x.png").out
    assert run("generate", "--like", "x.png", "--lora", "ink:2", "--json").json["loras"][0]["scale"] == 2


def test_a_lora_for_another_family_is_refused_with_what_to_do(run: Run, tmp_path: Path) -> None:
    run("models", "import", str(write(tmp_path / "ink.safetensors", KOHYA)))
    answer = run("generate", "a fox", "--lora", "ink")
    assert answer.code != 0
    assert "the LoRA 'ink' is for SDXL, the checkpoint toy is Stable Diffusion" in answer.err
    assert "draw with a checkpoint of SDXL" in answer.err
