"""Finished pictures on disk: whole files only, and nothing that exists is replaced unless it was named.

`plan` is asked before drawing, so that a folder which cannot be written costs no picture; `save` is asked after.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from sdfleet import __version__
from sdfleet.domain import ImageResult, Lora, SafetyVerdict
from sdfleet.errors import InvalidValue, OutputNotWritable
from sdfleet.storage.infotext import Metadata, NotedLora
from sdfleet.storage.pictures import Format, encode

FORMAT_OF: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
SUFFIX_OF: dict[Format, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputPlan:
    """Where the pictures of one job go. `files` are set when somebody named them; else names are made from the job.

    may_replace: the one file was named exactly, so an older one of that name is replaced.
    """

    folder: Path
    format: Format
    files: tuple[Path, ...] = ()
    may_replace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """One picture on disk."""

    path: Path
    seed: int
    n_bytes: int
    safety: SafetyVerdict = "none"


def plan(output: str | None, *, format: Format | None, n_images: int, default_folder: Path, today: date) -> OutputPlan:
    """Where `n_images` pictures will go; the folder exists and can be written when this returns.

    output: a file (its extension decides the format; several pictures become FILE-1.png, ...), a folder
    (it exists, or ends in a slash), or None for `default_folder/<today>/`.
    Raises InvalidValue (extension) or OutputNotWritable.
    """
    if output is None:
        return _in_folder(default_folder / today.isoformat(), format=format)
    if "\0" in output or not output.strip():
        raise InvalidValue("output", f"{output!r} is not a file name")
    path = Path(output).expanduser().absolute()
    if output.endswith(("/", os.sep)) or path.is_dir():
        return _in_folder(path, format=format)
    suffix = path.suffix.lower()
    found = FORMAT_OF.get(suffix)
    if found is None:
        raise InvalidValue("output", f"{path.name!r} has no extension we write", hint="use .png, .jpg or .webp")
    if format is not None and format != found:
        raise InvalidValue("output", f"{path.name!r} is not a name for {format}", hint="leave out one of the two")
    files = (path,) if n_images == 1 else tuple(path.with_stem(f"{path.stem}-{i}") for i in range(1, n_images + 1))
    if not path.parent.is_dir():
        raise OutputNotWritable(f"there is no folder {path.parent}", hint="make it first")
    for file in files:
        if n_images > 1 and file.exists():
            raise OutputNotWritable(f"{file} exists already", hint="move it away or name another file")
        if file.is_dir():
            raise OutputNotWritable(f"{file} is a folder", hint="name a file")
    _check_writable(path.parent)
    return OutputPlan(folder=path.parent, format=found, files=files, may_replace=n_images == 1)


def save(result: ImageResult, plan: OutputPlan, *, sampler_label: str | None = None) -> tuple[Saved, ...]:
    """The finished pictures as files, all of them or none. Raises OutputNotWritable."""
    contents = [
        encode(finished.picture, plan.format, metadata_of(result, index=i, sampler_label=sampler_label))
        for i, finished in enumerate(result.images)
    ]
    seeds = [finished.seed for finished in result.images]
    indexes = [i if finished.index is None else finished.index for i, finished in enumerate(result.images)]
    files = (
        tuple(plan.files[i] for i in indexes)
        if plan.files
        else tuple(
            plan.folder / f"{result.job_id}-{i}-{seed}{SUFFIX_OF[plan.format]}"
            for i, seed in zip(indexes, seeds, strict=True)
        )
    )
    _write_all(contents, files, may_replace=plan.may_replace)
    return tuple(
        Saved(path=file, seed=finished.seed, n_bytes=len(content), safety=finished.safety)
        for file, finished, content in zip(files, result.images, contents, strict=True)
    )


def metadata_of(result: ImageResult, *, index: int, sampler_label: str | None = None) -> Metadata:
    """What is written into `result.images[index]`: enough to draw this one again, alone."""
    drawing, finished = result.drawing, result.images[index]
    told = {
        name: None if name in result.unsaid else getattr(drawing, name) for name in ("steps", "guidance", "sampler")
    }
    is_resized = (finished.picture.width_px, finished.picture.height_px) != (drawing.width_px, drawing.height_px)
    return Metadata(
        version=__version__,
        prompt=drawing.prompt,
        negative_prompt=drawing.negative_prompt,
        model=result.model,
        task=drawing.task,
        width_px=finished.picture.width_px,
        height_px=finished.picture.height_px,
        drawn_width_px=drawing.width_px if is_resized else None,
        drawn_height_px=drawing.height_px if is_resized else None,
        steps=told["steps"],
        guidance=told["guidance"],
        seed=finished.seed,
        sampler=told["sampler"],
        sampler_label=None if "sampler" in result.unsaid else sampler_label,
        strength=drawing.strength if drawing.image is not None and "strength" not in result.unsaid else None,
        t5=drawing.t5 if drawing.t5 != "auto" else None,
        reproducible=finished.reproducible,
        step_cache=drawing.step_cache if drawing.step_cache != "off" else None,
        loras=tuple(map(_noted, drawing.loras)),
        embeddings=tuple(embedding.name for embedding in drawing.embeddings),
        job_id=result.job_id,
        image_index=index if finished.index is None else finished.index,
        safety=finished.safety if finished.safety != "none" else None,
        backend=result.backend or None,
        cost_credits=finished.cost_credits,
        device=result.device or None,
        dtype=result.dtype or None,
        rungs=result.rungs,
        warnings=result.warnings,
    )


def _noted(lora: Lora) -> NotedLora:
    text_scale = None if lora.text_scale == lora.scale else lora.text_scale
    return NotedLora(name=lora.file.name, scale=lora.scale, text_scale=text_scale, hash=lora.file.content)


def _in_folder(folder: Path, *, format: Format | None) -> OutputPlan:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise _not_writable(folder, exc) from exc
    _check_writable(folder)
    return OutputPlan(folder=folder, format=format or "png")


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as exc:
        raise _not_writable(folder, exc) from exc


def _write_all(contents: Sequence[bytes], files: Sequence[Path], *, may_replace: bool) -> None:
    temporary: list[Path] = []
    placed: list[Path] = []
    try:
        for content, file in zip(contents, files, strict=True):
            temporary.append(write_beside(file, content))
        for source, file in zip(temporary, files, strict=True):
            _place(source, file, may_replace=may_replace)
            placed.append(file)
    except OSError as exc:
        for file in placed:
            file.unlink(missing_ok=True)
        raise _not_writable(files[len(placed)], exc) from exc
    finally:
        for source in temporary:
            with contextlib.suppress(OSError):
                source.unlink(missing_ok=True)


def write_beside(file: Path, content: bytes) -> Path:
    """A finished temporary file in the folder where it is going, so that the rename is one step."""
    # Not mkstemp: its files are readable by their owner alone, a picture gets what the umask gives any new file.
    path = file.parent / f".sdfleet-{secrets.token_hex(8)}.part"
    try:
        with path.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _place(source: Path, file: Path, *, may_replace: bool) -> None:
    if may_replace:
        source.replace(file)
        return
    try:
        os.link(source, file)
    except FileExistsError:
        raise
    except OSError:
        # No hard links on this file system (exFAT, some network shares): look, then rename.
        if file.exists():
            raise FileExistsError(17, "File exists", str(file)) from None
        source.replace(file)


def _not_writable(path: Path, exc: OSError) -> OutputNotWritable:
    return OutputNotWritable(f"{path} cannot be written: {exc.strerror or exc}", hint="name another place with -o")
