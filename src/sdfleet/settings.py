"""What the environment says: the only file that reads it.

Every setting is `SD_<NAME>`; an argument given to `load_settings` wins over the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from platformdirs import user_data_path
from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from sdfleet.errors import InvalidValue

LogLevel = Literal["debug", "info", "warning", "error"]

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def _bytes(value: object) -> object:
    """`8GiB`, `8GB`, `8g`, `512m` or a plain count, as bytes; a unit is a power of 1024."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError("is not an amount of memory, for example 8GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _folder(value: object) -> object:
    return Path(value).expanduser().absolute() if isinstance(value, str | Path) else value


Folder = Annotated[Path, BeforeValidator(_folder)]


def _default_home() -> Path:
    return user_data_path("sdfleet", appauthor=False)


class Settings(BaseSettings):
    """Everything a person can set for a whole machine; each field is `SD_<FIELD>` in the environment.

    home: imported cards, outputs and logs. outputs: finished pictures; None puts them into `home/outputs`.
    backend: "fake" makes up pictures without a model, for testing what stands around it.
    device, dtype, memory_mode, max_rows, memory_limit (bytes), threads, executor: as in `engine.events.EngineOptions`.
    """

    model_config = SettingsConfigDict(env_prefix="SD_", env_ignore_empty=True, extra="forbid", frozen=True)

    home: Folder = Field(default_factory=_default_home)
    outputs: Folder | None = None
    model: str = "starter"
    backend: Annotated[Literal["local", "fake"], BeforeValidator(_lower)] = "local"
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], BeforeValidator(_lower)] = "auto"
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_lower)] = "auto"
    memory_mode: Annotated[Literal["auto", "fast", "eco"], BeforeValidator(_lower)] = "auto"
    max_rows: Annotated[int, Field(ge=1, le=4096)] | None = None
    memory_limit: Annotated[int, BeforeValidator(_bytes), Field(ge=2**20)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    executor: Annotated[Literal["auto", "torch", "openvino"], BeforeValidator(_lower)] = "auto"
    log_level: Annotated[LogLevel, BeforeValidator(_lower)] = "warning"
    log_json: bool = False

    @property
    def models_folder(self) -> Path:
        """Where the cards of imported checkpoints are kept."""
        return self.home / "models"

    @property
    def outputs_folder(self) -> Path:
        """Where finished pictures go when nobody names a file."""
        return self.outputs or self.home / "outputs"

    @property
    def cache_folder(self) -> Path:
        """What can be made again: may be deleted at any time."""
        return self.home / "cache"

    @property
    def logs_folder(self) -> Path:
        """Where the traceback of an unforeseen fault is kept."""
        return self.home / "logs"


def load_settings(**given: object) -> Settings:
    """The settings of this machine; `given` fields that are not None win over the environment.

    Raises InvalidValue, naming the variable and what it may hold.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(**chosen)  # type: ignore[arg-type]
    except ValidationError as exc:
        fault = exc.errors()[0]
        name = str(fault["loc"][0]) if fault["loc"] else "settings"
        field = name if name in chosen else f"SD_{name.upper()}"
        raise InvalidValue(field, f"{fault['input']!r} {_reason(fault['type'], fault['msg'])}") from exc


def _reason(kind: str, message: str) -> str:
    if kind == "literal_error":
        return "is not one of " + message.removeprefix("Input should be ").replace("'", "").replace(" or ", ", ")
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    return message[0].lower() + message[1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """What the environment tells about the terminal; whether a stream is one is for the caller to ask."""

    program: str
    term: str
    is_kitty: bool
    is_ci: bool
    has_colour: bool
    columns: int | None


def read_terminal(environ: Mapping[str, str] | None = None) -> Terminal:
    """The facts about this terminal that decide on colour and inline pictures."""
    env = os.environ if environ is None else environ
    columns = env.get("COLUMNS", "")
    return Terminal(
        program=env.get("TERM_PROGRAM", ""),
        term=env.get("TERM", ""),
        is_kitty="KITTY_WINDOW_ID" in env,
        is_ci=env.get("CI", "").lower() not in ("", "0", "false"),
        has_colour=not env.get("NO_COLOR"),
        columns=int(columns) if columns.isascii() and columns.isdigit() else None,
    )
