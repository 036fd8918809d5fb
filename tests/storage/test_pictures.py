"""Picture files in and out."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from sdfleet.domain import Picture
from sdfleet.errors import BrokenPicture
from sdfleet.storage import pictures
from sdfleet.storage.infotext import Metadata
from sdfleet.storage.pictures import Format, decode, decode_mask, encode, read_metadata, resize

FORMATS: tuple[Format, ...] = ("png", "jpeg", "webp")
HARD_TEXT = 'fox, "quoted": 狐 🦊 é\nsecond line, \\ <b> \u2028 end'


def _file(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _pixel(picture: Picture, x: int, y: int) -> tuple[int, ...]:
    n = 3 if picture.mode == "RGB" else 1
    at = (y * picture.width_px + x) * n
    return tuple(picture.data[at : at + n])


def _gradient(width_px: int = 24, height_px: int = 16) -> Picture:
    data = bytes((x * 9 + y * 5 + c * 60) % 256 for y in range(height_px) for x in range(width_px) for c in range(3))
    return Picture(width_px=width_px, height_px=height_px, mode="RGB", data=data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_named_format_is_read(format: str) -> None:
    picture = decode(_file(Image.new("RGB", (10, 6), (255, 0, 0)), format))
    assert (picture.width_px, picture.height_px, picture.mode) == (10, 6, "RGB")
    assert all(abs(a - b) <= 3 for a, b in zip(_pixel(picture, 5, 3), (255, 0, 0), strict=True))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("I;16", 0x8040, (0x80, 0x80, 0x80)),
        ("I;16", 0xFFFF, (255, 255, 255)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb_on_white(mode: str, colour: Any, expected: tuple[int, int, int]) -> None:
    assert _pixel(decode(_file(Image.new(mode, (4, 4), colour))), 1, 1) == expected


def test_a_palette_picture_with_a_transparent_colour_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putdata([0, 1])
    picture = decode(_file(image, transparency=1))
    assert (_pixel(picture, 0, 0), _pixel(picture, 1, 0)) == ((10, 20, 30), (255, 255, 255))


def test_an_rgb_picture_with_a_transparent_colour_lies_on_white() -> None:
    image = Image.new("RGB", (2, 1), (5, 5, 5))
    image.putpixel((1, 0), (9, 9, 9))
    picture = decode(_file(image, transparency=(9, 9, 9)))
    assert (_pixel(picture, 0, 0), _pixel(picture, 1, 0)) == ((5, 5, 5), (255, 255, 255))


def test_a_cmyk_jpeg_becomes_rgb() -> None:
    picture = decode(_file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = _pixel(picture, 4, 4)
    assert red > 200
    assert max(green, blue) < 60


def test_a_picture_taken_sideways_stands_upright() -> None:
    image = Image.new("RGB", (8, 4), (0, 0, 0))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture = decode(_file(image, "JPEG", exif=exif))
    assert (picture.width_px, picture.height_px) == (4, 8)


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    assert _pixel(decode(_file(frames[0], "GIF", save_all=True, append_images=frames[1:])), 0, 0) == (255, 0, 0)


def test_a_mask_is_the_brightness() -> None:
    mask = decode_mask(_file(Image.new("RGB", (4, 2), (255, 255, 255))))
    assert (mask.mode, set(mask.data)) == ("L", {255})


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"GIF89a"],
)
def test_what_is_no_picture_is_told_in_one_line(data: bytes) -> None:
    with pytest.raises(BrokenPicture) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_picture_is_never_half_read(format: Format) -> None:
    data = encode(_gradient(64, 64), format)
    for n_bytes in (len(data) // 4, len(data) // 2, len(data) - 40):
        with pytest.raises(BrokenPicture):
            decode(data[:n_bytes])


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["png", "jpeg", "webp"]), st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 255)), max_size=8)
)
def test_no_damage_raises_anything_but_broken_picture(format: Format, damage: list[tuple[float, int]]) -> None:
    data = bytearray(encode(_gradient(), format, Metadata(prompt="fox", seed=1)))
    for where, byte in damage:
        data[int(where * len(data))] = byte
    for read in (decode, decode_mask, read_metadata):
        with contextlib.suppress(BrokenPicture):
            read(bytes(data))


def test_a_small_file_that_claims_a_huge_picture_is_refused_undecoded() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    for side_px in (9_000, 12_000, 60_000):
        header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        with pytest.raises(BrokenPicture, match="pixels"):
            decode(data)


def test_a_file_of_too_many_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_FILE_BYTES", 10)
    with pytest.raises(BrokenPicture, match="more than 10"):
        decode(encode(_gradient(), "png"))


def test_png_gives_back_the_same_pixels() -> None:
    assert decode(encode(_gradient(), "png")) == _gradient()


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_lossy_formats_stay_close(format: Format) -> None:
    smooth = Picture(width_px=16, height_px=16, mode="RGB", data=bytes(range(0, 256, 1)) * 3)
    again = decode(encode(resize(smooth, width_px=64, height_px=64), format))
    assert (again.width_px, again.height_px) == (64, 64)


@pytest.mark.parametrize("format", FORMATS)
def test_metadata_survives_with_every_character(format: Format) -> None:
    metadata = Metadata(prompt=HARD_TEXT, negative_prompt="ä, b: c", seed=2**64 - 1, steps=3, guidance=7.5, model="m")
    assert read_metadata(encode(_gradient(), format, metadata)) == metadata


@pytest.mark.parametrize("format", FORMATS)
def test_the_longest_prompts_survive_in_every_format(format: Format) -> None:
    metadata = Metadata(prompt="狐🦊" * 8000, negative_prompt="é" * 16_000, seed=1)
    data = encode(_gradient(), format, metadata)
    assert read_metadata(data) == metadata
    assert decode(data).width_px == 24


@pytest.mark.parametrize("format", FORMATS)
def test_other_programs_find_the_infotext_where_automatic1111_puts_it(format: Format) -> None:
    image = Image.open(io.BytesIO(encode(_gradient(), format, Metadata(prompt="狐", steps=3))))
    if format == "png":
        assert image.info["parameters"] == "狐\nSteps: 3"
    else:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        assert comment == b"UNICODE\0" + "狐\nSteps: 3".encode("utf-16-be")


def test_a_png_of_automatic1111_is_read() -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "fox\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512")
    found = read_metadata(_file(Image.new("RGB", (4, 4)), pnginfo=info))
    assert found is not None
    assert (found.source, found.prompt, found.seed) == ("a1111", "fox", 5)


def test_our_own_record_wins_over_the_infotext() -> None:
    found = read_metadata(encode(_gradient(), "png", Metadata(prompt="a\nNegative prompt: b", job_id="x")))
    assert found is not None
    assert (found.prompt, found.job_id) == ("a\nNegative prompt: b", "x")


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_without_notes_has_no_metadata(format: Format) -> None:
    assert read_metadata(encode(_gradient(), format)) is None


def test_resize_keeps_the_kind_of_picture() -> None:
    mask = Picture(width_px=4, height_px=4, mode="L", data=bytes(16))
    assert resize(mask, width_px=8, height_px=16) == Picture(width_px=8, height_px=16, mode="L", data=bytes(128))


@pytest.mark.parametrize("size", [(64, 96), (100, 64), (64, 64), (24, 160)])
def test_a_picture_is_fitted_as_the_engine_fits_those_it_draws_in_another_shape(size: tuple[int, int]) -> None:
    from sdfleet.engine import resizing

    picture = _gradient()
    assert pictures.fit(picture, width_px=size[0], height_px=size[1]) == resizing.fitted(picture, *size)
