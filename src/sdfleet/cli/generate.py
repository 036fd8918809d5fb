"""`sdfleet generate` and `sdfleet show`: pictures from a prompt, and how a picture came to be."""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from sdfleet.cli import console

if TYPE_CHECKING:
    from sdfleet.domain import ImageRequest, ImageResult, LoraUse, Picture, SafetyChecker, StepCache
    from sdfleet.runtime import Runtime
    from sdfleet.settings import Settings
    from sdfleet.storage.infotext import Metadata
    from sdfleet.storage.outputs import Saved

T = TypeVar("T")


def generate(
    *,
    prompt: Annotated[str | None, typer.Argument(help="What the picture should show.", show_default=False)] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="File to write (.png, .jpg, .webp), or a folder.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model; see `sdfleet models list`.")] = None,
    negative: Annotated[str | None, typer.Option(help="What the picture should not show.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels, for example 512x512.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps, 1 to 1000.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strictly the prompt is followed, 0 to 100.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture; random when left out.")] = None,
    n: Annotated[int | None, typer.Option("-n", help="How many pictures; picture i has seed + i.")] = None,
    sampler: Annotated[str | None, typer.Option(help="For example euler, 'dpm++_2m karras', ddim.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to start from.")] = None,
    strength: Annotated[float | None, typer.Option(help="How far --image is redrawn, above 0 to 1.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Where --image is redrawn: white is, black is kept.")] = None,
    like: Annotated[Path | None, typer.Option(help="Repeat this picture; other options change it.")] = None,
    t5: Annotated[Literal["auto", "keep", "skip"] | None, typer.Option(help="SD3's large text encoder.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None, typer.Option(help="Number format of the weights.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"] | None, typer.Option(help="Where to draw.")] = None,
    format: Annotated[Literal["png", "jpeg", "webp"] | None, typer.Option(help="File format without -o.")] = None,
    reproducible: Annotated[
        bool | None, typer.Option("--reproducible", help="Let no other picture share this one's steps.")
    ] = None,
    step_cache: Annotated[
        Literal["off", "light", "strong"] | None,
        typer.Option(help="Guess some steps: faster, and changes the picture."),
    ] = None,
    safety_checker: Annotated[
        Literal["on", "flag", "off"] | None,
        typer.Option(help="Withhold what the model's own checker flags, only say so, or do not check."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:SCALE]", help="A LoRA, at scale 1 if none is given; may come again and again."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="What draws: sd, flux-local, flux-api, mflux, diffusionkit, ollama.")
    ] = None,
    inline: Annotated[bool, typer.Option(help="Show the picture in the terminal if it can.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")] = False,
) -> None:
    """Make pictures from a prompt."""
    with console.answering(as_json=as_json):
        settings = console.start(device=device, dtype=dtype)
        request = _request(
            settings, prompt=prompt, model=model, negative=negative, size=size, steps=steps, guidance=guidance,
            seed=seed, n_images=n, sampler=sampler, image=image, strength=strength, mask=mask, like=like, t5=t5,
            reproducible=reproducible, step_cache=step_cache, loras=lora, safety_checker=safety_checker,
            backend=backend,
        )  # fmt: skip

        def tell(result: ImageResult, saved: tuple[Saved, ...]) -> None:
            if as_json:
                console.say_json(_answer(result, saved))
            else:
                _tell(result, saved, inline=inline)

        console.run(_draw(settings, request, output=output, format=format, tell=tell))


def show(
    *,
    file: Annotated[Path, typer.Argument(help="A picture made by sdfleet or AUTOMATIC1111.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")] = False,
) -> None:
    """Tell how a picture was made."""
    with console.answering(as_json=as_json):
        console.start()
        metadata = _read_metadata(file, field="file")
        facts = metadata.model_dump(mode="json", exclude_defaults=not as_json, exclude_none=True)
        if as_json:
            console.say_json({"path": str(file), **facts})
            return
        for name, value in facts.items():
            parts = [_shown(part) for part in value] if isinstance(value, list) else [str(value)]
            console.say(f"{name.removesuffix('_px')}: {', '.join(parts)}")


def _shown(part: Any) -> str:
    """A LoRA with its scale; anything else as it is."""
    return f"{part['name']} at {part.get('scale', 1):g}" if isinstance(part, dict) else str(part)


async def _draw(
    settings: Settings,
    request: ImageRequest,
    *,
    output: str | None,
    format: Literal["png", "jpeg", "webp"] | None,
    tell: Callable[[ImageResult, tuple[Saved, ...]], None],
) -> None:
    """Check all that can be checked, draw, save, and tell before the engine is put away (seconds on a busy machine)."""
    import asyncio

    from sdfleet import compose
    from sdfleet.engine.sampler_names import a1111_label
    from sdfleet.storage import outputs

    async with compose.standalone(settings) as runtime, _standing_ready(runtime, request):
        prepared = await runtime.prepare(request)
        plan = outputs.plan(
            output,
            format=format,
            n_images=request.n_images,
            default_folder=settings.outputs_folder,
            today=datetime.now(UTC).astimezone().date(),
        )
        with console.StepBar(n_images=request.n_images, steps=prepared.drawing.steps) as bar:
            result = await runtime.draw(prepared, on_progress=bar)
        label = a1111_label(result.drawing.sampler)
        tell(result, await asyncio.to_thread(outputs.save, result, plan, sampler_label=label))


@asynccontextmanager
async def _standing_ready(runtime: Runtime, request: ImageRequest) -> AsyncIterator[None]:
    """This machine's own backend gets ready meanwhile, where it may be the one that draws.

    Most of a first picture is the engine's import of torch.

    Why it cannot get ready is not told here: whoever draws meets it too, and a request refused before has precedence.
    """
    import asyncio

    if not runtime.backends.may_be_own(request):
        yield
        return
    starting = asyncio.create_task(runtime.start())
    try:
        yield
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


def _tell(result: ImageResult, saved: tuple[Saved, ...], *, inline: bool) -> None:
    for warning in result.warnings:
        console.note(f"warning: {warning}")
    if inline:
        _show_inline(result)
    for one in saved:
        told = "  flagged by the safety checker" if one.safety == "flagged" else ""
        console.say(f"saved {one.path}  seed {one.seed}{told}")
    what = "1 picture" if len(saved) == 1 else f"{len(saved)} pictures"
    where = ", ".join(filter(None, (result.device, result.dtype)))
    console.say(f"{what} in {result.timings_s['total']:.2f} s" + (f" ({where})" if where else ""))


def _request(
    settings: Settings,
    *,
    prompt: str | None,
    model: str | None,
    negative: str | None,
    size: str | None,
    steps: int | None,
    guidance: float | None,
    seed: int | None,
    n_images: int | None,
    sampler: str | None,
    image: Path | None,
    strength: float | None,
    mask: Path | None,
    like: Path | None,
    t5: Literal["auto", "keep", "skip"] | None,
    reproducible: bool | None,
    step_cache: StepCache | None,
    loras: list[str] | None,
    safety_checker: SafetyChecker | None,
    backend: str | None,
) -> ImageRequest:
    """What was asked for: an option that was given, else what --like says, else left open.

    What drew a picture that is repeated does not count: it could have been a service, and nobody has said so now.
    """
    from sdfleet.domain import ImageRequest
    from sdfleet.engine.prompt_tags import read_use
    from sdfleet.errors import InvalidValue
    from sdfleet.storage.infotext import Metadata

    if prompt is None and like is None:
        raise InvalidValue("prompt", "it is missing", hint="say what to draw, or name a picture with --like")
    noted = Metadata() if like is None else _read_metadata(like, field="like")
    if noted.task in ("img2img", "inpaint") and image is None:
        raise InvalidValue("like", f"{like} was drawn from another picture", hint="give that one with --image")
    if noted.task == "inpaint" and mask is None:
        raise InvalidValue("like", f"{like} was drawn with a mask", hint="give that one with --mask")
    if strength is not None and image is None:
        raise InvalidValue("strength", "there is no picture to redraw", hint="name it with --image")
    width_px, height_px = (noted.width_px, noted.height_px) if size is None else parse_size(size)
    return ImageRequest(
        prompt=_first(prompt, noted.prompt, default=""),
        negative_prompt=_first(negative, noted.negative_prompt, default=""),
        model=_first(model, noted.model, default=settings.model),
        width_px=width_px,
        height_px=height_px,
        steps=_first(steps, noted.steps, default=None),
        guidance=_first(guidance, noted.guidance, default=None),
        seed=_first(seed, noted.seed, default=None),
        n_images=_first(n_images, None, default=1),
        sampler=_first(sampler, noted.sampler, default=None),
        image=None if image is None else _read_picture(image, field="image"),
        strength=_first(strength, noted.strength, default=None),
        mask=None if mask is None else _read_picture(mask, field="mask"),
        t5=_first(t5, noted.t5, default="auto"),
        reproducible=_first(reproducible, noted.reproducible, default=False),
        step_cache=_first(step_cache, noted.step_cache, default="off"),
        loras=_noted_loras(noted) if loras is None else tuple(map(read_use, loras)),
        safety_checker=safety_checker,
        backend=backend,
    )


def _noted_loras(noted: Metadata) -> tuple[LoraUse, ...]:
    from sdfleet.domain import LoraUse

    return tuple(
        LoraUse(name=lora.name, scale=lora.scale, text_scale=lora.text_scale, content=lora.hash) for lora in noted.loras
    )


def _first(given: T | None, noted: T | None, *, default: T) -> T:
    if given is not None:
        return given
    return default if noted is None else noted


def parse_size(text: str) -> tuple[int, int]:
    """Width and height out of `512x768`. Raises InvalidValue for anything else."""
    from sdfleet.errors import InvalidValue

    match = re.fullmatch(r"\s*([0-9]{1,9})\s*[xX*]\s*([0-9]{1,9})\s*", text)
    if match is None:
        raise InvalidValue("size", f"{text[:40]!r} is not WIDTHxHEIGHT", hint="for example 512x768")
    return int(match[1]), int(match[2])


def _read_picture(path: Path, *, field: Literal["image", "mask"]) -> Picture:
    from sdfleet.errors import BrokenPicture
    from sdfleet.storage import pictures

    data = console.read_file(path, field=field, max_bytes=pictures.MAX_FILE_BYTES)
    try:
        return pictures.decode(data) if field == "image" else pictures.decode_mask(data)
    except BrokenPicture as exc:
        raise BrokenPicture(f"{path}: {exc.message}", hint=exc.hint) from exc


def _read_metadata(path: Path, *, field: str) -> Metadata:
    from sdfleet.errors import BrokenPicture, InvalidValue
    from sdfleet.storage import pictures

    data = console.read_file(path, field=field, max_bytes=pictures.MAX_FILE_BYTES)
    try:
        metadata = pictures.read_metadata(data)
    except BrokenPicture as exc:
        raise BrokenPicture(f"{path}: {exc.message}", hint=exc.hint) from exc
    if metadata is None:
        raise InvalidValue(field, f"{path} does not say how it was made", hint="some programs remove these notes")
    return metadata


def _show_inline(result: ImageResult) -> None:
    from sdfleet.cli import inline
    from sdfleet.settings import read_terminal
    from sdfleet.storage.pictures import encode

    protocol = inline.protocol_of(read_terminal()) if sys.stdout.isatty() else None
    if protocol is not None:
        for finished in result.images:
            inline.show(encode(finished.picture, "png"), protocol=protocol, stream=sys.stdout)


def _answer(result: ImageResult, saved: tuple[Saved, ...]) -> dict[str, Any]:
    drawing, picture = result.drawing, result.images[0].picture
    return {
        "job_id": result.job_id,
        "model": result.model,
        "images": [
            {"path": str(one.path), "seed": one.seed, "n_bytes": one.n_bytes, "safety": one.safety} for one in saved
        ],
        "withheld": [{"index": one.index, "seed": one.seed, "reason": "flagged"} for one in result.withheld],
        "width_px": picture.width_px,
        "height_px": picture.height_px,
        "drawn_width_px": drawing.width_px,
        "drawn_height_px": drawing.height_px,
        "steps": drawing.steps,
        "guidance": drawing.guidance,
        "sampler": drawing.sampler,
        "reproducible": all(finished.reproducible for finished in result.images),
        "step_cache": drawing.step_cache,
        "loras": [
            {"name": lora.file.name, "scale": lora.scale, "text_scale": lora.text_scale, "hash": lora.file.content}
            for lora in drawing.loras
        ],
        "embeddings": [embedding.name for embedding in drawing.embeddings],
        "timings_s": {name: round(seconds, 4) for name, seconds in result.timings_s.items()},
        "warnings": list(result.warnings),
        "tokens": [
            {"encoder": t.encoder, "n_tokens": t.n_tokens, "window": t.window, "n_chunks": t.n_chunks}
            for t in result.tokens
        ],
        "device": result.device,
        "dtype": result.dtype,
        "backend": result.backend,
        "cost_credits": [image.cost_credits for image in result.images],
        "rungs": list(result.rungs),
    }
