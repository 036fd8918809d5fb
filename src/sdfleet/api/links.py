"""Links to finished pictures that work without a key, for an hour: for clients that fetch a URL with nothing else."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from sdfleet.api.answering import house_of
from sdfleet.api.native import FAULTS, MEDIA_TYPES, PICTURE
from sdfleet.domain import Output, OutputId
from sdfleet.errors import NotAllowed, NotFound
from sdfleet.storage.signing import is_signed, sign

router = APIRouter(tags=["jobs"], responses=FAULTS)

# As long as OpenAI's own links live.
LINK_LIFE_S = 3600
# Access lets these paths pass without a key; the signature is checked here.
PATH = "/files/"


def signed_link(request: Request, output: Output) -> str:
    """An absolute address of one picture, good for an hour, that carries no key."""
    house = house_of(request)
    expires = str(int(time.time()) + LINK_LIFE_S)
    signature = sign(house.signing_key, "link", output.id, expires)
    base = (house.settings.public_url or str(request.base_url)).rstrip("/")
    return f"{base}{PATH}{output.id}?expires={expires}&signature={signature}"


@router.get(PATH + "{output_id}", response_class=Response, responses=PICTURE)
async def linked_output(
    request: Request,
    output_id: str,
    expires: Annotated[str, Query(pattern=r"^\d{1,12}$")],
    signature: Annotated[str, Query(max_length=64)],
) -> Response:
    """The picture of a signed link."""
    house = house_of(request)
    if not is_signed(house.signing_key, signature, "link", output_id, expires):
        raise NotAllowed("this link is not one of ours", hint="ask for a new one")
    if int(expires) < time.time():
        raise NotAllowed("this link has expired", hint="ask for a new one: GET /api/outputs/{id} with a key")
    output = await house.store.output(OutputId(output_id))
    if output is None:
        raise NotFound("this picture is not here any more")
    return Response(await house.desk.picture(output), media_type=MEDIA_TYPES[output.format])
