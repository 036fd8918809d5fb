"""The other commands, and how the program starts, is interrupted, and looks on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from sdfleet import __version__
from tests.catalog.folders import write_sd, write_sd3
from tests.cli.conftest import Run

# typer itself brings pydantic.
HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL", "pydantic_settings", "rich", "asyncio.events")


def test_the_version_is_told(run: Run) -> None:
    assert run("--version").out == f"sdfleet {__version__}\n"


@pytest.mark.parametrize(
    "command", [[], ["generate"], ["show"], ["models"], ["models", "import"], ["bench"], ["train"]]
)
def test_every_command_explains_itself(run: Run, command: list[str]) -> None:
    answer = run(*command, "--help")
    assert answer.code == 0
    assert answer.out.startswith("Usage: ")


def test_models_can_be_imported_listed_and_shown(run: Run, tmp_path: Path) -> None:
    folder = write_sd3(tmp_path / "sd3")
    assert run("models", "import", str(folder), "--name", "mine").code == 0
    listed = {model["name"]: model for model in run("models", "list", "--json").json["models"]}
    assert listed["mine"]["folder"] == str(folder)
    assert "mine" in run("models", "list").out
    shown = run("models", "show", "mine", "--json").json
    assert (shown["family"], shown["pipeline_class"]) == ("sd3", "StableDiffusion3Pipeline")
    assert shown["n_bytes"] == sum(sum(part["bytes_by_dtype"].values()) for part in shown["components"])
    assert "transformer" in run("models", "show", "mine").out


def test_a_folder_that_went_away_is_marked_in_the_list(run: Run, tmp_path: Path) -> None:
    (tmp_path / "weights").rename(tmp_path / "moved")
    assert "(folder is missing)" in run("models", "list").out


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda path: path.write_bytes(b"\x80\x04"), "is a pickle"),
        (lambda path: path.mkdir(), "no model_index.json"),
        (lambda _: None, "there is nothing at"),
        (lambda path: write_sd(path, pipeline="PixArtSigmaPipeline"), "PixArtSigmaPipeline is not served yet"),
    ],
    ids=["pickle", "empty folder", "nothing", "another family"],
)
def test_what_cannot_be_imported_is_exit_2(run: Run, tmp_path: Path, make: object, part: str) -> None:
    assert callable(make)
    make(tmp_path / "model.ckpt")
    answer = run("models", "import", "model.ckpt", "--name", "mine")
    assert (answer.code, part in answer.err) == (2, True)
    assert "mine" not in run("models", "list").out


def test_bench_times_every_combination(run: Run) -> None:
    answer = run("bench", "--sizes", "64x64,72x64", "--steps", "1,2", "--batch", "1,3", "--runs", "1", "--json")
    cases = [(t["width_px"], t["steps"], t["n_images"]) for t in answer.json["timings"]]
    assert cases == [(w, s, n) for w in (64, 72) for s in (1, 2) for n in (1, 3)]
    assert all(t["best_s"] > 0 for t in answer.json["timings"])
    assert "seconds" in run("bench", "--batch", "1", "--runs", "1").out


@pytest.mark.parametrize("options", [["--sizes", "64"], ["--steps", "1,x"], ["--batch", "0"], ["--steps", "1,5000"]])
def test_bench_refuses_bad_lists_before_it_starts(run: Run, options: list[str]) -> None:
    answer = run("bench", *options)
    assert (answer.code, answer.err.count("\n")) == (2, 1)


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def test_help_loads_nothing_but_typer_and_the_standard_library() -> None:
    code = (
        "import sys, sdfleet.cli.main as m\n"
        "try: m.app(['generate', '--help'], prog_name='sdfleet')\n"
        "except SystemExit: pass\n"
        f"print('LOADED', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run(_python("-c", code), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.usefixtures("home")
def test_drawing_never_loads_torch_in_this_process() -> None:
    code = (
        "import sys, sdfleet.cli.main as m\n"
        "try: m.app(['generate', 'fox', '-o', 'x.png'], prog_name='sdfleet')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "print('LOADED', sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(_python("-c", code), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.usefixtures("home")
def test_ctrl_c_cancels_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, asyncio, sdfleet.compose.machine as machine\n"
        "from sdfleet.backends.fake import FakeBackend\n"
        "class Held(FakeBackend):\n"
        "    def __init__(self, **_): super().__init__(before_step=self.hold)\n"
        "    async def hold(self, drawing, step):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        await asyncio.Event().wait()\n"
        "    async def close(self):\n"
        "        print('closed'); await super().close()\n"
        "machine.FakeBackend = Held\n"
        "from sdfleet.cli.main import main\n"
        "import sys; sys.argv = ['sdfleet', 'generate', 'fox', '-o', 'x.png']; main()"
    )
    done = subprocess.run(_python("-c", code), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "closed\n", "error: cancelled\n")
    assert not list(tmp_path.glob("*.png*"))
    assert not list(tmp_path.glob(".sdfleet*"))


@pytest.mark.usefixtures("home")
def test_a_terminal_that_can_is_shown_a_bar_and_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "NO_COLOR", "TERM_PROGRAM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-kitty")
    outer, inner = pty.openpty()
    command = _python("-m", "sdfleet", "generate", "fox", "-n", "2", "-o", "x.png")
    process = subprocess.Popen(command, stdout=inner, stderr=inner, stdin=subprocess.DEVNULL)
    os.close(inner)
    shown = b""
    try:
        while chunk := os.read(outer, 65536):
            shown += chunk
    except OSError:
        # Linux says EIO where others say end of file.
        pass
    os.close(outer)
    assert process.wait() == 0
    assert shown.count(b"\x1b_Ga=T,f=100") == 2
    assert b"loading" in shown or b"picture" in shown
    assert str(tmp_path / "x-1.png").encode() in shown.replace(b"\r\n", b"\n")
