"""Published models by name: their components' classes and settings, without weights.

What `sdfleet bench` needs to measure a model that nobody has downloaded yet. Facts lie in data/architectures, one file
a model; what models share is in parts.toml, and `like` takes it over.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdfleet.catalog.identify import FAMILY_OF
from sdfleet.errors import BrokenCheckpoint, UnknownName

_PARTS = "parts.toml"
DENOISERS = ("unet", "transformer")
# Settings that make a text encoder light while its answers keep their shape: FLUX.2 klein reads the 27th layer, SDXL
# the one before the last.
_LIGHT: Mapping[str, Mapping[str, Any]] = {
    "clip": {"vocab_size": 1024, "num_hidden_layers": 2, "intermediate_size": 64},
    "t5": {"vocab_size": 1024, "num_layers": 1, "num_heads": 1, "d_kv": 16, "d_ff": 64},
    "qwen3": {
        "vocab_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 1, "num_key_value_heads": 1,
        "head_dim": 16, "intermediate_size": 64,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One component: the class it names itself, and what its config.json holds."""

    class_name: str
    config: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A published model without its weights.

    flags: settings of the pipeline itself, as in model_index.json. n_denoiser_parameters: as counted, for checking.
    """

    name: str
    title: str
    pipeline: str
    parts: Mapping[str, Part]
    n_denoiser_parameters: int
    flags: Mapping[str, bool] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """Which adapter of the engine draws with it."""
        return FAMILY_OF[self.pipeline]

    @property
    def denoiser(self) -> str:
        """`unet` or `transformer`."""
        return next(name for name in DENOISERS if name in self.parts)

    def with_light_text_encoders(self) -> Architecture:
        """The same with text encoders of a few layers: their answers have the right shape and cost next to nothing."""
        return replace(self, parts={name: _light(part) for name, part in self.parts.items()})


class _Described(BaseModel):
    """The file of one model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    pipeline: str
    n_denoiser_parameters: int = Field(gt=0)
    flags: dict[str, bool] = {}
    components: dict[str, dict[str, Any]]


def names() -> tuple[str, ...]:
    """Every model that has a file here, sorted."""
    found = (entry.name for entry in _folder().iterdir() if entry.name.endswith(".toml") and entry.name != _PARTS)
    return tuple(sorted(name.removesuffix(".toml") for name in found))


def load(name: str) -> Architecture:
    """The model of this name. Raises UnknownName with what there is."""
    if name not in names():
        raise UnknownName("architecture", name, names())
    return parse(name, _folder().joinpath(f"{name}.toml").read_text(encoding="utf-8"))


def parse(name: str, text: str) -> Architecture:
    """A model from the text of its file. Raises BrokenCheckpoint that says what is wrong in it."""
    shared = tomllib.loads(_folder().joinpath(_PARTS).read_text(encoding="utf-8"))
    try:
        described = _Described.model_validate(tomllib.loads(text))
        parts = {}
        for component, settings in described.components.items():
            resolved = _resolved(settings, shared)
            parts[component] = Part(class_name=resolved.pop("class"), config=resolved)
    except (ValidationError, tomllib.TOMLDecodeError, KeyError) as exc:
        raise BrokenCheckpoint(f"the architecture {name} cannot be read: {exc}", hint="correct its file") from exc
    if described.pipeline not in FAMILY_OF or not set(DENOISERS) & parts.keys():
        raise BrokenCheckpoint(f"the architecture {name} has no pipeline that is served, or no denoiser")
    return Architecture(
        name=name,
        title=described.title,
        pipeline=described.pipeline,
        parts=parts,
        n_denoiser_parameters=described.n_denoiser_parameters,
        flags=described.flags,
    )


def _folder() -> Traversable:
    return resources.files("sdfleet.catalog").joinpath("data/architectures")


def _resolved(settings: Mapping[str, Any], shared: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    own = {key: value for key, value in settings.items() if key != "like"}
    return own if "like" not in settings else {**_resolved(shared[settings["like"]], shared), **own}


def _light(part: Part) -> Part:
    kind = next((kind for kind in _LIGHT if part.class_name.lower().startswith(kind)), None)
    return part if kind is None else replace(part, config={**part.config, **_LIGHT[kind]})
