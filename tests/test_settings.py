"""The environment, read in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdfleet.compose import engine_options
from sdfleet.errors import InvalidValue
from sdfleet.settings import load_settings, read_terminal


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "DEVICE",
        "DTYPE",
        "MEMORY_MODE",
        "MAX_ROWS",
        "MEMORY_LIMIT",
        "THREADS",
        "MODEL",
        "OUTPUTS",
        "BACKEND",
    ):
        monkeypatch.delenv(f"SD_{name}", raising=False)
    monkeypatch.setenv("SD_HOME", str(tmp_path))


def test_everything_lies_under_the_data_folder(tmp_path: Path) -> None:
    settings = load_settings()
    assert settings.models_folder == tmp_path / "models"
    assert settings.outputs_folder == tmp_path / "outputs"
    assert settings.logs_folder == tmp_path / "logs"


def test_without_sd_home_the_data_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SD_HOME")
    home = load_settings().home
    assert home.is_absolute()
    assert home.name == "sdfleet"


def test_reading_the_settings_makes_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SD_HOME", str(tmp_path / "new"))
    load_settings()
    assert not (tmp_path / "new").exists()


def test_a_relative_or_home_folder_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_HOME", "here")
    monkeypatch.setenv("SD_OUTPUTS", "~/pictures")
    settings = load_settings()
    assert settings.home == tmp_path / "here"
    assert settings.outputs_folder == Path.home() / "pictures"


def test_the_environment_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DEVICE": "CPU",
        "DTYPE": "bfloat16",
        "MEMORY_MODE": "eco",
        "MAX_ROWS": "8",
        "MEMORY_LIMIT": "1.5GiB",
        "THREADS": "2",
    }.items():
        monkeypatch.setenv(f"SD_{name}", value)
    options = engine_options(load_settings())
    assert (options.device, options.dtype, options.memory_mode) == ("cpu", "bfloat16", "eco")
    assert (options.max_rows, options.memory_limit_bytes, options.n_threads) == (8, 3 * 2**29, 2)


def test_an_option_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_DEVICE", "cuda")
    assert load_settings(device="cpu", dtype=None).device == "cpu"


def test_an_empty_variable_is_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_MAX_ROWS", "")
    assert load_settings().max_rows is None


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("SD_DEVICE", "gpu", "'gpu' is not one of auto, cpu, cuda, mps"),
        ("SD_MAX_ROWS", "0", "greater than or equal to 1"),
        ("SD_MAX_ROWS", "many", "valid integer"),
        ("SD_MEMORY_LIMIT", "lots", "not an amount of memory"),
        ("SD_THREADS", "-1", "greater than or equal to 1"),
        ("SD_LOG_LEVEL", "loud", "not one of debug, info, warning, error"),
    ],
)
def test_a_bad_value_names_its_variable_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, part: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidValue) as caught:
        load_settings()
    assert str(caught.value).startswith(f"{name}: ")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_terminal_is_described_by_its_variables() -> None:
    terminal = read_terminal({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1", "COLUMNS": "80", "NO_COLOR": "1"})
    assert (terminal.term, terminal.is_kitty, terminal.columns, terminal.has_colour) == ("xterm-kitty", True, 80, False)
    assert not terminal.is_ci
    assert read_terminal({"CI": "true"}).is_ci
    assert read_terminal({"COLUMNS": "wide"}).columns is None
