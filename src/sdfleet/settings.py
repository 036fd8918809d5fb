"""What a person can set for a whole machine: the only file that reads the environment.

Every setting has one name. What wins, strongest first:

    1. an option of the command line         sdfleet serve --port 8000
    2. the environment                        SD_PORT=8000
    3. names that other programs use for it   SD_OUTPUT_DIR, and for the server API_KEY, LOGLEVEL, MODE ...
    4. the file                               port = 8000 in sdfleet.toml, which lies in the data folder or is SD_CONFIG
    5. the default

A name in the file that does not exist is refused, with the nearest one; so is a variable that looks like a slip of the
pen. Other variables that begin with SD_ belong to other programs and mean nothing here.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from platformdirs import user_data_path
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from sdfleet.errors import InvalidValue

LogLevel = Literal["debug", "info", "warning", "error"]

_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def _bytes(value: object) -> object:
    """`8GiB`, `8GB`, `8g`, `512m` or a plain count, as bytes; a unit is a power of 1024."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError("is not an amount of memory, for example 8GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def seconds_of(value: object) -> float | None:
    """A keep-alive in seconds: a number, `90`, `"90s"`, `"5m"`, `"1h30m"`; None for a negative one: for ever.

    Raises ValueError.

    >>> seconds_of("5m"), seconds_of("1h30m"), seconds_of(0), seconds_of("-1"), seconds_of("500ms")
    (300.0, 5400.0, 0.0, None, 0.5)
    """
    text = str(value).strip().lower()
    number = re.fullmatch(r"-?\d+(?:\.\d+)?", text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s)", text)
    if isinstance(value, bool) or not (number or re.fullmatch(r"-?(?:\d+(?:\.\d+)?(?:ms|h|m|s))+", text)):
        raise ValueError("is not a time, for example 5m; 0 for none, -1 for ever")
    if text.startswith("-"):
        return None
    return float(text) if number else sum(float(amount) * _SECONDS[unit] for amount, unit in parts)


def _keep_alive(value: object) -> object:
    if value is None:
        return None
    return seconds_of(value)


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _folder(value: object) -> object:
    return Path(value).expanduser().absolute() if isinstance(value, str | Path) else value


def _names(value: object) -> object:
    """`a, b` as a tuple of names."""
    return tuple(filter(None, (part.strip() for part in value.split(",")))) if isinstance(value, str) else value


def _endpoint(value: object) -> object:
    """A web address without the slash at its end; a name alone is taken for https."""
    if not isinstance(value, str):
        return value
    address = value.strip().rstrip("/")
    address = address if "://" in address else f"https://{address}"
    if not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", address):
        raise ValueError("is not a web address, for example https://huggingface.co")
    return address


Folder = Annotated[Path, BeforeValidator(_folder)]
Endpoint = Annotated[str, BeforeValidator(_endpoint)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]
Endpoints = Annotated[tuple[Endpoint, ...], NoDecode, BeforeValidator(_names)]


def _default_home() -> Path:
    return user_data_path("sdfleet", appauthor=False)


class Settings(BaseSettings):
    """Everything a person can set for a whole machine; `docs/settings.md` is made from it."""

    model_config = SettingsConfigDict(
        env_prefix="SD_", env_ignore_empty=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    home: Folder = Field(default_factory=_default_home)
    """Imported cards, the database of jobs, caches and logs."""
    outputs: Folder | None = None
    """Finished pictures; in `home/outputs` when not set."""
    model_dir: Folder | None = None
    """Cards of imported models; in `home/models` when not set."""
    model: str = "starter"
    """The model where a request names none."""
    default_backend: Annotated[
        Literal["auto", "sd", "flux-local", "flux-api", "mflux", "diffusionkit", "ollama"], BeforeValidator(_lower)
    ] = "auto"
    """What draws a request that names no backend, see docs/backends.md; `flux-api` sends its prompt to a service."""
    bfl_api_key: SecretStr | None = None
    """A key of Black Forest Labs: with it the backend `flux-api` draws there, for money, where it is named."""
    bfl_endpoint: Endpoint = "https://api.bfl.ai"
    """Their service, for example `https://api.eu.bfl.ai`."""
    backend: Annotated[Literal["local", "fake"], BeforeValidator(_lower)] = "local"
    """`local` draws; `fake` makes up pictures without a model, for testing what stands around it."""
    fake_step_s: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """Seconds that a step of such a made-up picture takes."""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], BeforeValidator(_lower)] = "auto"
    """Where to draw."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_lower)] = "auto"
    """Number format of the weights; `auto` takes the fastest that this machine computes well."""
    weights: Annotated[Literal["auto", "fp8", "int8", "nf4"], BeforeValidator(_lower)] = "auto"
    """What the denoiser's and large text encoders' weights are kept in: 8 or 4 bits save memory, change pictures."""
    text_weights: Annotated[Literal["auto", "full", "fp8", "int8", "nf4"], BeforeValidator(_lower)] = "auto"
    """The same for T5 and Qwen3 alone; `auto` as `weights`, `full` in the number format."""
    memory_mode: Annotated[Literal["auto", "fast", "eco"], BeforeValidator(_lower)] = "auto"
    """`fast` keeps everything on the device, `eco` as little as it can."""
    max_rows: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Most rows of one step batch; found by measuring when not set."""
    memory_limit: Annotated[int, BeforeValidator(_bytes), Field(ge=2**20)] | None = None
    """Most memory the engine may plan with, for example `8GiB`."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads of the engine on a CPU; all cores when not set."""
    executor: Annotated[Literal["auto", "torch", "openvino", "int8"], BeforeValidator(_lower)] = "auto"
    """What runs the denoiser on a CPU; `auto` tries what is installed and takes the faster one."""
    engines: Annotated[int, Field(ge=1, le=64)] | Annotated[Literal["auto"], BeforeValidator(_lower)] = "auto"
    """On a CPU, how many engine processes small models are spread over; auto: where that was measured to gain."""
    compile: Annotated[Literal["auto", "off", "on"], BeforeValidator(_lower)] = "auto"
    """Whether the denoiser is compiled (`torch.compile`); `auto` does so on CUDA."""
    keep_alive: Annotated[float | None, BeforeValidator(_keep_alive)] = 900.0
    """Seconds (or `5m`, `1h`) that a model stays in memory after its last job; 0: not at all, -1: until it must go."""
    safety_checker: Annotated[Literal["on", "flag", "off"], BeforeValidator(_lower)] = "on"
    """What becomes of a picture that the model's own checker flags: `on` withholds it, `flag` only says so."""
    previews_before_check: bool = True
    """Whether previews are shown of pictures that the checker may withhold in the end."""
    log_level: Annotated[LogLevel, BeforeValidator(_lower)] | None = None
    """How much is told; `warning` for commands and `info` for the server when not set."""
    log_json: bool = False
    """Log lines as JSON objects."""
    host: str = "127.0.0.1"
    """Address the server listens on. Anything but loopback needs a key."""
    port: Annotated[int, Field(ge=0, le=65535)] = 7860
    """Port the server listens on; 0 takes a free one."""
    api_key: SecretStr | None = None
    """A key with every scope, beside those of `sdfleet keys`."""
    public_url: str | None = None
    """What links in answers begin with, where the server stands behind another name."""
    allowed_hosts: Names = ()
    """Names the server may be called by, beside loopback and `host`; separated by commas."""
    allowed_origins: Names = ()
    """Pages of other sites that may call the server from a browser; separated by commas."""
    database_url: SecretStr | None = None
    """Where jobs are kept, for example `postgresql://user@host/name`; a SQLite file in `home` when not set."""
    max_pictures: Annotated[int, Field(ge=1, le=4096)] = 32
    """Pictures that are drawn at once; more wait in line, where priorities and fairness decide."""
    max_queued: Annotated[int, Field(ge=1)] = 1000
    """Jobs that may wait; more are answered with 429."""
    max_body: Annotated[int, BeforeValidator(_bytes), Field(ge=2**10)] = 64 * 2**20
    """Bytes of one request."""
    rate_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Requests for pictures per key and minute; as many as it likes when not set."""
    request_timeout_s: Annotated[float, Field(gt=0)] | None = None
    """Longest that a route which waits for its picture may take; for ever when not set."""
    drain_s: Annotated[float, Field(ge=0)] = 30.0
    """After SIGTERM, how long jobs that are being drawn may go on; the others go on after the next start."""
    cancel_on_disconnect: bool = True
    """Whether a caller who leaves a waiting route takes the job along."""
    allow_image_urls: bool = False
    """Whether input pictures may be named by URL."""
    allow_private_urls: bool = False
    """Whether such URLs, and webhooks, may lead into private networks."""
    hub: Annotated[Literal["hf", "modelscope"], BeforeValidator(_lower)] = "hf"
    """Where `sdfleet models pull` gets weights when it is not told: Hugging Face or ModelScope."""
    hf_endpoint: Endpoint = "https://huggingface.co"
    """Hugging Face, or a mirror of it."""
    hf_token: SecretStr | None = None
    """A token of Hugging Face, for gated and private models; the login of the `hf` command when not set."""
    modelscope_endpoint: Endpoint = "https://modelscope.cn"
    """ModelScope, or a mirror of it."""
    modelscope_token: SecretStr | None = None
    """A token of ModelScope, for private models."""
    token_to_mirror: bool = False
    """Whether the tokens are also sent to mirrors, which could keep them."""
    pull_without_asking: bool = False
    """A yes to every download that is asked for, for machines where nobody can be asked."""
    otel_endpoint: str | None = None
    """An OpenTelemetry collector that is told of every job (OTLP over HTTP), for example `http://localhost:4318`."""
    keep_outputs_days: Annotated[float, Field(gt=0)] | None = None
    """Finished pictures older than this are removed; kept for ever when not set."""
    keep_jobs_days: Annotated[float, Field(gt=0)] | None = None
    """Jobs older than this are removed; kept for ever when not set."""
    router_port: Annotated[int, Field(ge=0, le=65535)] = 11435
    """Port that `sdfleet router` listens on."""
    router_url: str | None = None
    """Router that `sdfleet fleet` talks to; the one of this data folder when not set."""
    broker_host: str = "0.0.0.0"  # noqa: S104 - nodes come from other machines, with TLS and a key each
    """Address that the router's own broker listens on, for nodes."""
    broker_port: Annotated[int, Field(ge=1, le=65535)] = 4222
    """Port of the router's own broker: the only one that a node must reach."""
    broker_names: Names = ()
    """What nodes call this machine by, for join codes; its addresses when not set. Separated by commas."""
    nats_url: Names = ()
    """A NATS server or cluster with JetStream instead of the router's own broker; separated by commas."""
    nats_seed: SecretStr | None = None
    """The router's NKey seed there; its own, which `sdfleet fleet nats-config` names, when not set."""
    nats_ca: Folder | None = None
    """A PEM file with the certificate that signs that server's."""
    nats_replicas: Annotated[int, Field(ge=1, le=5)] = 1
    """Servers of that cluster that keep each accepted job; 3 outlive the loss of one."""
    discovery: bool = True
    """Whether a router tells the local network its address, and a node looks for one there (mDNS)."""
    join_requests: bool = True
    """Whether a machine without a join code may ask a router to be let in, which a person then approves."""
    node_name: str | None = None
    """What a node is called; this machine's name when not set."""
    node_slots: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Pictures that a node draws at once; found by what the engine measures when not set."""
    ollama_url: Endpoint | None = None
    """An Ollama whose models answer here too, and draw (backend `ollama`), for example `http://127.0.0.1:11434`."""
    language_urls: Endpoints = ()
    """OpenAI-compatible servers (llama.cpp, vLLM, LM Studio) whose models answer here too; separated by commas."""
    language_key: SecretStr | None = None
    """A key for these servers."""
    speech_models: Folder | None = None
    """A folder with faster-whisper models (CTranslate2), each in a folder of its own; needs the extra `speech`."""

    @model_validator(mode="before")
    @classmethod
    def _a_model_that_is_drawn_there(cls, given: Any) -> Any:
        """Where a service is the default and no model is named, the built-in one cannot be meant: it has its own."""
        if isinstance(given, dict) and _lower(given.get("default_backend")) == "flux-api":
            return {"model": "flux-pro-1.1", **given}
        return given

    @property
    def models_folder(self) -> Path:
        """Where the cards of imported checkpoints are kept."""
        return self.model_dir or self.home / "models"

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


CONFIG_FILE = "sdfleet.toml"
MAX_CONFIG_BYTES = 2**20
# What the same thing is called elsewhere.
OTHER_NAMES = {
    "SD_OUTPUT_DIR": "outputs",
    "SD_MODEL_ID": "model",
    "SD_HUGGINGFACE_TOKEN": "hf_token",
    "HF_TOKEN": "hf_token",
    "HF_ENDPOINT": "hf_endpoint",
    "MODELSCOPE_API_TOKEN": "modelscope_token",
    "MODELSCOPE_ENDPOINT": "modelscope_endpoint",
}
# Names without a prefix mean something else in many a shell; only the server reads them.
SERVER_NAMES = {
    "API_KEY": "api_key",
    "LOGLEVEL": "log_level",
    "MAX_CONCURRENCY": "max_pictures",
    "MODE": "memory_mode",
    "MODEL_DIR": "model_dir",
}
# Variables of ours that are no settings.
_BESIDE = frozenset({"SD_CONFIG"})
# Variables of the libraries beneath us and of the network; `sdfleet doctor` says what they do to us.
SURROUNDINGS = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "PYTHONPATH",
    "TORCH_COMPILE_DISABLE",
    "TRANSFORMERS_OFFLINE",
)
# How alike a variable must be to a setting to be taken for a slip: SD_HOTS is, another program's SD_WEBUI_URL is not.
_SLIP = 0.8


def load_settings(*, for_server: bool = False, **given: object) -> Settings:
    """The settings of this machine; `given` fields that are not None win over all else.

    for_server: also read the names without a prefix that other image servers use.
    Raises InvalidValue, naming where the value came from and what it may hold.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    sources = {name: name for name in chosen}
    environ = {name: value for name, value in os.environ.items() if value}
    _refuse_slips(environ)
    others = OTHER_NAMES | (SERVER_NAMES if for_server else {})
    for variable, field in others.items():
        if variable in environ and field not in chosen and f"SD_{field.upper()}" not in environ:
            chosen[field], sources[field] = environ[variable], variable
    home = chosen.get("home") or environ.get("SD_HOME") or _default_home()
    for field, value in _read_config(Path(environ.get("SD_CONFIG") or Path(str(home)) / CONFIG_FILE), environ).items():
        if field not in chosen and f"SD_{field.upper()}" not in environ:
            chosen[field], sources[field] = value, f"{CONFIG_FILE}: {field}"
    try:
        return Settings(**chosen)  # type: ignore[arg-type]
    except ValidationError as exc:
        fault = exc.errors()[0]
        name = str(fault["loc"][0]) if fault["loc"] else "settings"
        shown = "the value" if name in _SECRETS else repr(fault["input"])
        source = sources.get(name, f"SD_{name.upper()}")
        raise InvalidValue(source, f"{shown} {_reason(fault['type'], fault['msg'])}") from exc


def engine_environment() -> dict[str, str]:
    """The environment for a process that draws: ours, in which no library of Hugging Face asks a hub for anything.

    The engine draws with what lies here; whatever a library would look up on its own, a user has not asked for.
    """
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


_SECRETS = frozenset({
    "api_key", "bfl_api_key", "database_url", "hf_token", "language_key", "modelscope_token", "nats_seed"
})  # fmt: skip


def _read_config(path: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings in the file; none where there is no file, unless SD_CONFIG names it. Raises InvalidValue."""
    source = "SD_CONFIG" if "SD_CONFIG" in environ else CONFIG_FILE
    try:
        with path.expanduser().open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES).decode()
    except FileNotFoundError as exc:
        if "SD_CONFIG" in environ:
            raise InvalidValue(source, f"there is no file {path}") from exc
        return {}
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidValue(source, f"{path} cannot be read: {exc}") from exc
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise InvalidValue(source, f"{path} is not TOML: {exc}") from exc
    for name in found:
        if name not in Settings.model_fields:
            near = get_close_matches(name.lower(), Settings.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "see docs/settings.md"
            raise InvalidValue(f"{CONFIG_FILE}: {name}", "there is no such setting", hint=hint)
    return found


def _refuse_slips(environ: Mapping[str, str]) -> None:
    """Raise InvalidValue for a variable that is nearly one of ours."""
    known = {f"SD_{name.upper()}" for name in Settings.model_fields} | OTHER_NAMES.keys() | _BESIDE
    for variable in environ:
        if not variable.startswith("SD_") or variable in known:
            continue
        near = get_close_matches(variable, known, n=1, cutoff=_SLIP)
        if near:
            raise InvalidValue(variable, "there is no such setting", hint=f"did you mean {near[0]}?")


def table() -> str:
    """The settings as a table in Markdown; the body of docs/settings.md.

    >>> print(table().splitlines()[0])
    | in sdfleet.toml | in the environment | default | what it does |
    """
    also: dict[str, list[str]] = {}
    for variable, meant in (OTHER_NAMES | SERVER_NAMES).items():
        also.setdefault(meant, []).append(variable)
    lines = ["| in sdfleet.toml | in the environment | default | what it does |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        names = ", ".join(f"`{variable}`" for variable in (f"SD_{name.upper()}", *also.get(name, ())))
        default = "the data folder of your system" if name == "home" else _shown(field.default)
        choices = choices_of(field.annotation)
        text = (field.description or "") + (f" One of {', '.join(f'`{c}`' for c in choices)}." if choices else "")
        lines.append(f"| `{name}` | {names} | {default} | {text} |")
    return "\n".join(lines)


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The values of a setting that is one of a few words."""
    found = get_args(annotation)
    if get_origin(annotation) is Literal:
        return found
    return next((inner for part in found if (inner := choices_of(part))), ())


def _shown(default: object) -> str:
    if default is None or default == ():
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _reason(kind: str, message: str) -> str:
    if kind == "literal_error":
        return "is not one of " + message.removeprefix("Input should be ").replace("'", "").replace(" or ", ", ")
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def read_surroundings(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What is set of `SURROUNDINGS`, also where it is set to nothing; programs write proxies in small letters too.

    >>> read_surroundings({"https_proxy": "http://proxy:3128", "HOME": "/"})
    {'HTTPS_PROXY': 'http://proxy:3128'}
    """
    env = os.environ if environ is None else environ
    found = {}
    for name in SURROUNDINGS:
        value = env.get(name.lower(), env.get(name)) if name.endswith("PROXY") else env.get(name)
        if value is not None:
            found[name] = value
    return found


def environment_with(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process for a child of it, with these besides."""
    return {**os.environ, **extra}


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
