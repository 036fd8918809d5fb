"""Pictures as they travel to other programs and back."""

from __future__ import annotations

import base64
from collections.abc import Collection
from dataclasses import dataclass, replace

from sdfleet.backends.base import OnProgress
from sdfleet.domain import Drawing, FinishedPicture, ImageRequest, ImageResult, Picture, Progress, Unsaid
from sdfleet.storage import pictures


def ours_alone(request: ImageRequest) -> list[str]:
    """The fields that are used in a request and that no engine but ours heeds."""
    used = {
        "t5": request.t5 != "auto",
        "step_cache": request.step_cache != "off",
        "reproducible": request.reproducible,
    }
    return [field for field, is_used in used.items() if is_used]


def as_base64(picture: Picture | None) -> str | None:
    """A PNG in base64. Blocks."""
    return None if picture is None else base64.b64encode(pictures.encode(picture, "png")).decode()


def as_asked(content: bytes, drawing: Drawing) -> Picture:
    """The pixels of what came, at the size that a drawing wants it brought to. Blocks. Raises BrokenPicture."""
    picture = pictures.decode(content)
    if drawing.resize_to is None:
        return picture
    return pictures.resize(picture, width_px=drawing.resize_to[0], height_px=drawing.resize_to[1])


@dataclass(slots=True, eq=False)
class Asked:
    """One picture of a job, asked of another program. told: the last step that its caller has heard of."""

    drawing: Drawing
    index: int
    on_progress: OnProgress | None
    told: int = 0

    def tell(self, step: int) -> None:
        """Say how far it is; a picture that comes at once had a first step too."""
        if self.on_progress is None:
            return
        for each in (1, step) if self.told == 0 and step > 1 else (step,):
            if each > self.told:
                self.told = each
                job_id, n_steps = self.drawing.job_id, self.drawing.steps
                self.on_progress(Progress(job_id=job_id, image_index=self.index, step=each, n_steps=n_steps))


def model_of(drawing: Drawing) -> str:
    """What the model is called on its card: it has no weights here, and its path says only that."""
    return drawing.checkpoint.replace("\\", "/").rpartition("/")[2]


def as_result(
    drawing: Drawing,
    images: Collection[FinishedPicture],
    *,
    by: str,
    device: str,
    spent_s: float,
    load_s: float = 0.0,
    unsaid: tuple[Unsaid, ...],
) -> ImageResult:
    """What came of a job, with the size that came; told where that is another than was asked for.

    by: who drew. spent_s: all of it; load_s: of that, until the model was there. unsaid: what nothing is known of.
    """
    sizes = {(image.picture.width_px, image.picture.height_px) for image in images}
    drawn, warnings = drawing, tuple[str, ...]()
    if drawing.resize_to is None and not sizes <= {(drawing.width_px, drawing.height_px)}:
        width_px, height_px = max(sizes)
        told = f"{by} drew {width_px}x{height_px} where {drawing.width_px}x{drawing.height_px} was asked for"
        drawn, warnings = replace(drawing, width_px=width_px, height_px=height_px), (told,)
    return ImageResult(
        job_id=drawing.job_id,
        model=drawing.checkpoint,
        images=tuple(images),
        drawing=drawn,
        warnings=warnings,
        timings_s={
            "load": round(load_s, 4), "encode": 0.0, "denoise": round(max(0.0, spent_s - load_s), 4), "decode": 0.0,
            "total": round(spent_s, 4),
        },
        device=device,
        unsaid=unsaid,
    )  # fmt: skip
