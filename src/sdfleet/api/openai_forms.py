"""The bodies of edits and variations: forms with files, or JSON with pictures in base64, read into one shape."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.datastructures import UploadFile
from starlette.requests import Request

from sdfleet.api.answering import house_of
from sdfleet.api.asked import read_bytes
from sdfleet.api.bodies import form_of, json_body, picture_of, validated
from sdfleet.api.openai_wire import FromPicture, UnsupportedParameter
from sdfleet.compose import House
from sdfleet.errors import InvalidValue

A = TypeVar("A", bound=FromPicture)


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The pictures that came along, as the bytes of their files. notes: what the answer should tell."""

    images: tuple[bytes, ...] = ()
    mask: bytes | None = None
    notes: tuple[str, ...] = ()


async def read(request: Request, model: type[A]) -> tuple[A, Files]:
    """The fields and the pictures of a body, whichever way it was sent. Raises BadBody, InvalidValue or TooLarge."""
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        fields, files = await _form(request)
        asked = await asyncio.to_thread(validated, model, fields)
    else:
        asked, files = await json_body(model)(request), Files()
    house = house_of(request)
    texts = [*_texts(asked.image, field="image"), *_texts(asked.images, field="images")]
    masks = _texts(asked.mask, field="mask")
    images = [await read_bytes(house, text, field="image") for text in texts]
    mask = await _mask(house, masks) if masks else files.mask
    return asked, Files(images=(*files.images, *images), mask=mask, notes=files.notes)


async def _mask(house: House, masks: list[str]) -> bytes:
    if len(masks) > 1:
        raise InvalidValue("mask", f"{len(masks)} masks came", hint="send one")
    return await read_bytes(house, masks[0], field="mask")


async def _form(request: Request) -> tuple[dict[str, Any], Files]:
    """The texts and files of a form; a list comes as `image[]`, again and again, or as `image[0]`, `image[1]`."""
    form = await form_of(request)
    fields: dict[str, Any] = {}
    images: list[bytes] = []
    mask: bytes | None = None
    notes: list[str] = []
    try:
        for key, value in form.multi_items():
            name = key.partition("[")[0]
            if isinstance(value, UploadFile):
                if name == "image":
                    images.append(await picture_of(value, field="image"))
                elif name == "mask":
                    mask = await picture_of(value, field="mask")
                elif name == "markup":
                    raise UnsupportedParameter("markup", "it cannot be honoured here", hint="leave it out")
                else:
                    notes.append(f"the file {name[:40]!r} is not known here and was ignored")
            elif name in {"image", "images"}:
                fields.setdefault(name, []).append(value)
            else:
                fields[name] = value
    finally:
        await form.close()
    return fields, Files(images=tuple(images), mask=mask, notes=tuple(notes))


def _texts(value: Any, *, field: str) -> list[str]:
    """The pictures in a field of JSON: a text, an object that holds one, or a list of such. Raises InvalidValue."""
    items = value if isinstance(value, list) else [value]
    return [_text(item, field=field) for item in items if item not in (None, "")]


def _text(item: Any, *, field: str) -> str:
    match item:
        case (
            str(text)
            | {"image_url": {"url": str(text)}}
            | {"image_url": str(text)}
            | {"b64_json": str(text)}
            | {"url": str(text)}
        ):
            return text
        case {"file_id": _}:
            raise UnsupportedParameter(field, "files are not kept here", hint="send the picture itself")
        case _:
            raise InvalidValue(field, "it is no picture", hint="send base64, a data URL, or {'image_url': ...}")
