"""The one door to pictures: a request comes in, everything it left open is decided, a backend draws it.

The path of a request: backend and card -> folder checked -> seed -> size, steps, guidance, sampler -> Drawing ->
backend.
All that can be refused is refused before anything heavy is loaded.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Self, assert_never

from sdfleet.backends.base import Backend, Capabilities
from sdfleet.backends.choice import Backends, Way
from sdfleet.catalog.adapter_use import find_embeddings, find_loras
from sdfleet.catalog.cards import Card
from sdfleet.catalog.identify import Identified
from sdfleet.catalog.store import Catalog, Entry
from sdfleet.domain import (
    MAX_SEED,
    MAX_SIDE_PX,
    SIDE_MULTIPLE_PX,
    Drawing,
    ImageRequest,
    ImageResult,
    JobId,
    Picture,
    Progress,
    SafetyChecker,
    T5Use,
    Withheld,
)
from sdfleet.engine.prompt_tags import read_tags
from sdfleet.engine.sampler_names import parse_sampler
from sdfleet.errors import BackendError, ContentWithheld, InUse, InvalidValue, SdfleetError, UnsupportedByModel
from sdfleet.residents import Residents
from sdfleet.storage import pictures

log = logging.getLogger(__name__)

MIN_SIDE_PX = 16
# The web UI's own default for img2img.
DEFAULT_STRENGTH = 0.75
# A seed nobody chose: 32 bits, because AUTOMATIC1111's clients read no longer one.
RANDOM_SEED_BITS = 32
_WAYS_OUT = "it errs at times: try another seed or prompt, or see docs/safety.md for how to switch it off"


class Runtime:
    """Turns requests into pictures. Use as `async with`; leaving closes the backend."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        backend: Backend,
        keep_alive_s: float | None = None,
        safety_checker: SafetyChecker = "on",
        previews_before_check: bool = True,
        others: Sequence[Way] = (),
        default_backend: str | None = None,
        is_fleet: bool = False,
    ) -> None:
        """safety_checker: where a request says nothing. previews_before_check: also of what may be withheld.

        backend: this machine's own. others, default_backend, is_fleet: see `Backends`.
        """
        self.catalog = catalog
        self.backends = Backends(backend, others, default=default_backend, is_fleet=is_fleet)
        self._safety_checker = safety_checker
        self._previews_before_check = previews_before_check
        self.residents = Residents(self.backends, keep_alive_s=keep_alive_s)
        self._backend = backend

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def capabilities(self) -> Capabilities:
        """How this machine's own backend stands, and what all of them hold."""
        return self.backends.capabilities()

    async def generate(
        self,
        request: ImageRequest,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        wants_previews: bool = False,
    ) -> ImageResult:
        """The pictures of one request, with every choice made on the way in `drawing` and `warnings`.

        on_progress: called on the event loop after each step; must not block.
        Raises a BadRequest or CheckpointError before anything is loaded, any SdfleetError later.
        Cancelling the awaiting task stops the drawing.
        """
        return await self.draw(await self.prepare(request, wants_previews=wants_previews), on_progress=on_progress)

    async def prepare(
        self, request: ImageRequest, *, wants_previews: bool = False, job_id: JobId | None = None
    ) -> Prepared:
        """The drawing a request stands for, without drawing it. Raises as `generate` does before it loads.

        job_id: of a job that has one already, from before a restart; None makes one.
        """
        await self.backends.look()
        # Looking at cards, headers and pixels reads files and runs Pillow: not on the event loop.
        return await asyncio.to_thread(self._prepare, request, wants_previews=wants_previews, job_id=job_id)

    async def draw(self, prepared: Prepared, *, on_progress: Callable[[Progress], None] | None = None) -> ImageResult:
        """The second half of `generate`, for callers who have something to check in between. Draw it once only.

        timings_s["total"] is what the caller waited, with the start of the engine if there was one.
        """
        started_s = time.monotonic()
        drawing = prepared.drawing
        name = prepared.entry.card.name
        log.info("job started", extra={"job_id": drawing.job_id, "model": name})
        if on_progress is not None and prepared.is_checked and not self._previews_before_check:
            on_progress = partial(_without_preview, on_progress)
        await self.residents.renew(drawing.checkpoint, prepared.state)
        with self.residents.used(drawing.checkpoint):
            result = await self.backends.generate(drawing, on_progress)
        result = _given_out(result, model=name)
        spent_s = round(time.monotonic() - started_s, 3)
        log.info("job finished", extra={"job_id": drawing.job_id, "spent_s": spent_s, "rungs": list(result.rungs)})
        return replace(
            result,
            model=name,
            backend=result.backend or drawing.backend,
            warnings=tuple(dict.fromkeys(prepared.warnings + result.warnings)),
            timings_s={**result.timings_s, "total": spent_s},
        )

    async def start(self) -> None:
        """Have this machine's own backend stand ready before the first job. Raises what a first job would have met."""
        await self.backends.start()

    async def draws_with_its_own(self, model: str) -> bool:
        """Whether drawing a model for nobody would cost nobody money or memory; also where its name is wrong.

        Raises BackendUnavailable.
        """
        try:
            return (await self.prepare(ImageRequest(prompt="warm-up", model=model, seed=0))).is_ours
        except BackendError:
            raise
        except SdfleetError:
            return True

    async def load(self, model: str, *, is_pinned: bool = False) -> None:
        """Have a model on the device before a job asks for it; pinned, it also stays. Raises as `generate` does."""
        prepared = await self.prepare(ImageRequest(prompt="load", model=model, seed=0))
        await self.residents.renew(prepared.drawing.checkpoint, prepared.state)
        await (self.residents.pin if is_pinned else self.residents.load)(prepared.drawing)

    async def unload(self, model: str) -> None:
        """Let a model leave the device. Raises UnknownName, or InUse while a job draws with it."""
        card, folder = await asyncio.to_thread(self._place_of, model)
        await self.residents.unload(folder, name=card.name)

    async def release(self, model: str) -> None:
        """Let a model leave at once, or as soon as the jobs that draw with it have ended. Raises UnknownName."""
        try:
            await self.unload(model)
        except InUse:
            await self.keep(model, 0)

    async def unpin(self, model: str) -> None:
        """Let a pinned model leave again when its time has come. Raises UnknownName."""
        _, folder = await asyncio.to_thread(self._place_of, model)
        await self.residents.unpin(folder)

    async def keep(self, model: str, keep_alive_s: float | None, *, after_next_job: bool = False) -> None:
        """Let a model stay so long after each job; None: for ever. Until it leaves. Raises UnknownName."""
        _, folder = await asyncio.to_thread(self._place_of, model)
        self.residents.keep(folder, keep_alive_s, after_next_job=after_next_job)

    async def watch(self, job_id: JobId, *, previews: bool) -> None:
        """Start or stop the previews of a job that is being drawn; unknown ids are ignored."""
        await self.backends.watch(job_id, previews=previews)

    async def cancel(self, job_id: JobId) -> None:
        """Let the job's `generate` raise JobCancelled; unknown ids are ignored."""
        await self.backends.cancel(job_id)

    async def close(self) -> None:
        """End the backends; may be called twice."""
        await self.residents.close()
        await self.backends.close()

    def _place_of(self, model: str) -> tuple[Card, str]:
        """A model's card and folder, also where its files are broken."""
        entry = self.catalog.resolve(model)
        return entry.card, str(entry.folder)

    def _prepare(self, request: ImageRequest, *, wants_previews: bool, job_id: JobId | None = None) -> Prepared:
        choice = self.backends.choose(request, self.catalog)
        entry = choice.entry
        card = entry.card
        sampler = str(parse_sampler(card.sampler if "sampler" in card.ignores else request.sampler or card.sampler))
        seed = _seed(request)
        found = self.catalog.inspect(entry)
        safety_checker = request.safety_checker or self._safety_checker

        warnings = list(choice.warnings)
        if choice.service:
            warnings.append(f"drawn by {choice.service}: what was asked for has left this machine")
        guidance = card.guidance if request.guidance is None or "guidance" in card.ignores else request.guidance
        _warn_of_ignored(request, card, guidance=guidance, warnings=warnings)
        t5 = _t5(request, found, warnings)
        prompt, tagged = read_tags(request.prompt)
        adapters = self.catalog.adapters
        loras, uses = find_loras(adapters, (*request.loras, *tagged), card, warnings=warnings)
        embeddings = find_embeddings(adapters, (prompt, request.negative_prompt), found, warnings=warnings)
        if found.safety_checker == "left_out" and safety_checker != "off":
            warnings.append(
                f"pictures are not checked: the safety checker of {card.name} is not here; "
                "pull the model again, or set safety_checker to off"
            )
        size = _asked_size(request, card, warnings, multiple_px=found.side_multiple_px)
        drawn = _drawn_size(card, *size)
        if drawn != size:
            warnings.append(_how_resized(card, drawn, size, has_image=request.image is not None))
        drawing = Drawing(
            job_id=JobId(secrets.token_hex(6)) if job_id is None else job_id,
            checkpoint=str(entry.folder),
            family=card.family,
            prompt=prompt,
            # What has no effect is not noted in the picture either, nor told twice.
            negative_prompt="" if "negative_prompt" in card.ignores else request.negative_prompt,
            width_px=drawn[0],
            height_px=drawn[1],
            steps=card.steps if request.steps is None or "steps" in card.ignores else request.steps,
            guidance=guidance,
            seed=seed,
            n_images=request.n_images,
            sampler=sampler,
            image=_sized(request.image, drawn),
            strength=_strength(request, card),
            mask=_sized(request.mask, drawn),
            t5=t5,
            reproducible=request.reproducible,
            allow_degraded=request.allow_degraded,
            step_cache=request.step_cache,
            loras=loras,
            embeddings=embeddings,
            resize_to=size if drawn != size else None,
            wants_previews=wants_previews,
            safety_checker=safety_checker,
            backend=choice.backend,
        )
        resolved = replace(
            request,
            model=card.name,
            width_px=size[0],
            height_px=size[1],
            steps=drawing.steps,
            guidance=guidance if request.guidance is None else request.guidance,
            seed=seed,
            sampler=sampler,
            strength=None if request.image is None else drawing.strength,
            prompt=prompt,
            loras=uses,
            safety_checker=safety_checker,
            backend=choice.backend or request.backend,
        )
        return Prepared(
            drawing=drawing,
            request=resolved,
            entry=entry,
            warnings=tuple(warnings),
            is_checked=safety_checker == "on" and found.safety_checker == "here",
            state=self.catalog.state_of(entry),
            is_ours=choice.is_ours,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request with nothing left open, and what its caller should be told.

    request: what was asked, with every choice filled in; preparing it again gives the same drawing and warnings.
    is_checked: a picture may be withheld in the end. state: of the checkpoint's files, to tell them from later ones.
    is_ours: nobody else's memory or money is needed, so that one may be drawn to warm up.
    """

    drawing: Drawing
    request: ImageRequest
    entry: Entry
    warnings: tuple[str, ...]
    is_checked: bool = False
    state: Hashable = None
    is_ours: bool = True


def fit_size(width_px: int, height_px: int, *, area_px: int, min_side_px: int, max_side_px: int) -> tuple[int, int]:
    """The drawable size closest in shape to the one asked for, and then in area to `area_px`.

    >>> fit_size(512, 512, area_px=128 * 128, min_side_px=96, max_side_px=192)
    (128, 128)
    >>> fit_size(1024, 512, area_px=128 * 128, min_side_px=96, max_side_px=192)
    (192, 96)
    """
    shape = math.log(width_px / height_px)
    first_px = -(-min_side_px // SIDE_MULTIPLE_PX) * SIDE_MULTIPLE_PX
    sides = range(first_px, max_side_px + 1, SIDE_MULTIPLE_PX)

    def distance(size: tuple[int, int]) -> float:
        # A bent shape is seen at once, another area hardly: 4 to 1.
        return 4 * abs(math.log(size[0] / size[1]) - shape) + abs(math.log(size[0] * size[1] / area_px))

    return min(((w, h) for w in sides for h in sides), key=distance)


def _given_out(result: ImageResult, *, model: str) -> ImageResult:
    """The result without the pictures that its safety checker flagged. Raises ContentWithheld where none is left.

    A backend that is another runtime, on another machine, may have done so already.
    """
    numbered = tuple(
        image if image.index is not None else replace(image, index=i) for i, image in enumerate(result.images)
    )
    if result.drawing.safety_checker != "on":
        return replace(result, images=numbered)
    images = tuple(image for image in numbered if image.safety != "flagged")
    withheld = tuple(Withheld(index=one.index or 0, seed=one.seed) for one in numbered if one.safety == "flagged")
    if not withheld:
        return replace(result, images=images)
    log.info("pictures withheld", extra={"job_id": result.job_id, "n_withheld": len(withheld)})
    seeds = ", ".join(str(one.seed) for one in withheld)
    what = (
        f"the picture with seed {seeds} was" if len(withheld) == 1 else f"{len(withheld)} pictures (seeds {seeds}) were"
    )
    told = f"{what} withheld: the safety checker of {model} flagged {'it' if len(withheld) == 1 else 'them'}"
    if not images:
        raise ContentWithheld(told, hint=_WAYS_OUT)
    withheld = (*result.withheld, *withheld)
    return replace(result, images=images, withheld=withheld, warnings=(*result.warnings, f"{told}; {_WAYS_OUT}"))


def _without_preview(on_progress: Callable[[Progress], None], progress: Progress) -> None:
    on_progress(replace(progress, preview=None) if progress.preview is not None else progress)


def _strength(request: ImageRequest, card: Card) -> float:
    if request.image is None:
        return 1.0
    return request.strength if request.strength is not None else card.strength or DEFAULT_STRENGTH


def _asked_size(request: ImageRequest, card: Card, warnings: list[str], *, multiple_px: int) -> tuple[int, int]:
    """The size of the finished picture: as asked, else the input picture's, else the card's."""
    if request.width_px is not None and request.height_px is not None:
        size = (request.width_px, request.height_px)
    elif request.image is not None:
        size = _size_of_input(request.image, multiple_px=multiple_px)
    else:
        return card.width_px, card.height_px
    if request.image is not None and (request.image.width_px, request.image.height_px) != size:
        given = (request.image.width_px, request.image.height_px)
        warnings.append(f"the input image was resized from {_x(given)} to {_x(size)}")
    return size


def _how_resized(card: Card, drawn: tuple[int, int], size: tuple[int, int], *, has_image: bool) -> str:
    sides = (
        f"{card.min_side_px}" if card.min_side_px == card.max_side_px else f"{card.min_side_px} to {card.max_side_px}"
    )
    why = f"{card.name} draws sides of {sides} px"
    scale = min(size[0] / drawn[0], size[1] / drawn[1])
    inner = (round(drawn[0] * scale), round(drawn[1] * scale))
    if inner == size:
        return f"drawn at {_x(drawn)} and resized to {_x(size)}: {why}"
    if has_image:
        return f"drawn at {_x(drawn)} and stretched to {_x(size)}, as the input picture was: {why}"
    resized = "" if inner == drawn else f", resized to {_x(inner)}"
    return f"drawn at {_x(drawn)}{resized} and filled up at the edges to {_x(size)}: {why}"


def _size_of_input(image: Picture, *, multiple_px: int) -> tuple[int, int]:
    """The nearest size with sides that the model can draw, in the range of the domain."""
    scale = min(1.0, MAX_SIDE_PX / max(image.width_px, image.height_px))

    def side(side_px: int) -> int:
        return max(MIN_SIDE_PX, math.floor(side_px * scale / multiple_px + 0.5) * multiple_px)

    return side(image.width_px), side(image.height_px)


def _drawn_size(card: Card, width_px: int, height_px: int) -> tuple[int, int]:
    """The size given to the model: the one asked for, unless the card says it cannot and resizes."""
    if not card.resizes or card.min_side_px is None or card.max_side_px is None:
        return width_px, height_px
    low_px, high_px = card.min_side_px, card.max_side_px
    if low_px <= width_px <= high_px and low_px <= height_px <= high_px:
        return width_px, height_px
    return fit_size(width_px, height_px, area_px=card.area_px, min_side_px=low_px, max_side_px=high_px)


def _sized(picture: Picture | None, size: tuple[int, int]) -> Picture | None:
    return None if picture is None else pictures.resize(picture, width_px=size[0], height_px=size[1])


def _seed(request: ImageRequest) -> int:
    if request.seed is None:
        return secrets.randbits(RANDOM_SEED_BITS)
    if request.seed + request.n_images - 1 > MAX_SEED:
        raise InvalidValue(
            "seed",
            f"{request.seed} leaves no seeds for {request.n_images} pictures",
            hint=f"use at most {MAX_SEED - request.n_images + 1}",
        )
    return request.seed


def _t5(request: ImageRequest, found: Identified, warnings: list[str]) -> T5Use:
    match found.t5:
        case "here":
            return request.t5
        case "left_out":
            if request.t5 == "keep":
                raise UnsupportedByModel(
                    f"{found.folder} has no T5 text encoder",
                    hint="get text_encoder_3/ and tokenizer_3/, or leave out t5 'keep'",
                )
            if request.t5 == "auto":
                warnings.append("the T5 text encoder is not here: only the two CLIP encoders read the prompt")
            return "skip"
        case "never_had":
            if request.t5 == "keep":
                warnings.append("t5 'keep' has no effect: this kind of model has no T5 text encoder")
            return "auto"
        case _:
            assert_never(found.t5)


def _warn_of_ignored(request: ImageRequest, card: Card, *, guidance: float, warnings: list[str]) -> None:
    if request.negative_prompt and "negative_prompt" not in card.ignores and guidance <= 1:
        warnings.append(f"the negative prompt has no effect at guidance {guidance:g}; use more than 1")
    used = {
        "negative_prompt": bool(request.negative_prompt),
        "guidance": request.guidance not in {None, card.guidance},
        "steps": request.steps not in {None, card.steps},
        "sampler": request.sampler not in {None, card.sampler},
        "image": request.image is not None,
        "mask": request.mask is not None,
    }
    warnings.extend(f"{card.name} ignores {name}" for name, is_used in used.items() if is_used and name in card.ignores)


def _x(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
