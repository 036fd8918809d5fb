"""What AUTOMATIC1111's clients send and expect: the fields of `/sdapi/v1/txt2img` and `/sdapi/v1/img2img`.

Unknown fields are ignored, as the origin does, and clients send many. A field that would change the picture and is not
honoured here is refused (`refused_features`), so that nobody gets another picture than the one asked for.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from sdfleet.api.asked import SafetyCheckerField
from sdfleet.errors import InvalidValue

# What the origin answers to for "no choice".
AUTOMATIC = frozenset({"", "automatic", "none", "use same scheduler", "use same sampler"})
# SD.Next's option `sd_backend` has these; they are ways of its own to run a model, so no choice of ours.
SD_NEXT_BACKENDS = frozenset({"", "automatic", "diffusers", "original"})
MAX_PICTURES = 64


class Txt2ImgAsked(BaseModel):
    """`POST /sdapi/v1/txt2img`. What is left out comes from the model's card."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    prompt: str = ""
    negative_prompt: str | None = ""
    styles: list[str] | None = None
    seed: int | None = -1
    subseed: int | None = -1
    subseed_strength: float | None = 0
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: Annotated[int, Field(ge=1, le=MAX_PICTURES)] = 1
    n_iter: Annotated[int, Field(ge=1, le=MAX_PICTURES)] = 1
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    enable_hr: bool | None = False
    refiner_checkpoint: str | None = None
    denoising_strength: float | None = None
    override_settings: dict[str, Any] | None = None
    script_name: str | None = None
    send_images: bool = True
    alwayson_scripts: dict[str, Any] | None = None
    force_task_id: str | None = None

    # Ours; the origin has neither, and sends no such field.
    safety_checker: SafetyCheckerField = None
    backend: Annotated[str, Field(max_length=64, description="see /api/backends")] | None = None

    def refused_features(self) -> list[str]:
        """What was switched on and is not here."""
        refiner = (self.refiner_checkpoint or "").strip().lower()
        switched = {
            "subseed_strength": bool(self.subseed_strength),
            "restore_faces": bool(self.restore_faces),
            "tiling": bool(self.tiling),
            "enable_hr": bool(self.enable_hr),
            "refiner_checkpoint": refiner not in AUTOMATIC,
            "styles": bool(self.styles),
        }
        return [name for name, is_on in switched.items() if is_on]

    @property
    def sampler(self) -> str | None:
        """The sampler with its schedule, as one name; None where nothing was chosen."""
        name = self.sampler_name or self.sampler_index
        if not name:
            return None
        schedule = (self.scheduler or "").strip()
        return name if schedule.lower() in AUTOMATIC else f"{name} {schedule}"

    @property
    def checkpoint(self) -> str | None:
        """The model named for this request alone."""
        named = (self.override_settings or {}).get("sd_model_checkpoint")
        return named if isinstance(named, str) and named else None

    @property
    def named_backend(self) -> str | None:
        """What is to draw: `backend`, or `sd_backend` where only settings can be sent. Raises InvalidValue."""
        if self.backend:
            return self.backend
        named = (self.override_settings or {}).get("sd_backend") or ""
        if not isinstance(named, str):
            raise InvalidValue("override_settings", "its sd_backend is no name", hint="see /api/backends")
        return None if named.strip().lower() in SD_NEXT_BACKENDS else named.strip()


class Img2ImgAsked(Txt2ImgAsked):
    """`POST /sdapi/v1/img2img`."""

    init_images: list[str] | None = None
    resize_mode: Annotated[int, Field(ge=0, le=3)] = 0
    mask: str | None = None
    mask_blur: Annotated[float | None, Field(ge=0, le=256)] = None
    mask_blur_x: Annotated[float, Field(ge=0, le=256)] = 4
    mask_blur_y: Annotated[float, Field(ge=0, le=256)] = 4
    inpainting_fill: Annotated[int, Field(ge=0, le=3)] = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=1024)] = 0
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1)] = 0
    include_init_images: bool = False


class PictureAnswer(BaseModel):
    """Pictures as base64 PNG, the request again, and how they were made as JSON in a string."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class ProgressState(BaseModel):
    """What the origin tells of its one job."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class ProgressAnswer(BaseModel):
    """How far the caller's pictures are. progress: 0 to 1, and 0.0 with job_count 0 when nothing is drawn."""

    progress: float
    eta_relative: float
    state: ProgressState
    current_image: str | None
    textinfo: str | None


class PngInfoAsked(BaseModel):
    """A picture whose notes are wanted."""

    image: str


class ExtraAsked(BaseModel):
    """Enlarging a finished picture."""

    model_config = ConfigDict(extra="ignore")

    resize_mode: Annotated[int, Field(ge=0, le=1)] = 0
    gfpgan_visibility: float = 0
    codeformer_visibility: float = 0
    upscaling_resize: Annotated[float, Field(gt=0, le=8)] = 2
    upscaling_resize_w: Annotated[int, Field(ge=1, le=8192)] = 512
    upscaling_resize_h: Annotated[int, Field(ge=1, le=8192)] = 512
    upscaling_crop: bool = True
    upscaler_1: str = "None"
    upscaler_2: str = "None"
    extras_upscaler_2_visibility: float = 0


class ExtraSingleAsked(ExtraAsked):
    """`POST /sdapi/v1/extra-single-image`."""

    image: str


class ExtraSingleAnswer(BaseModel):
    """The enlarged picture as base64 PNG."""

    html_info: str = ""
    image: str


class ExtraBatchAnswer(BaseModel):
    """The enlarged pictures as base64 PNG, in their order."""

    html_info: str = ""
    images: list[str]


class NamedPicture(BaseModel):
    """One of several pictures."""

    data: str
    name: str = ""


class ExtraBatchAsked(ExtraAsked):
    """`POST /sdapi/v1/extra-batch-images`."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    image_list: Annotated[list[NamedPicture], Field(alias="imageList", min_length=1, max_length=16)]
