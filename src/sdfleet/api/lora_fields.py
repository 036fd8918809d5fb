"""How requests name LoRAs: `[{"name": "ink", "scale": 0.8}]`, or for short `["ink:0.8"]`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sdfleet.domain import MAX_LORA_NAME_CHARS, MAX_LORA_SCALE, MAX_LORAS, LoraUse
from sdfleet.engine.prompt_tags import read_use

_Scale = Annotated[float, Field(ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE, allow_inf_nan=False)]


class LoraFields(BaseModel):
    """One LoRA and how much of it. text_scale: on the text encoders, where that is another number."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=MAX_LORA_NAME_CHARS)]
    scale: _Scale = 1.0
    text_scale: _Scale | None = None


def _spelt_out(given: Any) -> Any:
    """What was said for short as fields; a form can send a list only as JSON in a text."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = [given]
    if not isinstance(given, list):
        return given
    return [_fields_of(read_use(one)) if isinstance(one, str) else one for one in given]


LorasField = Annotated[
    list[LoraFields],
    BeforeValidator(_spelt_out),
    Field(max_length=MAX_LORAS, description="see /sdapi/v1/loras for the names; also `name:scale` for each"),
]


def uses_of(fields: Sequence[LoraFields]) -> tuple[LoraUse, ...]:
    """The same in our own words."""
    return tuple(LoraUse(name=each.name, scale=each.scale, text_scale=each.text_scale) for each in fields)


def fields_of(uses: Sequence[LoraUse]) -> list[LoraFields]:
    """LoRAs as answers name them."""
    return [LoraFields.model_construct(**_fields_of(use)) for use in uses]


def _fields_of(use: LoraUse) -> dict[str, Any]:
    return {"name": use.name, "scale": use.scale, "text_scale": use.text_scale}
