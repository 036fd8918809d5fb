"""`<lora:name:0.8>` in a prompt: AUTOMATIC1111's way to name a LoRA, taken out before the prompt is read.

<lora:name>             at scale 1          <lora:name:0.8>           at 0.8
<lora:name:0.5:0.8>     text encoders at 0.5, denoiser at 0.8         <lora:name:te=0.5:unet=0.8>   the same
"""

from __future__ import annotations

import re

from sdfleet.domain import LoraUse
from sdfleet.errors import PromptSyntax

_TAG = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)
_NAMED = {"te": "te", "unet": "unet"}


def read_tags(prompt: str) -> tuple[str, tuple[LoraUse, ...]]:
    """The prompt without its tags, and what they name, in order. Raises PromptSyntax, and InvalidValue for a scale.

    >>> text, uses = read_tags("a cat <lora:ink:0.5>, (red <lora:moon:0:1>:1.2)")
    >>> text, [(use.name, use.text_scale, use.scale) for use in uses]
    ('a cat , (red :1.2)', [('ink', None, 0.5), ('moon', 0.0, 1.0)])
    """
    uses = tuple(read_use(found[1]) for found in _TAG.finditer(prompt))
    return (_TAG.sub("", prompt), uses) if uses else (prompt, ())


def read_use(text: str) -> LoraUse:
    """A LoRA as a tag names it, without the brackets. Raises as `read_tags`.

    >>> read_use("ink:0.5").scale, read_use("ink").scale
    (0.5, 1.0)
    """
    name, *rest = (part.strip() for part in text.split(":"))
    given: dict[str, float] = {}
    for part in rest:
        key, equals, value = part.rpartition("=")
        place = _NAMED.get(key.strip().lower()) if equals else ("te", "unet", None)[min(len(given), 2)]
        try:
            scale = float(value)
        except ValueError:
            place, scale = None, 0.0
        if place is None or place in given:
            raise PromptSyntax(
                f"{text[:60]!r} is no LoRA with its scale", hint="write name:0.8, in a prompt <lora:name:0.8>"
            )
        given[place] = scale
    text_scale = given.get("te", 1.0)
    return LoraUse(name=name, scale=given.get("unet", text_scale), text_scale=text_scale if "unet" in given else None)
