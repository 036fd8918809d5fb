"""`sdfleet fleet`: look at a router's fleet and say what its nodes may and shall do.

Asks the router that runs with this data folder, or the one that `--router` (SD_ROUTER_URL) names, with SD_API_KEY.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from sdfleet.cli import console
from sdfleet.cli.pulling import From, Yes, ask, size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdfleet.cli.serving import Server

app = typer.Typer(no_args_is_help=True, help="Look at a router's fleet, and say what its nodes may and shall do.")

AsJson = Annotated[bool, typer.Option("--json", help="Answer with one JSON object on stdout.")]
RouterUrl = Annotated[
    str | None, typer.Option("--router", metavar="URL", help="A router elsewhere; else the one of this machine.")
]
NodeName = Annotated[str, typer.Argument(metavar="NODE", help="As `sdfleet fleet status` shows it.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="As `sdfleet models list` shows it.")]


@app.command("status")
def status(*, router: RouterUrl = None, as_json: AsJson = False) -> None:
    """Show the nodes: how each stands, what it can draw, what it does."""
    with console.answering(as_json=as_json):
        told = _ask(router, "GET", "/fleet/status")
        if as_json:
            console.say_json(told)
            return
        queue = _ask(router, "GET", "/fleet/queue")
        for node in told["nodes"]:
            console.say(_line(node))
        wait_ms = queue["estimated_wait_ms"]
        soon = "" if wait_ms is None else f"; a picture asked for now would begin in {wait_ms / 1000:.1f} s"
        console.say(f"{queue['in_flight']} jobs run, {queue['pending']} wait{soon}")
        asking = _ask(router, "GET", "/fleet/pending")["pending"]
        for one in asking:
            console.say(f"{one['name']} asks to join. If it shows {one['code']}: sdfleet fleet approve {one['code']}")
        if not told["nodes"] and not asking:
            console.note("nobody draws yet: sdfleet fleet code")


def _line(node: Mapping[str, Any]) -> str:
    image = node.get("image", {})
    models = [one["name"] for one in image.get("models_available", ())]
    loaded = set(image.get("models_loaded", ()))
    shown = ", ".join(f"{name}*" if name in loaded else name for name in models) or "no models"
    state = "draining" if node.get("is_draining") else node["status"]
    reason = f"  ({node['reason']})" if node.get("reason") else ""
    return f"{node['node_id']:<20} {state:<9} {node['free_slots']}/{node['slots']} free  {shown}{reason}"


@app.command("code")
def code(*, router: RouterUrl = None, as_json: AsJson = False) -> None:
    """Make a join code: good once, for a quarter of an hour."""
    with console.answering(as_json=as_json):
        told = _ask(router, "POST", "/fleet/code")
        if as_json:
            console.say_json(told)
        else:
            console.say(told["command"])


@app.command("approve")
def approve(
    *,
    which: Annotated[str, typer.Argument(metavar="CODE", help="The code that the machine shows.")],
    router: RouterUrl = None,
    as_json: AsJson = False,
) -> None:
    """Let a machine join that asks without a join code."""
    _do(router, which, "approve", "belongs to the fleet now", as_json=as_json)


@app.command("revoke")
def revoke(*, node: NodeName, router: RouterUrl = None, as_json: AsJson = False) -> None:
    """Put a node out at once; its jobs go elsewhere."""
    _do(router, node, "revoke", "is out", as_json=as_json)


@app.command("drain")
def drain(*, node: NodeName, router: RouterUrl = None, as_json: AsJson = False) -> None:
    """Give a node no more jobs; what it draws it ends."""
    _do(router, node, "drain", "is given no more jobs", as_json=as_json)


@app.command("undrain")
def undrain(*, node: NodeName, router: RouterUrl = None, as_json: AsJson = False) -> None:
    """Give a node jobs again."""
    _do(router, node, "undrain", "is given jobs again", as_json=as_json)


@app.command("pin")
def pin(*, node: NodeName, model: ModelName, router: RouterUrl = None, as_json: AsJson = False) -> None:
    """Have a model loaded at a node, and stay."""
    _do(router, node, "pin", f"keeps {model}", {"model": model}, as_json=as_json)


@app.command("unpin")
def unpin(*, node: NodeName, model: ModelName, router: RouterUrl = None, as_json: AsJson = False) -> None:
    """Let a pinned model leave again."""
    _do(router, node, "unpin", f"may let {model} go", {"model": model}, as_json=as_json)


@app.command("load")
def load(*, node: NodeName, model: ModelName, router: RouterUrl = None, as_json: AsJson = False) -> None:
    """Have a model in a node's memory before a job wants it."""
    _do(router, node, "load", f"has {model} in memory", {"model": model}, as_json=as_json)


@app.command("unload")
def unload(*, node: NodeName, model: ModelName, router: RouterUrl = None, as_json: AsJson = False) -> None:
    """Let a model leave a node's memory."""
    _do(router, node, "unload", f"has let {model} go", {"model": model}, as_json=as_json)


@app.command("pull")
def pull(
    *,
    node: NodeName,
    model: ModelName,
    source: From = None,
    yes: Yes = False,
    router: RouterUrl = None,
    as_json: AsJson = False,
) -> None:
    """Have a node download a model, after a yes to the node's own plan. Ctrl-C stops it there; again, it goes on."""
    with console.answering(as_json=as_json):
        path, asked = f"/fleet/nodes/{quote(node, safe='')}/pull", {"model": model, "source": source}
        plan = _router(router).ask_for_plan(path, asked | {"stream": False})
        if "plan" in plan:
            if not as_json:
                _show(node, plan["plan"])
            if not yes:
                left = size(plan["plan"]["n_left_bytes"])
                ask(f"download {left} at {node}?", otherwise=f"sdfleet fleet pull {node} {model} --yes")
            file = ""
            for told in _router(router).lines(path, asked | {"confirm": plan["confirm"]}):
                if told.get("file", file) != file:
                    file = told["file"]
                    console.note(f"{file} ({size(told['total'])})")
        if as_json:
            console.say_json({"node": node, "model": model, "is_here": True})
            return
        console.say(f"{node} has {model}")


def _show(node: str, plan: Mapping[str, Any]) -> None:
    console.say(f"{plan['name']} for {node}: {plan['repo_id']} at {plan['endpoint']}")
    console.say(
        f"  {len(plan['files'])} files, {size(plan['n_left_bytes'])} to come; {size(plan['n_free_bytes'])} free"
    )
    console.say(f"  into {plan['folder']} there")
    console.say(f"  licence: {plan['licence'] or 'see the page of the model'} {plan['licence_url'] or ''}".rstrip())


@app.command("forget")
def forget(
    *, node: NodeName, model: ModelName, yes: Yes = False, router: RouterUrl = None, as_json: AsJson = False
) -> None:
    """Delete a node's downloaded model; of an imported one only the name is forgotten."""
    with console.answering(as_json=as_json):
        if not yes:
            ask(f"delete {model} at {node}?", otherwise=f"sdfleet fleet forget {node} {model} --yes")
    _do(router, node, "forget", f"has {model} no more", {"model": model}, as_json=as_json)


@app.command("limit")
def limit(
    *,
    node: NodeName,
    max_megapixels: Annotated[float | None, typer.Option(help="Largest picture, in 1024x1024.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Most steps of a picture.")] = None,
    max_pictures: Annotated[int | None, typer.Option(help="Most pictures of one job.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="This model; can be repeated.", show_default="all")] = None,
    slots: Annotated[int | None, typer.Option(help="Pictures drawn at once.")] = None,
    router: RouterUrl = None,
    as_json: AsJson = False,
) -> None:
    """Limit what is drawn at a node; without options, nothing is limited any more."""
    asked = {
        "max_megapixels": max_megapixels, "max_steps": max_steps, "max_pictures": max_pictures, "only": only or None,
        "slots": slots,
    }  # fmt: skip
    given = {name: value for name, value in asked.items() if value is not None}
    what = "draws without limits" if not given else "is limited: " + ", ".join(f"{n} {v}" for n, v in given.items())
    _do(router, node, "limit", what, given, as_json=as_json)


@app.command("explain")
def explain(
    *,
    job: Annotated[str, typer.Argument(metavar="JOB", help="As `sdfleet jobs list` shows it.")],
    router: RouterUrl = None,
    as_json: AsJson = False,
) -> None:
    """Tell why a job went to its node, or why it still waits."""
    with console.answering(as_json=as_json):
        told = _ask(router, "GET", f"/fleet/jobs/{quote(job, safe='')}/why")
        if as_json:
            console.say_json(told)
            return
        where = f" at {told['node']}" if told["node"] else ""
        console.say(f"{told['job_id']} is {told['state']}{where}")
        console.say(told["why"])
        for one in (told["placement"] or {}).get("candidates", ()):
            cost = one["refused"] or (
                f"{one['finish_s']:.1f} s: waits {one['wait_s']:.1f}, loads {one['load_s']:.1f}, "
                f"draws {one['draw_s']:.1f}; costs others {one['price_s'] + one['neighbours_s']:.1f}"
            )
            console.say(f"  {one['name']:<20} {cost}")


@app.command("nats-config")
def nats_config() -> None:
    """Print who may connect, for the operator of another broker (SD_NATS_URL); again after each join and revoke."""
    with console.answering():
        from sdfleet import compose

        settings = console.start()
        compose.need_fleet_extra()
        from sdfleet.fleet.broker import authorization
        from sdfleet.fleet.trust import Roster

        roster = Roster.open(settings.home / "fleet", takes_guests=settings.join_requests)
        console.say(authorization(roster.users()))


def _do(
    router: str | None, node: str, verb: str, what: str, body: Mapping[str, Any] | None = None, *, as_json: bool
) -> None:
    with console.answering(as_json=as_json):
        told = _ask(router, "POST", f"/fleet/nodes/{quote(node, safe='')}/{verb}", body)
        if as_json:
            console.say_json(told)
            return
        for one in told["nodes"]:
            console.say(f"{one} {what}")


def _ask(router: str | None, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return _router(router).ask(method, path, body)


def _router(router: str | None) -> Server:
    """A connection to the router that `--router` or SD_ROUTER_URL names, else to the one of this data folder."""
    from sdfleet.cli import serving
    from sdfleet.errors import NotFound

    settings = console.start()
    url = router or settings.router_url
    if url is not None:
        return serving.reach_at(url, key=None if settings.api_key is None else settings.api_key.get_secret_value())
    here = serving.reach(settings)
    if here is None:
        raise NotFound(
            f"no router runs with {settings.home}", hint="start one: sdfleet router; or name one with --router URL"
        )
    return here
