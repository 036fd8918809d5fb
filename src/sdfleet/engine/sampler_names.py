"""What samplers are called: one canonical id each, and every spelling that clients use for it.

>>> [str(parse_sampler(name)) for name in ("DPM++ 2M Karras", "sample_dpmpp_2m", "k_euler_ancestral")]
['dpm++_2m karras', 'dpm++_2m', 'euler_a']
>>> a1111_label("dpm++_2m_sde exponential")
'DPM++ 2M SDE Exponential'
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from sdfleet.errors import InvalidValue, UnknownName

Spacing = Literal["default", "karras", "exponential", "beta"]

_ALL: tuple[Spacing, ...] = get_args(Spacing)
_ONLY_DEFAULT: tuple[Spacing, ...] = ("default",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """label: AUTOMATIC1111's name. class_name: diffusers' scheduler class for UNets. aliases: other spellings."""

    label: str
    class_name: str
    aliases: tuple[str, ...] = ()
    spacings: tuple[Spacing, ...] = _ALL


# The first eight have rules of our own (samplers.py); the others run diffusers' class (foreign_samplers.py).
_FACTS: dict[str, _Facts] = {
    "euler": _Facts(label="Euler", class_name="EulerDiscreteScheduler", aliases=("flow_match_euler_discrete",)),
    "euler_a": _Facts(
        label="Euler a",
        class_name="EulerAncestralDiscreteScheduler",
        aliases=("euler_ancestral",),
        spacings=_ONLY_DEFAULT,
    ),
    "heun": _Facts(label="Heun", class_name="HeunDiscreteScheduler", aliases=("flow_match_heun_discrete",)),
    "ddim": _Facts(label="DDIM", class_name="DDIMScheduler", spacings=_ONLY_DEFAULT),
    "dpm++_2m": _Facts(label="DPM++ 2M", class_name="DPMSolverMultistepScheduler", aliases=("dpm_solver++",)),
    "dpm++_2m_sde": _Facts(label="DPM++ 2M SDE", class_name="DPMSolverMultistepScheduler"),
    "unipc": _Facts(label="UniPC", class_name="UniPCMultistepScheduler", aliases=("uni_pc_bh2",)),
    "lcm": _Facts(label="LCM", class_name="LCMScheduler", aliases=("flow_match_lcm",), spacings=_ONLY_DEFAULT),
    "pndm": _Facts(label="PLMS", class_name="PNDMScheduler", spacings=_ONLY_DEFAULT),
    "lms": _Facts(label="LMS", class_name="LMSDiscreteScheduler"),
    "deis": _Facts(label="DEIS", class_name="DEISMultistepScheduler"),
    "dpm2": _Facts(label="DPM2", class_name="KDPM2DiscreteScheduler", aliases=("kdpm2",)),
    "dpm2_a": _Facts(
        label="DPM2 a", class_name="KDPM2AncestralDiscreteScheduler", aliases=("kdpm2_a", "dpm_2_ancestral")
    ),
    "dpm++_2s": _Facts(label="DPM++ 2S", class_name="DPMSolverSinglestepScheduler"),
    "dpm++_3m": _Facts(label="DPM++ 3M", class_name="DPMSolverMultistepScheduler"),
    "dpm++_3m_sde": _Facts(label="DPM++ 3M SDE", class_name="DPMSolverMultistepScheduler"),
    "dpm++_sde": _Facts(label="DPM++ SDE", class_name="DPMSolverSDEScheduler"),
    "ddpm": _Facts(label="DDPM", class_name="DDPMScheduler", spacings=_ONLY_DEFAULT),
    "tcd": _Facts(label="TCD", class_name="TCDScheduler", spacings=_ONLY_DEFAULT),
    "sa_solver": _Facts(label="SA Solver", class_name="SASolverScheduler"),
}
OWN_RULES = frozenset(("euler", "euler_a", "heun", "ddim", "dpm++_2m", "dpm++_2m_sde", "unipc", "lcm"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerName:
    """A rule and the spacing of its sigmas; `str(name)` is the canonical id.

    spacing: "default" is whatever the checkpoint's config says.
    """

    rule: str
    spacing: Spacing = "default"

    def __str__(self) -> str:
        return self.rule if self.spacing == "default" else f"{self.rule} {self.spacing}"

    @property
    def class_name(self) -> str:
        """diffusers' scheduler class of this name, for a variance-preserving network."""
        return _FACTS[self.rule].class_name

    @property
    def is_foreign(self) -> bool:
        """Whether only diffusers' class knows the rule."""
        return self.rule not in OWN_RULES


def parse_sampler(name: str | SamplerName) -> SamplerName:
    """The sampler meant by any client's spelling; case, spaces, - and _ do not matter.

    Raises UnknownName, or InvalidValue for a spacing that the sampler does not have.
    """
    if isinstance(name, SamplerName):
        return name
    key = _key(name)
    if rule := _rule(key):
        return SamplerName(rule=rule)
    for ending, spacing in _SPACING_ENDINGS.items():
        rule = _rule(key.removesuffix(ending)) if key.endswith(ending) else None
        if rule is None:
            continue
        if spacing not in _FACTS[rule].spacings:
            raise InvalidValue(
                "sampler", f"{rule} has no {spacing} spacing", hint=f"use {rule!r}, or for example 'dpm++_2m {spacing}'"
            )
        return SamplerName(rule=rule, spacing=spacing)
    raise UnknownName("sampler", name, known_samplers())


def known_samplers() -> tuple[str, ...]:
    """Every canonical id, with its spacings, the plain ones first."""
    spaced = ((rule, spacing) for spacing in _ALL for rule, facts in _FACTS.items() if spacing in facts.spacings)
    return tuple(str(SamplerName(rule=rule, spacing=spacing)) for rule, spacing in spaced)


def a1111_label(name: str | SamplerName) -> str:
    """The sampler as AUTOMATIC1111 shows it."""
    parsed = parse_sampler(name)
    label = _FACTS[parsed.rule].label
    return label if parsed.spacing == "default" else f"{label} {parsed.spacing.capitalize()}"


def rule_of_class(class_name: str) -> str | None:
    """The rule that a diffusers scheduler class stands for; None for a class nobody here knows."""
    return _rule(_key(class_name)) if class_name else None


_SPACING_ENDINGS: dict[str, Spacing] = {
    "karras": "karras",
    "exponential": "exponential",
    "beta": "beta",
    # AUTOMATIC1111's short form (k_dpmpp_2m_ka), and the words that other clients send for "as the model says".
    "ka": "karras",
    "automatic": "default",
    "auto": "default",
    "default": "default",
    "discrete": "default",
}


def _key(name: str) -> str:
    return re.sub(r"[\s_\-.]", "", name.lower().replace("++", "pp")).removesuffix("scheduler")


def _rule(key: str) -> str | None:
    candidates = (key, key.removeprefix("sample"), key.removeprefix("k"))
    return next((_RULES[candidate] for candidate in candidates if candidate in _RULES), None)


def _spellings(rule: str, facts: _Facts) -> set[str]:
    return {_key(spelling) for spelling in (rule, facts.label, *facts.aliases)}


_RULES: dict[str, str] = {_key(facts.class_name): rule for rule, facts in reversed(_FACTS.items())}
_RULES |= {spelling: rule for rule, facts in _FACTS.items() for spelling in _spellings(rule, facts)}
