"""Picture files to pixels and back, with the facts of how a picture came to be inside the file.

Everything here blocks (Pillow); a server calls it in a worker thread.
Where the facts go, so that every character survives:
PNG: text chunks `parameters` (A1111 infotext) and `sdfleet` (JSON).
JPEG: EXIF UserComment (infotext) and comment segments (JSON; EXIF ends at 64 KB, a long prompt does not).
WebP: EXIF UserComment and ImageDescription (JSON in ASCII).
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Literal

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from sdfleet.domain import Picture
from sdfleet.errors import BrokenPicture
from sdfleet.storage.infotext import Metadata, from_json, parse, write

Format = Literal["png", "jpeg", "webp"]

MAX_FILE_BYTES = 64 * 2**20
# Decoded RGB of this many pixels takes 200 MB; a 100 MB camera picture is well under it.
MAX_PIXELS = 64 * 2**20
READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

# A 1024x1024 photograph-like picture on one EPYC core, 2026-11-20: level 1 86 ms and 1.91 MB, 4 181 ms and 1.66 MB,
# 6 (Pillow's own) 211 ms and 1.66 MB.
PNG_COMPRESS_LEVEL = 4
JPEG_QUALITY = 95
WEBP_QUALITY = 95

_JSON_KEY = "sdfleet"
_INFOTEXT_KEY = "parameters"
_COMMENT_PREFIX = b"sdfleet:"
# A JPEG segment holds 65533 bytes after its length.
_SEGMENT_BYTES = 65_000

# What Pillow raises on damaged files, found by feeding it such; the warnings are errors where Python is told so.
_DECODER_FAULTS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    struct.error, zlib.error, UserWarning, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def decode(data: bytes) -> Picture:
    """The pixels of a picture file as RGB: turned upright as its EXIF says, transparency laid on white.

    Raises BrokenPicture for anything that is not a whole PNG, JPEG, WebP, GIF (first frame) or BMP of sane size.
    """
    image = _open(data)
    return _picture(_rgb(image), mode="RGB")


def decode_mask(data: bytes) -> Picture:
    """The brightness of a picture file: 255 where it is drawn anew, 0 where it is kept. Raises as `decode`."""
    image = _open(data)
    return _picture(_rgb(image).convert("L"), mode="L")


def decode_alpha_mask(data: bytes) -> Picture:
    """A mask out of transparency: 255 (drawn anew) where the picture is clear, 0 (kept) where it is solid.

    Raises as `decode`, also for a picture without transparency.
    """
    image = _open(data)
    with contextlib.suppress(*_DECODER_FAULTS):
        image = ImageOps.exif_transpose(image)
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        raise BrokenPicture("it has no transparency", hint="make the part to be drawn anew transparent, save it as PNG")
    return _picture(ImageOps.invert(image.convert("RGBA").getchannel("A")), mode="L")


def decode_opaque_mask(data: bytes) -> Picture:
    """A mask as AUTOMATIC1111's clients send it: white is drawn anew; with transparency, what is solid is drawn anew.

    Raises as `decode`.
    """
    image = _open(data)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            return _picture(alpha, mode="L")
    return _picture(_rgb(image).convert("L"), mode="L")


def read_infotext(data: bytes) -> str:
    """The A1111 infotext in a picture file as it stands there, or nothing. Raises as `read_metadata`."""
    try:
        return _read_texts(_open(data, with_pixels=False))[1]
    except _DECODER_FAULTS:
        return ""


def resize(picture: Picture, *, width_px: int, height_px: int) -> Picture:
    """The picture at another size."""
    if (picture.width_px, picture.height_px) == (width_px, height_px):
        return picture
    image = _image(picture).resize((width_px, height_px), Image.Resampling.LANCZOS)
    return _picture(image, mode=picture.mode)


def fit(picture: Picture, *, width_px: int, height_px: int) -> Picture:
    """The RGB picture as large as fits, in the middle; what is left over continues its outermost pixels.

    What `engine.pixels.fitted` does to finished pictures, for previews of them.
    """
    scale = min(width_px / picture.width_px, height_px / picture.height_px)
    inner_px = max(1, round(picture.width_px * scale)), max(1, round(picture.height_px * scale))
    inner = _image(resize(picture, width_px=inner_px[0], height_px=inner_px[1]))
    left, above = (width_px - inner.width) // 2, (height_px - inner.height) // 2
    whole = Image.new(inner.mode, (width_px, height_px))
    # One side's margins are empty, the scale sees to that; the last row (column) is drawn out to the margin's size.
    for margin, edge in (
        ((0, 0, left, height_px), (0, 0, 1, inner.height)),
        ((left + inner.width, 0, width_px, height_px), (inner.width - 1, 0, inner.width, inner.height)),
        ((0, 0, width_px, above), (0, 0, inner.width, 1)),
        ((0, above + inner.height, width_px, height_px), (0, inner.height - 1, inner.width, inner.height)),
    ):
        size = margin[2] - margin[0], margin[3] - margin[1]
        if all(size):
            whole.paste(inner.crop(edge).resize(size), margin[:2])
    whole.paste(inner, (left, above))
    return _picture(whole, mode=picture.mode)


def encode(picture: Picture, format: Format, metadata: Metadata | None = None, *, quality: int | None = None) -> bytes:
    """The picture as a file; with metadata, `read_metadata` gives it back. quality: 1-100, of jpeg and webp."""
    image = _image(picture)
    file = io.BytesIO()
    match format:
        case "png":
            image.save(file, "PNG", compress_level=PNG_COMPRESS_LEVEL, pnginfo=_png_info(metadata))
            return file.getvalue()
        case "jpeg":
            exif = _exif(metadata, has_json=False)
            # Too long for EXIF: the comment segments still hold everything.
            fits = len(exif) < _SEGMENT_BYTES
            image.save(file, "JPEG", quality=quality or JPEG_QUALITY, subsampling=0, exif=exif if fits else b"")
            return _with_comments(file.getvalue(), b"" if metadata is None else metadata.to_json().encode())
        case "webp":
            image.save(file, "WEBP", quality=quality or WEBP_QUALITY, method=4, exif=_exif(metadata, has_json=True))
            return file.getvalue()


def read_metadata(data: bytes) -> Metadata | None:
    """How the picture in this file came to be: our own record, else an A1111 infotext, else None.

    Raises BrokenPicture when the file is no picture.
    """
    image = _open(data, with_pixels=False)
    try:
        ours, infotext = _read_texts(image)
    except _DECODER_FAULTS:
        # Damaged notes in a picture that can be read: the same as no notes.
        return None
    found = from_json(ours) if ours else None
    noted = parse(infotext) if infotext else None
    if found is None or noted is None or noted.sampler == found.sampler:
        return found or noted
    # A1111's name of the sampler stands in the infotext alone.
    return found.model_copy(update={"sampler_label": noted.sampler})


def _open(data: bytes, *, with_pixels: bool = True) -> Image.Image:
    if not data:
        raise BrokenPicture("the picture is empty (0 bytes)")
    if len(data) > MAX_FILE_BYTES:
        raise BrokenPicture(
            f"the picture has {len(data)} bytes, more than {MAX_FILE_BYTES}", hint="make the file smaller"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=READABLE)
    except UnidentifiedImageError as exc:
        raise BrokenPicture("this is not a picture we read", hint="use PNG, JPEG, WebP, GIF or BMP") from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise BrokenPicture(f"the picture has more than {MAX_PIXELS} pixels", hint="make it smaller") from exc
    except _DECODER_FAULTS as exc:
        raise BrokenPicture(f"the picture cannot be read: {_line(exc)}", hint="save it again as PNG") from exc
    if image.width * image.height > MAX_PIXELS:
        raise BrokenPicture(
            f"the picture is {image.width}x{image.height}, more than {MAX_PIXELS} pixels", hint="make it smaller"
        )
    if image.width == 0 or image.height == 0:
        raise BrokenPicture("the picture has no pixels")
    if with_pixels:
        try:
            image.load()
        except _DECODER_FAULTS as exc:
            raise BrokenPicture(f"the picture is damaged: {_line(exc)}", hint="save it again as PNG") from exc
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright, without transparency."""
    # Broken EXIF says nothing about which way is up.
    with contextlib.suppress(*_DECODER_FAULTS):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey: Pillow's own conversion would clip instead of scale.
        image = image.convert("I").point([min(n >> 8, 255) for n in range(65536)], "L")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        upper = image.convert("RGBA")
        white = Image.new("RGBA", upper.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, upper).convert("RGB")
    return image.convert("RGB")


def _picture(image: Image.Image, *, mode: Literal["RGB", "L"]) -> Picture:
    return Picture(width_px=image.width, height_px=image.height, mode=mode, data=image.tobytes())


def _image(picture: Picture) -> Image.Image:
    return Image.frombytes(picture.mode, (picture.width_px, picture.height_px), picture.data)


def _png_info(metadata: Metadata | None) -> PngInfo:
    info = PngInfo()
    if metadata is not None:
        # add_text falls back to iTXt (UTF-8) by itself when the text is not Latin-1.
        info.add_text(_INFOTEXT_KEY, write(metadata))
        info.add_itxt(_JSON_KEY, metadata.to_json())
    return info


def _exif(metadata: Metadata | None, *, has_json: bool) -> bytes:
    if metadata is None:
        return b""
    exif = Image.Exif()
    comment = b"UNICODE\0" + write(metadata).encode("utf-16-be", "surrogatepass")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    if has_json:
        exif[ExifTags.Base.ImageDescription] = metadata.to_json(is_ascii=True)
    return exif.tobytes()


def _with_comments(jpeg: bytes, text: bytes) -> bytes:
    """The JPEG file with `text` cut into comment segments, after its APPn segments."""
    at = 2
    while jpeg[at] == 0xFF and 0xE0 <= jpeg[at + 1] <= 0xEF:
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    parts = [_COMMENT_PREFIX + text[i : i + _SEGMENT_BYTES] for i in range(0, len(text), _SEGMENT_BYTES)]
    segments = b"".join(b"\xff\xfe" + struct.pack(">H", len(part) + 2) + part for part in parts)
    return jpeg[:at] + segments + jpeg[at:]


def _read_texts(image: Image.Image) -> tuple[str, str]:
    """Our JSON and the infotext, each empty when absent."""
    if image.format == "PNG":
        # Text chunks after the pixels are only seen once those are read.
        image.load()
        return str(image.info.get(_JSON_KEY, "")), str(image.info.get(_INFOTEXT_KEY, ""))
    exif = image.getexif()
    ours = exif.get(ExifTags.Base.ImageDescription, "")
    if image.format == "JPEG":
        comments = [data for marker, data in getattr(image, "applist", ()) if marker == "COM"]
        parts = [data.removeprefix(_COMMENT_PREFIX) for data in comments if data.startswith(_COMMENT_PREFIX)]
        ours = b"".join(parts).decode("utf-8", "replace")
    infotext = _user_comment(exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b""))
    return ours if isinstance(ours, str) else "", infotext


def _user_comment(raw: object) -> str:
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, bytes):
        return ""
    kind, text = raw[:8], raw[8:]
    if kind == b"UNICODE\0":
        # The standard leaves the byte order open; piexif, which A1111 uses, writes big-endian.
        is_little = text[:2] == b"\xff\xfe" or (text[1:2] == b"\0" and text[:1] != b"\0")
        return text.decode("utf-16-le" if is_little else "utf-16-be", "replace").lstrip("\ufeff").rstrip("\0")
    return text.decode("utf-8", "replace").rstrip("\0") if kind in (b"ASCII\0\0\0", b"\0" * 8) else ""


def _line(exc: BaseException) -> str:
    text = " ".join(str(exc).split())
    return text[:120] or type(exc).__name__
