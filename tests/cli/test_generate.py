"""`sdfleet generate` and `sdfleet show`."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Run, pictures_in


def _look(path: Path | str) -> Image.Image:
    """The picture, with its file closed."""
    return Image.open(io.BytesIO(Path(path).read_bytes()))


def _write(path: Path, *, side_px: int = 64) -> str:
    Image.new("RGB", (side_px, side_px), (200, 10, 10)).save(path)
    return str(path)


def test_a_prompt_becomes_a_file_and_a_line_that_says_where(run: Run, home: Path) -> None:
    answer = run("generate", "a fox", "--seed", "5")
    (path,) = pictures_in(home / "outputs")
    assert answer.code == 0
    assert f"saved {path}  seed 5" in answer.out
    assert "1 picture in" in answer.out
    assert _look(path).size == (64, 64)


def test_json_is_the_whole_of_stdout(run: Run, tmp_path: Path) -> None:
    answer = run("generate", "a fox", "--json", "-n", "2", "--seed", "5", "-o", "x.png")
    found = answer.json
    assert answer.code == 0
    assert [image["path"] for image in found["images"]] == [str(tmp_path / "x-1.png"), str(tmp_path / "x-2.png")]
    assert [image["seed"] for image in found["images"]] == [5, 6]
    assert (found["model"], found["width_px"], found["steps"], found["sampler"]) == ("toy", 64, 3, "ddim")
    assert found["timings_s"]["total"] >= 0
    assert found["warnings"] == ["this picture was made up by the fake backend"]
    assert found["tokens"][0]["n_tokens"] == 2
    assert answer.err == ""


def test_warnings_go_to_stderr(run: Run) -> None:
    answer = run("generate", "a fox")
    assert "warning: this picture was made up" in answer.err
    assert "made up" not in answer.out


def test_a_piped_answer_holds_no_escape_codes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITTY_WINDOW_ID", "1")
    monkeypatch.setenv("TERM", "xterm-kitty")
    answer = run("generate", "a fox")
    assert "\x1b" not in answer.out + answer.err


@pytest.mark.parametrize(("name", "format"), [("x.png", "PNG"), ("x.jpg", "JPEG"), ("x.webp", "WEBP")])
def test_the_extension_decides_the_format(run: Run, tmp_path: Path, name: str, format: str) -> None:
    assert run("generate", "a fox", "-o", name).code == 0
    assert _look(tmp_path / name).format == format


def test_format_decides_where_no_file_is_named(run: Run, home: Path) -> None:
    run("generate", "a fox", "--format", "webp")
    assert [path.suffix for path in pictures_in(home / "outputs")] == [".webp"]


@pytest.mark.parametrize("name", ["first.png", "first.jpg", "first.webp"])
def test_like_repeats_a_picture_exactly(run: Run, tmp_path: Path, name: str) -> None:
    run("generate", "a fox, 狐", "-n", "2", "--steps", "4", "--negative", "blur", "--size", "72x64", "-o", name)
    second = tmp_path / name.replace(".", "-2.")
    answer = run("generate", "--like", str(second), "-o", "again.png")
    assert answer.code == 0
    again, before = _look("again.png"), _look(second)
    if second.suffix == ".png":
        assert again.tobytes() == before.tobytes()
    assert again.info["parameters"] == _infotext(run, second)


def _infotext(run: Run, path: Path) -> str:
    facts = run("show", str(path), "--json").json
    return (
        f"{facts['prompt']}\nNegative prompt: {facts['negative_prompt']}\nSteps: {facts['steps']}, Sampler: DDIM, "
        f"CFG scale: 4, Seed: {facts['seed']}, Size: 72x64, Model: toy, Version: sdfleet {facts['version']}"
    )


def test_options_win_over_like(run: Run) -> None:
    run("generate", "a fox", "--seed", "7", "--steps", "4", "-o", "x.png")
    found = run("generate", "a cat", "--like", "x.png", "--steps", "2", "--json").json
    assert (found["steps"], found["images"][0]["seed"]) == (2, 7)
    assert run("show", found["images"][0]["path"], "--json").json["prompt"] == "a cat"


def test_a_step_cache_is_noted_in_the_picture_and_repeated_with_it(run: Run) -> None:
    assert run("generate", "a fox", "--step-cache", "light", "-o", "x.png", "--json").json["step_cache"] == "light"
    assert run("show", "x.png", "--json").json["step_cache"] == "light"
    assert run("generate", "--like", "x.png", "--json").json["step_cache"] == "light"
    assert run("generate", "--like", "x.png", "--step-cache", "off", "--json").json["step_cache"] == "off"


def test_like_needs_the_picture_it_was_drawn_from(run: Run, tmp_path: Path) -> None:
    start = _write(tmp_path / "start.png")
    run("generate", "a fox", "--image", start, "--strength", "0.5", "-o", "x.png")
    answer = run("generate", "--like", "x.png")
    assert (answer.code, "give that one with --image" in answer.err) == (2, True)
    assert run("generate", "--like", "x.png", "--image", start).code == 0


def test_an_input_picture_and_mask_are_used(run: Run, tmp_path: Path) -> None:
    start, mask = _write(tmp_path / "start.png"), _write(tmp_path / "mask.png")
    found = run(
        "generate", "a fox", "--image", start, "--mask", mask, "--strength", "0.5", "-o", "x.png", "--json"
    ).json
    assert (found["width_px"], found["height_px"]) == (64, 64)
    assert run("show", "x.png", "--json").json["task"] == "inpaint"


def test_show_tells_how_a_picture_was_made(run: Run) -> None:
    run("generate", "a fox", "--seed", "7", "-o", "x.png")
    answer = run("show", "x.png")
    assert answer.code == 0
    assert {"prompt: a fox", "seed: 7", "model: toy"} <= set(answer.out.splitlines())


def test_show_of_a_plain_picture_says_there_is_nothing(run: Run, tmp_path: Path) -> None:
    answer = run("show", _write(tmp_path / "plain.png"))
    assert (answer.code, "does not say how it was made" in answer.err) == (2, True)


BAD_INPUT = {
    "size zero": (["--size", "0x0"], "not between 16 and 4096"),
    "size negative": (["--size=-64x64"], "not WIDTHxHEIGHT"),
    "size huge": (["--size", "1000000x64"], "not between 16 and 4096"),
    "size enormous": (["--size", f"{10**30}x64"], "not WIDTHxHEIGHT"),
    "size odd": (["--size", "65x64"], "use 64 or 72"),
    "size one number": (["--size", "512"], "not WIDTHxHEIGHT"),
    "steps zero": (["--steps", "0"], "not between 1 and 1000"),
    "steps many": (["--steps", "1000000"], "not between 1 and 1000"),
    "guidance nan": (["--guidance", "nan"], "not a number between 0 and 100"),
    "guidance inf": (["--guidance", "inf"], "not a number between 0 and 100"),
    "seed negative": (["--seed", "-1"], "does not fit 64 bits"),
    "seed too large": (["--seed", str(2**64)], "does not fit 64 bits"),
    "seed text": (["--seed", "seven"], "--seed"),
    "no pictures": (["-n", "0"], "0 pictures"),
    "model": (["--model", "tyo"], "did you mean 'toy'"),
    "model path": (["--model", "../models/toy"], "there is no model named"),
    "sampler": (["--sampler", "eulr"], "there is no sampler named 'eulr'"),
    "image missing": (["--image", "nowhere.png"], "cannot be read"),
    "image folder": (["--image", "."], "is a folder"),
    "image broken": (["--image", "broken.png"], "broken.png: "),
    "image text": (["--image", "text.txt"], "text.txt: this is not a picture"),
    "mask alone": (["--mask", "ok.png"], "no image to apply it to"),
    "mask size": (["--image", "ok.png", "--mask", "small.png"], "it is 32x32, the image is 64x64"),
    "strength alone": (["--strength", "0.5"], "no picture to redraw"),
    "strength zero": (["--image", "ok.png", "--strength", "0"], "not above 0"),
    "like missing": (["--like", "nowhere.png"], "cannot be read"),
    "extension": (["-o", "x.tiff"], "no extension we write"),
    "format against name": (["-o", "x.png", "--format", "webp"], "not a name for webp"),
    "device": (["--device", "tpu"], "--device"),
    "unknown option": (["--stepps", "3"], "--stepps"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_exit_2(run: Run, home: Path, tmp_path: Path, case: str) -> None:
    _write(tmp_path / "ok.png")
    _write(tmp_path / "small.png", side_px=32)
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "broken.png").write_bytes((tmp_path / "ok.png").read_bytes()[:60])
    options, part = BAD_INPUT[case]
    before = pictures_in(tmp_path)
    answer = run("generate", "a fox", *options)
    assert answer.code == 2, answer
    assert part in answer.err
    assert "Traceback" not in answer.err
    if answer.err.startswith("error: "):
        assert answer.err.count("\n") == 1
    assert answer.out == ""
    assert pictures_in(tmp_path) == before
    assert not (home / "outputs").exists()


@pytest.mark.parametrize("prompt", ["", "   ", "a" * 100_000, "a\udcff"])
def test_a_prompt_that_cannot_be_drawn_is_exit_2(run: Run, home: Path, prompt: str) -> None:
    answer = run("generate", prompt)
    assert (answer.code, answer.err.startswith("error: prompt: ")) == (2, True)
    assert not (home / "outputs").exists()


def test_no_prompt_at_all_is_told(run: Run) -> None:
    answer = run("generate")
    assert (answer.code, "--like" in answer.err) == (2, True)


def test_an_error_under_json_is_one_object_too(run: Run) -> None:
    answer = run("generate", "a fox", "--json", "--steps", "0")
    assert answer.code == 2
    assert answer.json["error"]["code"] == "invalid_value"


def test_an_unwritable_folder_is_told_before_drawing(run: Run, home: Path) -> None:
    (home / "outputs").write_text("in the way")
    answer = run("generate", "a fox")
    assert (answer.code, "cannot be written" in answer.err) == (1, True)
    answer = run("generate", "a fox", "-o", "missing/x.png")
    assert (answer.code, "there is no folder" in answer.err) == (1, True)


def test_a_truncated_checkpoint_is_exit_2_and_named(run: Run, tmp_path: Path) -> None:
    weights = tmp_path / "weights/vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    answer = run("generate", "a fox")
    assert answer.code == 2
    assert "vae/diffusion_pytorch_model.safetensors is truncated: 9 of 432 bytes" in answer.err


def test_a_bad_setting_is_exit_2(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_DTYPE", "int3")
    answer = run("generate", "a fox")
    assert (answer.code, answer.err.startswith("error: SD_DTYPE: 'int3' is not one of")) == (2, True)


def test_a_fault_of_ours_leaves_its_traceback_in_a_file(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdfleet.backends.fake import FakeBackend

    async def burst(*_: object) -> None:
        raise RuntimeError("a bug\nof two lines")

    monkeypatch.setattr(FakeBackend, "generate", burst)
    answer = run("generate", "a fox")
    (path,) = pictures_in(home / "logs")
    assert answer.code == 1
    assert answer.err.splitlines() == [
        f"error: a fault of sdfleet itself: RuntimeError: a bug of two lines; please report it with {path}"
    ]
    assert "in burst" in path.read_text()


def test_the_picture_in_the_terminal_is_the_picture() -> None:
    from sdfleet.cli import inline

    png = b"\x89PNG" + bytes(5000)
    stream = io.StringIO()
    inline.show(png, protocol="kitty", stream=stream)
    assert stream.getvalue().startswith("\x1b_Ga=T,f=100,q=2,m=1;")
    assert "\x1b_Gm=0;" in stream.getvalue()
    stream = io.StringIO()
    inline.show(png, protocol="iterm2", stream=stream)
    assert stream.getvalue().startswith("\x1b]1337;File=inline=1;size=5004")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "dumb", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-kitty", "CI": "true"}, None),
        ({}, None),
    ],
)
def test_only_terminals_that_can_are_sent_a_picture(variables: dict[str, str], expected: str | None) -> None:
    from sdfleet.cli import inline
    from sdfleet.settings import read_terminal

    assert inline.protocol_of(read_terminal(variables)) == expected
