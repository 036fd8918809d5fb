"""The files of finished pictures, found by id alone: `<folder>/<day>/<output id>.png`, the day in UTC.

Nothing that a request says becomes part of a path. Everything here blocks; a server calls it in a worker thread.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from sdfleet.domain import ImageResult, Job, Output, OutputId, PictureFormat
from sdfleet.errors import InvalidValue, NotFound, OutputNotWritable
from sdfleet.storage.outputs import SUFFIX_OF, metadata_of, write_beside
from sdfleet.storage.pictures import encode

THUMBNAIL_SIDE_PX = 256
THUMBNAIL_QUALITY = 80
MAX_THUMBNAIL_SIDE_PX = 1024
# What a gallery shows of a prompt under its picture.
PROMPT_CHARS = 500

_THUMBNAILS = ".thumbnails"
_OUTPUT_ID = re.compile(r"[a-z0-9]{1,64}-[0-9]{1,4}", re.ASCII)
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_OURS = re.compile(rf"{_OUTPUT_ID.pattern}\.(?:png|jpg|webp)", re.ASCII)
# A new name is sure to survive a power cut only once its folder is synced too; Windows has no such call.
_CAN_SYNC_FOLDERS = os.name == "posix"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the finished pictures take, without their thumbnails."""

    n_files: int
    n_bytes: int


class OutputFiles:
    """The finished pictures under one folder, which is made when the first is written. clock: seconds since 1970."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._clock = clock

    def write(
        self,
        job: Job,
        result: ImageResult,
        *,
        format: PictureFormat | None = None,
        quality: int | None = None,
        sampler_label: str | None = None,
    ) -> list[Output]:
        """The finished pictures, on the disk: all of them or none. Files of an earlier attempt are replaced.

        format, quality: None takes the submission's. Raises OutputNotWritable.
        """
        format_ = format or job.submission.format
        quality = quality or job.submission.quality
        now_s = self._clock()
        found: list[Output] = []
        contents: list[bytes] = []
        for i, finished in enumerate(result.images):
            metadata = metadata_of(result, index=i, sampler_label=sampler_label)
            index = i if finished.index is None else finished.index
            contents.append(encode(finished.picture, format_, metadata, quality=quality))
            found.append(
                Output(
                    id=OutputId(f"{job.id}-{index}"),
                    job_id=job.id,
                    index=index,
                    seed=finished.seed,
                    width_px=finished.picture.width_px,
                    height_px=finished.picture.height_px,
                    format=format_,
                    n_bytes=len(contents[-1]),
                    created_s=now_s,
                    safety=finished.safety,
                    model=job.request.model,
                    prompt=job.request.prompt[:PROMPT_CHARS],
                )
            )
        self._place([self.path(output) for output in found], contents)
        return found

    def path(self, output: Output) -> Path:
        """Where the picture is, or was before somebody removed it. Raises InvalidValue for an id we did not make."""
        return self.folder / _day(output) / f"{_checked(output.id)}{SUFFIX_OF[output.format]}"

    def read(self, output: Output) -> bytes:
        """The picture's file. Raises NotFound when it is gone."""
        return _read(self.path(output), output)

    def thumbnail(self, output: Output, *, side_px: int = THUMBNAIL_SIDE_PX) -> bytes:
        """The picture as WebP that fits into a square of `side_px`, made once. Raises NotFound, InvalidValue."""
        if not 16 <= side_px <= MAX_THUMBNAIL_SIDE_PX:
            raise InvalidValue("side", f"{side_px} px is not between 16 and {MAX_THUMBNAIL_SIDE_PX}")
        path = self._thumbnails(output) / f"{output.id}-{side_px}.webp"
        # First the picture itself: a thumbnail whose picture is gone must not outlive it.
        data = self.read(output)
        with contextlib.suppress(OSError):
            return path.read_bytes()
        made = _shrunk(data, output, side_px=side_px)
        # A folder that cannot be written: the thumbnail is made again next time.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_beside(path, made).replace(path)
        return made

    def delete(self, output: Output) -> bool:
        """Whether there was a file to delete; its thumbnails and an empty folder go too. Raises OutputNotWritable."""
        path = self.path(output)
        try:
            for thumbnail in self._thumbnails(output).glob(f"{output.id}-*.webp"):
                thumbnail.unlink(missing_ok=True)
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise OutputNotWritable(f"{path} cannot be deleted: {exc.strerror or exc}") from exc
        for folder in (self._thumbnails(output), self._thumbnails(output).parent, path.parent):
            with contextlib.suppress(OSError):
                folder.rmdir()
        return True

    def usage(self) -> Usage:
        """How many pictures are in the folder, and their bytes."""
        sizes = [size for _, size in self._files()]
        return Usage(n_files=len(sizes), n_bytes=sum(sizes))

    def _thumbnails(self, output: Output) -> Path:
        return self.folder / _THUMBNAILS / _day(output)

    def _files(self) -> Iterator[tuple[Path, int]]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for day in os.scandir(self.folder):
                if not _DAY.fullmatch(day.name) or not day.is_dir(follow_symlinks=False):
                    continue
                for file in os.scandir(day.path):
                    # Others may delete meanwhile.
                    with contextlib.suppress(FileNotFoundError):
                        if _OURS.fullmatch(file.name) and file.is_file(follow_symlinks=False):
                            yield Path(file.path), file.stat(follow_symlinks=False).st_size

    def _place(self, paths: list[Path], contents: list[bytes]) -> None:
        temporary: list[Path] = []
        placed: list[Path] = []
        try:
            for folder in {path.parent for path in paths}:
                folder.mkdir(parents=True, exist_ok=True)
            for path, content in zip(paths, contents, strict=True):
                temporary.append(write_beside(path, content))
            for source, path in zip(temporary, paths, strict=True):
                source.replace(path)
                placed.append(path)
            for folder in {path.parent for path in paths}:
                _sync_folder(folder)
        except OSError as exc:
            for path in placed:
                path.unlink(missing_ok=True)
            hint = "make room, or name another folder with SD_OUTPUTS"
            raise OutputNotWritable(f"{self.folder} cannot be written: {exc.strerror or exc}", hint=hint) from exc
        finally:
            for source in temporary:
                with contextlib.suppress(OSError):
                    source.unlink(missing_ok=True)


def _checked(output_id: OutputId) -> OutputId:
    if not _OUTPUT_ID.fullmatch(output_id):
        raise InvalidValue("output", f"{output_id[:80]!r} is no id of a picture")
    return output_id


def _day(output: Output) -> str:
    return datetime.fromtimestamp(output.created_s, UTC).date().isoformat()


def _read(path: Path, output: Output) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise NotFound(f"the file of picture {output.id} is gone: {exc.strerror or exc}") from exc


def _shrunk(data: bytes, output: Output, *, side_px: int) -> bytes:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as exc:
        raise NotFound(f"the file of picture {output.id} is damaged", hint="draw it again") from exc
    image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=THUMBNAIL_QUALITY, method=4)
    return file.getvalue()


def _sync_folder(folder: Path) -> None:
    if not _CAN_SYNC_FOLDERS:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
