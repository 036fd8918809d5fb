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
OutputId = NewType("OutputId", str)
OwnerId = NewType("OwnerId", str)
Task = Literal["txt2img", "img2img", "inpaint"]
T5Use = Literal["auto", "keep", "skip"]
StepCache = Literal["off", "light", "strong"]
PictureFormat = Literal["png", "jpeg", "webp"]
Unsaid = Literal["steps", "guidance", "sampler", "strength", "seed"]
JobState = Literal["queued", "running", "done", "failed", "cancelled"]
# unfiltered: may ask for less than the server's own check of finished pictures.
Scope = Literal["generate", "manage", "read", "unfiltered"]
# What is done with a picture that the model's own checker flags: withheld, delivered with the verdict, never checked.
SafetyChecker = Literal["on", "flag", "off"]
# Of one finished picture. off: the checker was switched off; none: the model has none here.
SafetyVerdict = Literal["passed", "flagged", "off", "none"]

# What people call the ways to make pictures. sd, flux-local: this machine's own engine, by the kind of model.
BACKENDS = ("sd", "flux-local", "flux-api", "mflux", "diffusionkit", "ollama", "fake")
# Those of them that draw on no machine of ours: their jobs take no room here, and have so much there, in pictures.
SERVICES = {"flux-api": 24}
# What leaves the choice open, and what leaves open only which of the first two.
AUTO, LOCAL = "auto", "local"

# Who asks where no key is asked for: the person at this machine.
LOCAL_OWNER = OwnerId("local")

MAX_SEED = 2**64 - 1
# The largest side any family we serve was trained near is 1536; past 4096 a latent no longer fits consumer memory.
MAX_SIDE_PX = 4096
# Every VAE we serve halves a picture three times.
SIDE_MULTIPLE_PX = 8
MAX_STEPS = 1000
MAX_IMAGES = 64
MAX_GUIDANCE = 100.0
# The longest that the OpenAI API takes; about 100 chunks of 75 tokens.
MAX_PROMPT_CHARS = 32_000
MAX_LORAS = 16
# Sliders go from -5 to 5 at most; past this every picture is noise.
MAX_LORA_SCALE = 10.0
MAX_LORA_NAME_CHARS = 200


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
class LoraUse:
    """A LoRA by its name, and how much of it: on the denoiser, and on the text encoders where that is another number.

    content: what its file held when the request was accepted, see AdapterFile; None until then.
    """

    name: str
    scale: float = 1.0
    text_scale: float | None = None
    content: str | None = None

    def __post_init__(self) -> None:
        is_name = self.name.strip() != "" and len(self.name) <= MAX_LORA_NAME_CHARS and self.name.isprintable()
        if not is_name:
            raise InvalidValue("loras", f"{self.name[:40]!r} is no name of a LoRA", hint="see `sdfleet models list`")
        for scale in (self.scale, self.scale if self.text_scale is None else self.text_scale):
            if not (math.isfinite(scale) and abs(scale) <= MAX_LORA_SCALE):
                raise InvalidValue(
                    "loras",
                    f"the scale {scale} of {self.name!r} is not between -{MAX_LORA_SCALE:g} and {MAX_LORA_SCALE:g}",
                )

    @property
    def tag(self) -> str:
        """How AUTOMATIC1111's prompts say it: `<lora:name:scale>`, or with the text encoders' scale before the other.

        >>> LoraUse(name="ink", scale=0.5).tag, LoraUse(name="ink", text_scale=0.25).tag
        ('<lora:ink:0.5>', '<lora:ink:0.25:1>')
        """
        scales = [self.scale] if self.text_scale in {None, self.scale} else [self.text_scale or 0.0, self.scale]
        written = (str(int(scale)) if scale == int(scale) else repr(scale) for scale in scales)
        return f"<lora:{':'.join((self.name, *written))}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One request for pictures. What is None is filled from the model's card when the job is made.

    seed: picture i of the request draws its noise from `seed + i`, whatever else the device is doing.
    guidance: classifier-free guidance; 1 or less draws without the negative prompt, at half the work.
    strength: (0, 1], how far an input picture is redrawn; None takes the card's, or 0.75.
    mask: white is drawn anew, black is kept; same size as `image`.
    reproducible: the picture's rows run alone, so that not even rounding depends on neighbours.
    allow_degraded: after an out-of-memory the picture may be made smaller instead of failing.
    step_cache: leave network calls out and guess their answers; changes the picture, see docs/modes.md.
    safety_checker: None takes the server's own; less than that needs the scope `unfiltered`, see docs/safety.md.
    loras: beside those that the prompt names as `<lora:name:scale>`, see docs/loras.md.
    backend: one of BACKENDS; None or "auto": whichever can, see docs/backends.md.
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
    step_cache: StepCache = "off"
    safety_checker: SafetyChecker | None = None
    loras: tuple[LoraUse, ...] = ()
    backend: str | None = None

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
        if len(self.loras) > MAX_LORAS:
            raise InvalidValue("loras", f"{len(self.loras)} LoRAs asked for", hint=f"use at most {MAX_LORAS}")
        if self.backend not in {None, AUTO, LOCAL, *BACKENDS}:
            known = ", ".join(BACKENDS)
            raise InvalidValue("backend", f"{str(self.backend)[:40]!r} is not one of {known}", hint="see /api/backends")

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
class AdapterFile:
    """A LoRA or an embedding on this machine. content: 12 hex digits of the hash of its weights, whatever its name."""

    name: str
    path: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA as it is drawn with. scale, text_scale: of its part for the denoiser, and for the text encoders."""

    file: AdapterFile
    scale: float
    text_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A request with nothing left open: what the engine is given.

    checkpoint: folder with the weights; family: which adapter reads them.
    sampler: canonical name, see engine/samplers.py.
    n_images: 0 only loads the checkpoint.
    resize_to: (width_px, height_px) the finished picture is brought to, when the model cannot draw at that size; for
        another shape it is filled up at the edges, or stretched if there is an input picture, which was stretched too.
    wants_previews: someone is looking; without it no preview is ever computed.
    loras: none with both scales 0. embeddings: those whose names the prompts hold, as words of their own.
    backend: which of BACKENDS draws it; empty where that is decided elsewhere.
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
    step_cache: StepCache = "off"
    resize_to: tuple[int, int] | None = None
    wants_previews: bool = False
    safety_checker: SafetyChecker = "on"
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[AdapterFile, ...] = ()
    backend: str = ""

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
    """One picture and how it came to be. index: which of its job's it is; None: its place among the result's.

    cost_credits: what a service charged for it, as it said; None where nobody did.
    """

    picture: Picture
    seed: int
    reproducible: bool = False
    safety: SafetyVerdict = "none"
    index: int | None = None
    cost_credits: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Withheld:
    """A picture that was drawn and not given out, because the model's safety checker flagged it."""

    index: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    """Everything a job gave back. `timings_s` maps a phase (load, encode, denoise, decode, total) to seconds.

    node: the machine of a fleet that drew it; empty where there is no fleet.
    withheld: pictures that are not among `images`; a backend gives every picture with its verdict, the runtime decides.
    backend: which of BACKENDS drew it; the runtime says so.
    unsaid: fields of the drawing that say nothing about these pictures, as their backend does not tell.
    """

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
    withheld: tuple[Withheld, ...] = ()
    node: str = ""
    backend: str = ""
    unsaid: tuple[Unsaid, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks: a key, or the person at this machine.

    max_queued: most jobs of this owner that may wait at once; None: only the limit of the whole queue.
    rate_per_minute: most requests for pictures in a minute; None: what holds for everybody.
    """

    owner: OwnerId = LOCAL_OWNER
    name: str = "local"
    scopes: frozenset[Scope] = frozenset({"generate", "manage", "read", "unfiltered"})
    max_queued: int | None = None
    rate_per_minute: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """Where the end of a job is told. secret: signs the body (HMAC-SHA256); None: the server's own signing secret."""

    url: str
    secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Idempotency:
    """One request that may arrive twice. `fingerprint`: hash of everything it asks for; `key` alone is not trusted."""

    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A request on its way to become a job: what is asked, by whom, and how the answer is to look.

    dialect: name of the wire API it came through. client: address of the caller, for the log.
    priority: higher is drawn first, -100 to 100. deadline_s: seconds from now after which nobody wants it any more.
    format, quality: how finished pictures are stored and answered; quality 1-100 for jpeg and webp.
    label: free text of the caller (OpenAI's `user`), never interpreted. tags: as in `metadata.tags`.
    traceparent: W3C Trace Context of the caller, so that the job is a part of the caller's trace.
    """

    request: ImageRequest
    caller: Caller = field(default_factory=Caller)
    dialect: str = "native"
    client: str = ""
    priority: int = 0
    deadline_s: float | None = None
    format: PictureFormat = "png"
    quality: int | None = None
    idempotency: Idempotency | None = None
    webhook: Webhook | None = None
    label: str = ""
    tags: tuple[str, ...] = ()
    traceparent: str = ""
    wants_previews: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One finished picture in the store. prompt: at most the first 500 characters of its job's."""

    id: OutputId
    job_id: JobId
    index: int
    seed: int
    width_px: int
    height_px: int
    format: PictureFormat
    n_bytes: int
    created_s: float
    safety: SafetyVerdict = "none"
    model: str = ""
    prompt: str = ""
    is_favourite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request with an id and a state, as the store remembers it. Times are seconds since 1970.

    request: nothing left open (seed, size, steps, guidance, sampler, strength are filled in), so that it is the same
    after any restart. attempts: how often drawing was begun. error: set when failed or cancelled.
    timings_s, device, dtype, rungs: of the last drawing, when done. withheld: pictures of it that are no outputs.
    node: the machine of a fleet that drew it. backend: which of BACKENDS did; empty for jobs of an older sdfleet.
    cost_credits: of all its pictures, see `FinishedPicture`.
    """

    id: JobId
    submission: Submission
    state: JobState
    created_s: float
    started_s: float | None = None
    finished_s: float | None = None
    attempts: int = 0
    outputs: tuple[Output, ...] = ()
    warnings: tuple[str, ...] = ()
    error: Mapping[str, str] | None = None
    timings_s: Mapping[str, float] = field(default_factory=dict)
    device: str = ""
    dtype: str = ""
    rungs: tuple[str, ...] = ()
    withheld: tuple[Withheld, ...] = ()
    node: str = ""
    backend: str = ""
    cost_credits: float | None = None

    @property
    def request(self) -> ImageRequest:
        """What is drawn."""
        return self.submission.request

    @property
    def has_ended(self) -> bool:
        """Nothing more will happen to it, unless somebody asks for another try."""
        return self.state in {"done", "failed", "cancelled"}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """Where a job stands now. queue_position: 1 is next; None once it runs. step, n_steps: over all its pictures."""

    job: Job
    queue_position: int | None = None
    eta_s: float | None = None
    step: int = 0
    n_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """Something happened to a job. `progress` (with a preview, if wanted) comes with steps of its pictures.

    number: counts up from 1 for every job, so that a reader who lost the connection can go on.
    """

    number: int
    status: JobStatus
    progress: Progress | None = None
