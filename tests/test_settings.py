"""The environment, read in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdfleet.compose import engine_options
from sdfleet.errors import InvalidValue
from sdfleet.settings import load_settings, read_terminal, table


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
        "WEIGHTS": "FP8",
        "MEMORY_MODE": "eco",
        "MAX_ROWS": "8",
        "MEMORY_LIMIT": "1.5GiB",
        "THREADS": "2",
    }.items():
        monkeypatch.setenv(f"SD_{name}", value)
    options = engine_options(load_settings())
    assert (options.device, options.dtype, options.memory_mode) == ("cpu", "bfloat16", "eco")
    assert options.weights == "fp8"
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


def test_the_file_is_weaker_than_the_environment_and_both_than_an_argument(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sdfleet.toml").write_text('model = "from-file"\nport = 1\nhost = "::1"\n')
    monkeypatch.setenv("SD_PORT", "2")
    settings = load_settings(host="127.0.0.2")
    assert (settings.model, settings.port, settings.host) == ("from-file", 2, "127.0.0.2")


def test_a_name_of_another_program_is_stronger_than_the_file_and_weaker_than_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sdfleet.toml").write_text('model = "from-file"\n')
    monkeypatch.setenv("SD_MODEL_ID", "theirs")
    assert load_settings().model == "theirs"
    monkeypatch.setenv("SD_MODEL", "ours")
    assert load_settings().model == "ours"


def test_names_without_a_prefix_are_read_for_the_server_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODE", "eco")
    monkeypatch.setenv("API_KEY", "k")
    assert load_settings().memory_mode == "auto"
    server = load_settings(for_server=True)
    assert server.memory_mode == "eco"
    assert server.api_key is not None
    assert server.api_key.get_secret_value() == "k"


def test_an_unknown_name_in_the_file_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "sdfleet.toml").write_text("max_queue = 3\n")
    with pytest.raises(InvalidValue, match="max_queued"):
        load_settings()


def test_a_slip_in_a_variable_is_refused_but_another_programs_variable_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_WEBUI_URL", "http://127.0.0.1")
    load_settings()
    monkeypatch.setenv("SD_HOTS", "::1")
    with pytest.raises(InvalidValue, match="SD_HOST"):
        load_settings()


@pytest.mark.parametrize("text", ["port = ", "port = 'x'", "\x00"])
def test_a_broken_file_is_told_by_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "sdfleet.toml").write_text(text)
    with pytest.raises(InvalidValue, match=r"sdfleet\.toml"):
        load_settings()


def test_a_file_that_was_named_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SD_CONFIG", str(tmp_path / "nowhere.toml"))
    with pytest.raises(InvalidValue, match="SD_CONFIG"):
        load_settings()


def test_a_secret_is_never_repeated_in_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sdfleet.toml").write_text("api_key = 12345678\n")
    with pytest.raises(InvalidValue) as refused:
        load_settings()
    assert "12345678" not in str(refused.value)
    monkeypatch.setenv("SD_API_KEY", "geheim")
    assert "geheim" not in repr(load_settings())


def test_every_setting_stands_in_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs" / "settings.md").read_text(encoding="utf-8")
    assert table() in page
