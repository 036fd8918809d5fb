"""`/fleet/...`: who belongs to a router's fleet, what its nodes may and shall do, and why a job went where it went.

What a router's owner decides wants the scope manage. On a single machine these routes say that it has no fleet.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from sdfleet.api.access import caller_of, check_right, needs
from sdfleet.api.answering import house_of
from sdfleet.api.bodies import described, json_body
from sdfleet.api.jobs import visible_to
from sdfleet.api.native import DIALECT, FAULTS
from sdfleet.api.pulling import ask_for_yes, is_yes, lines_of
from sdfleet.api.talk import NDJSON
from sdfleet.compose import House, check_is_idle
from sdfleet.domain import Job, JobId
from sdfleet.errors import NotFound, from_wire

if TYPE_CHECKING:
    from sdfleet.fleet.control import Fleet

__all__ = ["DIALECT", "router"]

router = APIRouter(prefix="/fleet", tags=["fleet"], responses=FAULTS)


class ModelAsked(BaseModel):
    """Which model."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: Annotated[str, Field(min_length=1, max_length=200)]


class NodePullAsked(ModelAsked):
    """Which model, from where, and the token that says yes to the plan."""

    stream: bool | None = True
    source: Annotated[
        Literal["hf", "modelscope"] | None,
        Field(description="Hugging Face or ModelScope; the node's own SD_HUB when left out"),
    ] = None
    confirm: Annotated[str | None, Field(max_length=200, description="the token out of the answer 409")] = None


class LimitAsked(BaseModel):
    """What may be drawn at a node; what is left out is not limited. slots: pictures at once, of all jobs together."""

    model_config = ConfigDict(extra="forbid")

    max_megapixels: Annotated[float, Field(gt=0)] | None = None
    max_steps: Annotated[int, Field(ge=1)] | None = None
    max_pictures: Annotated[int, Field(ge=1)] | None = None
    only: Annotated[list[str], Field(min_length=1, max_length=100)] | None = None
    slots: Annotated[int, Field(ge=1, le=4096)] | None = None


class CodeAnswer(BaseModel):
    """A join code, good once and for a quarter of an hour, and the command that uses it."""

    code: str
    command: str
    minutes: int


class PendingAnswer(BaseModel):
    """A machine that asks to join. name: what it would be called. code: it shows the same one."""

    name: str
    code: str
    nodes: list[str]


class PendingsAnswer(BaseModel):
    """All of them."""

    pending: list[PendingAnswer]


class NodesAnswer(BaseModel):
    """The nodes that something was done to."""

    nodes: list[str]


class WhyAnswer(BaseModel):
    """Why a job is where it is. why: one or two sentences. node: who has it, or drew it; empty while it waits.

    placement: every device with the seconds it would have needed; null for a job of this router's earlier life.
    """

    job_id: str
    state: str
    node: str
    why: str
    placement: dict[str, Any] | None


@router.post("/code", dependencies=[needs("manage")])
async def make_code(request: Request) -> CodeAnswer:
    """A new join code."""
    from sdfleet.fleet.trust import CODE_S

    code = _fleet(request).code().text()
    return CodeAnswer(code=code, command=f"sdfleet node --join {code}", minutes=round(CODE_S / 60))


@router.get("/pending", dependencies=[needs("manage")])
async def pending(request: Request) -> PendingsAnswer:
    """Machines that ask to join without a code; let one in only if it shows the same code."""
    found = _fleet(request).pending()
    return PendingsAnswer(
        pending=[PendingAnswer(name=each.nodes[0], code=each.code, nodes=list(each.nodes)) for each in found]
    )


@router.post("/nodes/{node}/approve", dependencies=[needs("manage")])
async def approve(request: Request, node: str) -> NodesAnswer:
    """Let a machine join that asks; `node` is the code that it shows, or the name that it would get."""
    return NodesAnswer(nodes=[each.node for each in await _fleet(request).approve(node)])


@router.post("/nodes/{node}/revoke", dependencies=[needs("manage")])
async def revoke(request: Request, node: str) -> NodesAnswer:
    """Put a node out at once. Its jobs go elsewhere; what it still sends is refused."""
    await _fleet(request).revoke(node)
    return NodesAnswer(nodes=[node])


@router.post("/nodes/{node}/drain", dependencies=[needs("manage")])
async def drain(request: Request, node: str) -> NodesAnswer:
    """Give a node no more jobs; what it draws it ends."""
    await _fleet(request).drain(node)
    return NodesAnswer(nodes=[node])


@router.post("/nodes/{node}/undrain", dependencies=[needs("manage")])
async def undrain(request: Request, node: str) -> NodesAnswer:
    """Give a node jobs again."""
    await _fleet(request).drain(node, is_draining=False)
    return NodesAnswer(nodes=[node])


@router.post("/nodes/{node}/limit", dependencies=[needs("manage")], openapi_extra=described(LimitAsked))
async def limit(
    request: Request, node: str, asked: Annotated[LimitAsked, Depends(json_body(LimitAsked))]
) -> NodesAnswer:
    """What may be drawn at a node, in the place of all that was settled before."""
    from sdfleet.fleet.state import Limits

    limits = Limits(
        max_megapixels=asked.max_megapixels,
        max_steps=asked.max_steps,
        max_pictures=asked.max_pictures,
        only=None if asked.only is None else frozenset(asked.only),
    )
    await _fleet(request).limit(node, limits=limits, max_pictures=asked.slots)
    return NodesAnswer(nodes=[node])


@router.post("/nodes/{node}/pin", dependencies=[needs("manage")], openapi_extra=described(ModelAsked))
async def pin(request: Request, node: str, asked: Annotated[ModelAsked, Depends(json_body(ModelAsked))]) -> NodesAnswer:
    """Have a model loaded at a node, and stay. Answers when it is."""
    await _fleet(request).pin(node, asked.model)
    return NodesAnswer(nodes=[node])


@router.post("/nodes/{node}/unpin", dependencies=[needs("manage")], openapi_extra=described(ModelAsked))
async def unpin(
    request: Request, node: str, asked: Annotated[ModelAsked, Depends(json_body(ModelAsked))]
) -> NodesAnswer:
    """Let a pinned model leave again."""
    await _fleet(request).pin(node, asked.model, is_pinned=False)
    return NodesAnswer(nodes=[node])


@router.post("/nodes/{node}/load", dependencies=[needs("manage")], openapi_extra=described(ModelAsked))
async def load(
    request: Request, node: str, asked: Annotated[ModelAsked, Depends(json_body(ModelAsked))]
) -> NodesAnswer:
    """Have a model in a node's memory before a job wants it. Answers when it is."""
    await _fleet(request).order(node, "load", asked.model)
    return NodesAnswer(nodes=[node])


@router.post("/nodes/{node}/unload", dependencies=[needs("manage")], openapi_extra=described(ModelAsked))
async def unload(
    request: Request, node: str, asked: Annotated[ModelAsked, Depends(json_body(ModelAsked))]
) -> NodesAnswer:
    """Let a model leave a node's memory. 409 while a job draws with it."""
    await _fleet(request).order(node, "unload", asked.model)
    return NodesAnswer(nodes=[node])


@router.post(
    "/nodes/{node}/pull",
    dependencies=[needs("manage")],
    openapi_extra=described(NodePullAsked),
    responses={
        200: {"content": {NDJSON: {}, "application/json": {}}},
        409: {"description": "Nobody has said yes yet: the node's plan, and the token that says it."},
    },
    response_class=JSONResponse,
)
async def pull(
    request: Request, node: str, asked: Annotated[NodePullAsked, Depends(json_body(NodePullAsked))]
) -> Response:
    """Have a node download a model, after a yes to this node's plan; as `/api/pull` on one machine."""
    house, fleet, owner = house_of(request), _fleet(request), caller_of(request).owner
    facts = dict(await fleet.order(node, "plan", asked.model, source=asked.source))
    plan_id, refusal = str(facts.pop("id")), cast("dict[str, str] | None", facts["refusal"])
    if refusal is not None and not facts["is_here"]:
        raise from_wire(refusal)
    # The yes is to this plan at this node, and at no other.
    what = f"{node} {plan_id}"
    if not facts["is_here"] and (asked.confirm is None or not is_yes(house, what, asked.confirm, owner=owner)):
        hint = (
            f"send the same request with `confirm` from this answer, or run `sdfleet fleet pull {node} {asked.model}`"
        )
        return ask_for_yes(house, facts | {"node": node}, what=what, owner=owner, where=f" at node {node}", hint=hint)
    statuses = fleet.pull(node, asked.model, consent=plan_id, source=asked.source)
    if asked.stream is False:
        return JSONResponse([status async for status in statuses][-1])
    return StreamingResponse(lines_of(statuses), media_type=NDJSON)


@router.post("/nodes/{node}/forget", dependencies=[needs("manage")], openapi_extra=described(ModelAsked))
async def forget(
    request: Request, node: str, asked: Annotated[ModelAsked, Depends(json_body(ModelAsked))]
) -> NodesAnswer:
    """Delete a node's downloaded model; of an imported one only the name is forgotten. 409 while a job needs it."""
    house, fleet = house_of(request), _fleet(request)
    model = (await asyncio.to_thread(house.catalog.card, asked.model)).name
    if fleet.with_model(model) == (node,):
        await check_is_idle(house.store, model)  # no other node could draw what waits
    await fleet.order(node, "forget", model)
    return NodesAnswer(nodes=[node])


@router.get("/jobs/{job_id}/why")
async def why(request: Request, job_id: str) -> WhyAnswer:
    """Why a job went to its node, or why it still waits."""
    house = house_of(request)
    check_right(caller_of(request), "read")
    found = _fleet(request)
    job = (await house.desk.status(JobId(job_id), owner=visible_to(request))).job
    reason = found.why(job)
    return WhyAnswer(
        job_id=job.id,
        state=job.state,
        node=node_of(house, job),
        why="it was placed before this router was started again" if reason is None else reason.text,
        placement=None if reason is None else reason.to_json(),
    )


def node_of(house: House, job: Job) -> str:
    """Which node drew a job, or has it now; empty where none does, and on a single machine."""
    return job.node or ("" if house.fleet is None else house.fleet.node_of(job.id))


def _fleet(request: Request) -> Fleet:
    fleet = house_of(request).fleet
    if fleet is None:
        raise NotFound("this server has no fleet", hint="start one: sdfleet router")
    return fleet
