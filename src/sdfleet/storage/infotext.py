"""How a picture came to be, as data and as the text line that AUTOMATIC1111 writes into its pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

_NEGATIVE = "Negative prompt:"
# Key: value pairs of the last line; a value that holds a comma, colon or newline is a JSON string.
_PAIR = re.compile(r'\s*(\w[\w \-/]*?):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


class NotedLora(BaseModel):
    """A LoRA that a picture was drawn with. hash: of its weights, 12 hex digits; absent where nobody noted it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    scale: float = 1.0
    text_scale: float | None = None
    hash: str | None = None


class Metadata(BaseModel):
    """What is needed to draw a picture again, and what was found out while it was drawn.

    source: who wrote it. Absent facts are None; a picture of another program has few of them.
    width_px, height_px: of the picture; drawn_*: what the model drew before it was resized.
    sampler_label: as A1111 writes the sampler; only for the infotext.
    seed: this picture's own, so that it is drawn again alone with n = 1.
    safety: what the checkpoint's safety checker said of it; None where it has none.
    backend: what drew it. cost_credits: what a service charged for it.
    """

    # A newer sdfleet may have written more than this one knows.
    model_config = ConfigDict(extra="ignore", frozen=True)

    source: Literal["sdfleet", "a1111"] = "sdfleet"
    version: str | None = None
    prompt: str = ""
    negative_prompt: str = ""
    model: str | None = None
    task: str | None = None
    width_px: int | None = None
    height_px: int | None = None
    drawn_width_px: int | None = None
    drawn_height_px: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    sampler: str | None = None
    sampler_label: str | None = None
    strength: float | None = None
    t5: Literal["auto", "keep", "skip"] | None = None
    reproducible: bool | None = None
    step_cache: Literal["off", "light", "strong"] | None = None
    safety: Literal["passed", "flagged", "off"] | None = None
    loras: tuple[NotedLora, ...] = ()
    embeddings: tuple[str, ...] = ()
    job_id: str | None = None
    image_index: int | None = None
    backend: str | None = None
    cost_credits: float | None = None
    device: str | None = None
    dtype: str | None = None
    rungs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self, *, is_ascii: bool = False) -> str:
        """One line of JSON without the facts that are absent; `is_ascii` escapes every other character."""
        facts = self.model_dump(mode="json", exclude_none=True, exclude={"sampler_label"})
        return json.dumps(facts, ensure_ascii=is_ascii, separators=(",", ":"))


def from_json(text: str) -> Metadata | None:
    """What `Metadata.to_json` wrote; None when this is something else."""
    try:
        return Metadata.model_validate(json.loads(text))
    except (ValueError, RecursionError, ValidationError):
        return None


def write(metadata: Metadata) -> str:
    """The picture's facts as A1111 infotext: prompt, negative prompt, then one line of `Key: value` pairs."""
    pairs: dict[str, str | None] = {
        "Steps": _number(metadata.steps),
        "Sampler": metadata.sampler_label or metadata.sampler,
        "CFG scale": _number(metadata.guidance),
        "Seed": _number(metadata.seed),
        "Size": _size(metadata.width_px, metadata.height_px),
        "Model": metadata.model,
        "Denoising strength": _number(metadata.strength),
        "Lora hashes": ", ".join(f"{lora.name}: {lora.hash}" for lora in metadata.loras if lora.hash) or None,
        "Version": f"sdfleet {metadata.version}" if metadata.version else None,
    }
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value is not None)
    parts = [" ".join((metadata.prompt, *map(_tag, metadata.loras)))]
    # Written even when empty if the prompt itself has such a line, so that the last one is always ours.
    if metadata.negative_prompt or f"\n{_NEGATIVE}" in f"\n{metadata.prompt}":
        parts.append(f"{_NEGATIVE} {metadata.negative_prompt}")
    return "\n".join([*parts, line])


def parse(text: str) -> Metadata:
    """The facts in an infotext; what it does not say is absent. Any text is a prompt at least.

    >>> parse("a fox\\nNegative prompt: blur\\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5").seed
    5
    """
    body, pairs = _split(text)
    prompt, negative = body, ""
    at = f"\n{body}".rfind(f"\n{_NEGATIVE}")
    if at >= 0:
        prompt = body[: max(0, at - 1)]
        negative = body[at + len(_NEGATIVE) :].removeprefix(" ")
    width_px, height_px = _parse_size(pairs.get("Size", ""))
    sampler = pairs.get("Sampler")
    schedule = pairs.get("Schedule type", "")
    if sampler and schedule and schedule.lower() not in ("automatic", "uniform", "normal"):
        sampler = f"{sampler} {schedule}"
    version = pairs.get("Version", "")
    return Metadata(
        source="a1111",
        version=version.removeprefix("sdfleet ") or None,
        prompt=prompt,
        negative_prompt=negative,
        model=pairs.get("Model"),
        width_px=width_px,
        height_px=height_px,
        steps=_int(pairs.get("Steps")),
        guidance=_float(pairs.get("CFG scale")),
        seed=_int(pairs.get("Seed")),
        sampler=sampler,
        strength=_float(pairs.get("Denoising strength")),
    )


def _split(text: str) -> tuple[str, Mapping[str, str]]:
    """The prompts, and the pairs of the last line if it is such a line."""
    text = text.rstrip("\n")
    body, _, last = text.rpartition("\n")
    pairs = {key: _unquoted(value) for key, value in _PAIR.findall(last)}
    # A prompt may hold a colon too: three pairs, or the one that always comes first, make it our line.
    if len(pairs) >= 3 or "Steps" in pairs or (len(pairs) >= 1 and last.startswith(("Seed:", "Sampler:", "Size:"))):
        return body, pairs
    return text, {}


def _tag(lora: NotedLora) -> str:
    """As the web UI writes it into the prompt: one scale, or that of the text encoders before the denoiser's."""
    scales = [lora.scale] if lora.text_scale in {None, lora.scale} else [lora.text_scale, lora.scale]
    return f"<lora:{':'.join(filter(None, (lora.name, *map(_number, scales))))}>"


def _number(value: float | None) -> str | None:
    if value is None:
        return None
    return str(int(value)) if value == int(value) else repr(value)


def _size(width_px: int | None, height_px: int | None) -> str | None:
    return f"{width_px}x{height_px}" if width_px and height_px else None


def _parse_size(text: str) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    return (int(match[1]), int(match[2])) if match else (None, None)


def _quoted(value: str) -> str:
    if re.search(r'[,:\n"]', value) or value != value.strip() or not value:
        return json.dumps(value, ensure_ascii=False)
    return value


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            text = json.loads(value)
        except ValueError:
            return value
        return text if isinstance(text, str) else value
    return value.strip()


def _int(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"-?\d{1,20}", text) else None


def _float(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"-?\d{1,20}(\.\d{1,20})?(e-?\d{1,3})?", text) else None
