"""What is asked for and what comes back: frozen, validated, free of any library.

Pixels here are `[0, 255] uint8`, row by row from the top left. Sizes are in pixels, times in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NewType

from sdfleet.errors import BrokenPicture, InvalidValue

JobId = NewType("JobId", str)
Task = Literal["txt2img", "img2img", "inpaint"]
T5Use = Literal["auto", "keep", "skip"]

MAX_SEED = 2**64 - 1
# The largest side any family we serve was trained near is 1536; past 4096 a latent no longer fits consumer memory.
MAX_SIDE_PX = 4096
# Every VAE we serve halves a picture three times.
SIDE_MULTIPLE_PX = 8
MAX_STEPS = 1000
MAX_IMAGES = 64
MAX_GUIDANCE = 100.0
# A prompt past this is a mistake or an attack: 16 000 characters are about 50 chunks of 75 tokens.
MAX_PROMPT_CHARS = 16_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Decoded pixels: `data` holds height_px x width_px x (3 for RGB, 1 for L) bytes."""

    width_px: int
    height_px: int
    mode: Literal["RGB", "L"]
    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        expected = self.width_px * self.height_px * (3 if self.mode == "RGB" else 1)
        if len(self.data) != expected:
            raise BrokenPicture(
                f"a {self.width_px}x{self.height_px} {self.mode} picture has {expected} bytes, not {len(self.data)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One request for pictures. What is None is filled from the model's card when the job is made.

    seed: picture i of the request draws its noise from `seed + i`, whatever else the device is doing.
    guidance: classifier-free guidance; 1 or less draws without the negative prompt, at half the work.
    strength: (0, 1], how far an input picture is redrawn; None takes the card's, or 0.75.
    mask: white is drawn anew, black is kept; same size as `image`.
    reproducible: the picture's rows run alone, so that not even rounding depends on neighbours.
    allow_degraded: after an out-of-memory the picture may be made smaller instead of failing.
    """

    prompt: str
    negative_prompt: str = ""
    model: str = "starter"
    width_px: int | None = None
    height_px: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    n_images: int = 1
    sampler: str | None = None
    image: Picture | None = None
    strength: float | None = None
    mask: Picture | None = None
    t5: T5Use = "auto"
    reproducible: bool = False
    allow_degraded: bool = False

    def __post_init__(self) -> None:
        _check_prompt("prompt", self.prompt, may_be_empty=False)
        _check_prompt("negative_prompt", self.negative_prompt, may_be_empty=True)
        for name, side_px in (("width", self.width_px), ("height", self.height_px)):
            if side_px is not None:
                _check_side(name, side_px)
        if (self.width_px is None) != (self.height_px is None):
            raise InvalidValue("size", "width and height go together", hint="give both, for example 512x512")
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise InvalidValue("steps", f"{self.steps} is not between 1 and {MAX_STEPS}")
        if self.guidance is not None and not (math.isfinite(self.guidance) and 0 <= self.guidance <= MAX_GUIDANCE):
            raise InvalidValue("guidance", f"{self.guidance} is not a number between 0 and {MAX_GUIDANCE:g}")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise InvalidValue("seed", f"{self.seed} does not fit 64 bits", hint="use 0 to 18446744073709551615")
        if not 1 <= self.n_images <= MAX_IMAGES:
            raise InvalidValue("n", f"{self.n_images} pictures asked for", hint=f"ask for 1 to {MAX_IMAGES}")
        if self.strength is not None and not (math.isfinite(self.strength) and 0 < self.strength <= 1):
            raise InvalidValue("strength", f"{self.strength} is not above 0 and at most 1")
        if self.mask is not None:
            self._check_mask(self.mask)

    def _check_mask(self, mask: Picture) -> None:
        if self.image is None:
            raise InvalidValue("mask", "there is a mask but no image to apply it to", hint="give the image too")
        if (mask.width_px, mask.height_px) != (self.image.width_px, self.image.height_px):
            raise InvalidValue(
                "mask",
                f"it is {mask.width_px}x{mask.height_px}, the image is {self.image.width_px}x{self.image.height_px}",
                hint="make both the same size",
            )

    @property
    def task(self) -> Task:
        """What kind of drawing this is: decided by the pictures that came along."""
        if self.image is None:
            return "txt2img"
        return "img2img" if self.mask is None else "inpaint"


def _check_prompt(name: str, text: str, *, may_be_empty: bool) -> None:
    if not may_be_empty and not text.strip():
        raise InvalidValue(name, "it is empty", hint="say what the picture should show")
    if len(text) > MAX_PROMPT_CHARS:
        raise InvalidValue(name, f"{len(text)} characters are too many", hint=f"keep it under {MAX_PROMPT_CHARS}")
    if "\x00" in text:
        raise InvalidValue(name, "it holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        # A command line may hand over bytes that are no text (lone surrogates); no tokenizer and no file takes those.
        raise InvalidValue(name, f"character {exc.start + 1} is not valid text", hint="use UTF-8") from exc


def _check_side(name: str, side_px: int) -> None:
    if not 16 <= side_px <= MAX_SIDE_PX:
        raise InvalidValue(name, f"{side_px} px is not between 16 and {MAX_SIDE_PX}")
    if side_px % SIDE_MULTIPLE_PX:
        down = side_px - side_px % SIDE_MULTIPLE_PX
        raise InvalidValue(
            name,
            f"{side_px} px is not a multiple of {SIDE_MULTIPLE_PX}",
            hint=f"use {max(16, down)} or {down + SIDE_MULTIPLE_PX}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A request with nothing left open: what the engine is given.

    checkpoint: folder with the weights; family: which adapter reads them.
    sampler: canonical name, see engine/samplers.py.
    resize_to: (width_px, height_px) the finished picture is brought to, when the model cannot draw at that size; for
        another shape it is filled up at the edges, or stretched if there is an input picture, which was stretched too.
    wants_previews: someone is looking; without it no preview is ever computed.
    """

    job_id: JobId
    checkpoint: str
    family: str
    prompt: str
    negative_prompt: str
    width_px: int
    height_px: int
    steps: int
    guidance: float
    seed: int
    n_images: int
    sampler: str
    image: Picture | None = None
    strength: float = 1.0
    mask: Picture | None = None
    t5: T5Use = "auto"
    reproducible: bool = False
    allow_degraded: bool = False
    resize_to: tuple[int, int] | None = None
    wants_previews: bool = False

    @property
    def task(self) -> Task:
        """What kind of drawing this is."""
        if self.image is None:
            return "txt2img"
        return "img2img" if self.mask is None else "inpaint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where one picture of a job stands. `eta_s` is for the whole job; None until a step has been timed."""

    job_id: JobId
    image_index: int
    step: int
    n_steps: int
    eta_s: float | None = None
    preview: Picture | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """How much of a prompt one text encoder read: every token, in `n_chunks` windows of `window` tokens."""

    encoder: str
    n_tokens: int
    window: int
    n_chunks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedPicture:
    """One picture and how it came to be."""

    picture: Picture
    seed: int
    reproducible: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    """Everything a job gave back. `timings_s` maps a phase (load, encode, denoise, decode, total) to seconds."""

    job_id: JobId
    model: str
    images: tuple[FinishedPicture, ...]
    drawing: Drawing
    warnings: tuple[str, ...] = ()
    tokens: tuple[TokenCount, ...] = ()
    timings_s: Mapping[str, float] = field(default_factory=dict)
    device: str = ""
    dtype: str = ""
    rungs: tuple[str, ...] = ()
