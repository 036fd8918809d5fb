"""What a person sees and does on the dashboard, in a real browser against the real server."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytest.importorskip("playwright")

from playwright.sync_api import Locator, Page, expect

from sdfleet.api.snapshots import Snapshots
from sdfleet.errors import OutOfMemory
from sdfleet.fleet.keys import NKey
from tests.api.serving import Running, running
from tests.catalog.folders import write_sd
from tests.fleet.houses import RouterInMemory
from tests.fleet.real_fleet import real_fleet
from tests.web.browser import NARROW, PATIENCE_MS, WIDE, serious

Visit = Callable[..., Page]
Start = Callable[..., Running]

expect.set_options(timeout=PATIENCE_MS)


def _ask(here: Running, **asked: Any) -> str:
    """The id of a new job."""
    answer = httpx2.post(f"{here.url}/api/jobs", json={"prompt": "a fox", "steps": 4, **asked}, timeout=60)
    assert answer.status_code == 202, answer.text
    found: str = answer.json()["id"]
    return found


def _draw(here: Running, **asked: Any) -> None:
    answer = httpx2.post(f"{here.url}/api/txt2img", json={"prompt": "a fox", "steps": 2, **asked}, timeout=60)
    assert answer.status_code == 200, answer.text


def _fail(here: Running) -> None:
    """One job that finds no room."""
    backend: Any = here.house.runtime._backend
    backend._script = [OutOfMemory("the device has no room", hint="ask for a smaller picture")]
    assert httpx2.post(f"{here.url}/api/txt2img", json={"prompt": "a fox", "steps": 2}, timeout=60).status_code >= 500


def _section(page: Page, name: str) -> Locator:
    return page.get_by_role("region", name=name, exact=True)


def _tile(page: Page, name: str) -> Locator:
    return page.locator(".tile", has_text=name).locator(".tile-value")


# ------------------------------------------------------------------------------------------------------- looking


def test_what_is_drawn_is_seen_step_by_step_and_counted_when_it_is_done(visit: Visit, server: Start) -> None:
    here = server()
    page = visit(f"{here.url}/dashboard")
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    with here.holding() as gate:
        _ask(here, n=2)
        gate.wait_for_job()
        gate.let(3)
        node = _section(page, "Nodes").get_by_role("article")
        expect(node).to_contain_text("step 3 of 8")
        expect(node).to_contain_text("Online")
        expect(_tile(page, "Drawing now")).to_have_text("1")
    expect(_tile(page, "Drawing now")).to_have_text("0")
    expect(_tile(page, "Done, last hour")).to_have_text("1")
    queue = _section(page, "Queues").get_by_role("row", name="starter")
    expect(queue).to_contain_text("[IMAGE]")
    expect(queue.get_by_role("cell").nth(2)).to_have_text("1")


def test_the_page_goes_on_by_itself_after_a_lost_connection(visit: Visit, server: Start) -> None:
    here = server()
    page = visit(f"{here.url}/dashboard")
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    old = here.app.state.snapshots
    here.loop.call_soon_threadsafe(old.close)
    expect(page.get_by_text("Connection lost, resuming")).to_be_visible()
    here.app.state.snapshots = Snapshots()
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    with here.holding() as gate:
        _ask(here)
        gate.wait_for_job()
        expect(_tile(page, "Drawing now")).to_have_text("1")


def test_a_failure_is_told_with_its_reason_and_can_be_tried_again_where_it_stands(visit: Visit, server: Start) -> None:
    here = server()
    _fail(here)
    page = visit(f"{here.url}/dashboard")
    row = _section(page, "Failures").get_by_role("row", name="out_of_memory")
    expect(row).to_contain_text("the device has no room")
    expect(row).to_contain_text("ask for a smaller picture")
    row.get_by_role("button").click()
    window = page.get_by_role("dialog")
    expect(window.get_by_role("alert")).to_contain_text("the device has no room")
    expect(window).to_contain_text("This machine is the only one")
    window.get_by_role("button", name="Try again").click()
    expect(_section(page, "Requests").get_by_role("row", name="Done")).to_be_visible()


def test_a_finding_of_the_doctor_comes_with_the_command_that_mends_it(
    visit: Visit, server: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    weights = write_sd(tmp_path / "weights")
    here = server()
    here.house.catalog.add(weights, name="toy")
    (weights / "tokenizer/vocab.json").unlink()
    page = visit(f"{here.url}/dashboard", permissions=["clipboard-read", "clipboard-write"])
    finding = _section(page, "Health").get_by_role("article").filter(has_text="vocab.json").first
    expect(finding).to_contain_text("Fault")
    expect(finding).to_contain_text("tokenizer/vocab.json is missing")
    assert serious(page) == []
    finding.get_by_role("button", name=re.compile("Copy")).click()
    expect(page.get_by_text("Copied.")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == finding.locator("code").inner_text()


def test_charts_say_in_words_and_in_a_table_what_they_draw(visit: Visit, server: Start) -> None:
    here = server()
    _draw(here)
    _draw(here)
    _fail(here)
    page = visit(f"{here.url}/dashboard")
    chart = page.get_by_role("figure", name="Throughput")
    drawing = chart.get_by_role("img")
    expect(drawing.locator("title")).to_have_text("Throughput")
    expect(drawing.locator("desc")).to_have_text("In the last hour: 2 jobs done, 1 failed, 0 cancelled.")
    chart.get_by_text("As a table").click()
    rows = chart.get_by_role("table").get_by_role("row")
    expect(rows).to_have_count(61)
    cells = [rows.nth(i).get_by_role("cell").all_inner_texts() for i in range(57, 61)]
    assert [sum(int(row[i]) for row in cells) for i in range(3)] == [2, 1, 0]
    assert serious(page) == []
    page.get_by_role("button", name="15 min").click()
    expect(drawing.locator("desc")).to_contain_text("In the last 15 minutes: 2 jobs done")
    expect(rows).to_have_count(31)


# --------------------------------------------------------------------------------------------------------- doing


def test_drawing_is_switched_off_and_on_with_the_keyboard(visit: Visit, server: Start) -> None:
    here = server()
    page = visit(f"{here.url}/dashboard")
    switch = page.get_by_role("switch", name="Takes new pictures")
    expect(switch).to_be_checked()
    switch.press("Space")
    expect(switch).not_to_be_checked()
    expect(page.get_by_text("Drawing is switched off")).to_be_visible()
    assert httpx2.post(f"{here.url}/api/txt2img", json={"prompt": "x"}).status_code == 503
    switch.press("Enter")
    expect(switch).to_be_checked()
    _draw(here)


def test_a_model_in_memory_is_pinned_and_let_go(visit: Visit, server: Start) -> None:
    here = server()
    _draw(here)
    page = visit(f"{here.url}/dashboard")
    page.get_by_role("button", name="Keep starter in memory").click()
    pinned = page.get_by_role("button", name="Let starter leave memory")
    expect(pinned).to_have_attribute("aria-pressed", "true")
    pinned.click()
    expect(page.get_by_role("button", name="Keep starter in memory")).to_be_visible()


def test_a_waiting_request_is_cancelled_from_its_window(visit: Visit, server: Start) -> None:
    here = server()
    page = visit(f"{here.url}/dashboard")
    with here.holding() as gate:
        job = _ask(here)
        gate.wait_for_job()
        page.get_by_role("button", name=f"what became of request {job}").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
        expect(_section(page, "Requests").get_by_role("row", name="Cancelled")).to_be_visible()
    page.get_by_role("button", name="Failed", exact=True).click()
    expect(_section(page, "Requests").get_by_role("row")).to_have_count(0)


def test_who_may_only_read_is_shown_no_button_that_would_be_refused(visit: Visit, server: Start) -> None:
    here = server(api_key="secret")
    _, key = here.call(here.house.keys.create("reader", scopes=("read",)))
    body = {"prompt": "a fox", "steps": 1}
    httpx2.post(f"{here.url}/api/txt2img", json=body, headers={"X-API-Key": "secret"}, timeout=60)
    page = visit(f"{here.url}/dashboard")
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Sign in", exact=True).click()
    expect(page.locator(".chip", has_text="starter")).to_be_visible()
    expect(page.get_by_role("switch")).to_be_disabled()
    expect(page.get_by_role("button", name="Keep starter in memory")).to_have_count(0)
    expect(page.get_by_text("the newest of your own")).to_be_visible()


def test_a_key_that_may_not_read_is_told_what_it_lacks(visit: Visit, server: Start) -> None:
    here = server(api_key="secret")
    _, key = here.call(here.house.keys.create("draws", scopes=("generate",)))
    page = visit(f"{here.url}/dashboard")
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Sign in", exact=True).click()
    fault = page.get_by_role("alert")
    expect(fault).to_contain_text("may not read")
    expect(fault).to_contain_text("--scope read")


# --------------------------------------------------------------------------------------------- for everybody's eyes


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_nobody_is_kept_out(visit: Visit, server: Start, viewport: dict[str, int], scheme: str) -> None:
    here = server()
    _draw(here)
    _fail(here)
    page = visit(f"{here.url}/dashboard", viewport=viewport, color_scheme=scheme)
    expect(_section(page, "Failures").get_by_role("row", name="out_of_memory")).to_be_visible()
    expect(_section(page, "Health")).to_be_visible()
    assert serious(page) == []
    # Nothing pushes the page wider than the screen; tables scroll by themselves.
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    page.get_by_role("button", name=re.compile("what became of")).first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert serious(page) == []
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


# -------------------------------------------------------------------------------------------------------- a fleet


def _asking(here: Running, name: str) -> str:
    """The code of a machine that asks to join."""
    code = "1234-5678"

    async def ask() -> None:
        fleet = here.house.fleet
        assert fleet is not None
        waiting = fleet.roster.add_pending((NKey.new().public,), name, "")
        fleet.roster.show_code(waiting.key, code)

    here.call(ask())
    return code


@pytest.mark.slow
def test_a_machine_that_asks_is_let_in_and_nodes_are_drained_pinned_and_put_out(visit: Visit, tmp_path: Path) -> None:
    with running(tmp_path, opens=RouterInMemory("n1", "n2")) as here:
        _draw(here)
        page = visit(f"{here.url}/dashboard")
        nodes = _section(page, "Nodes")
        expect(nodes.get_by_role("article")).to_have_count(2)
        code = _asking(here, "attic")
        expect(nodes.get_by_text(code)).to_be_visible()
        assert serious(page) == []
        nodes.get_by_role("button", name="Approve").click()
        expect(page.get_by_text("attic may join.")).to_be_visible()
        expect(nodes.get_by_text(code)).to_have_count(0)

        node = nodes.get_by_role("article").filter(has=page.locator(".chip", has_text="starter")).first
        name = node.get_attribute("aria-label") or ""
        node = nodes.get_by_role("article", name=name)
        node.get_by_role("button", name="Keep starter in memory").click()
        expect(node.get_by_role("button", name="Let starter leave memory")).to_be_visible()
        node.get_by_role("button", name="Drain").click()
        expect(node.get_by_text("Draining", exact=True)).to_be_visible()
        assert serious(page) == []
        page.get_by_role("button", name="Add a node").click()
        expect(page.get_by_role("dialog").locator("code")).to_contain_text("sdfleet node --join sdf")
        assert serious(page) == []
        page.keyboard.press("Escape")
        node.get_by_role("button", name="Revoke").click()
        dialog = page.get_by_role("dialog", name=f"Put {name} out of the fleet?")
        expect(dialog).to_be_visible()
        assert serious(page) == []
        dialog.get_by_role("button", name="Revoke").click()
        expect(nodes.get_by_role("article", name=name)).to_have_count(0)


def test_what_nodes_draw_of_one_model_is_one_queue_that_names_them(visit: Visit, tmp_path: Path) -> None:
    with running(tmp_path, opens=RouterInMemory("n1", "n2")) as here:
        _draw(here)
        (first,) = httpx2.get(f"{here.url}/dashboard/api/image-stats").json()["by_node"]
        assert httpx2.post(f"{here.url}/fleet/nodes/{first}/drain").status_code == 200
        _draw(here)
        _draw(here)
        page = visit(f"{here.url}/dashboard")
        rows = _section(page, "Queues").locator("tbody tr")
        expect(rows).to_have_count(1)
        expect(rows.get_by_role("cell").nth(2)).to_have_text("3")
        second = "n2" if first == "n1" else "n1"
        expect(rows).to_contain_text(f"{first} (1)")
        expect(rows).to_contain_text(f"{second} (2)")


def test_who_may_not_manage_a_fleet_sees_its_nodes_and_no_button_that_would_be_refused(
    visit: Visit, tmp_path: Path
) -> None:
    with running(tmp_path, opens=RouterInMemory("n1"), api_key="secret") as here:
        _, key = here.call(here.house.keys.create("reader", scopes=("read",)))
        _asking(here, "attic")
        page = visit(f"{here.url}/dashboard")
        page.get_by_label("Key", exact=True).fill(key)
        page.get_by_role("button", name="Sign in", exact=True).click()
        nodes = _section(page, "Nodes")
        expect(nodes.get_by_role("article")).to_have_count(1)
        expect(page.get_by_role("switch")).to_be_disabled()
        for name in ("Drain", "Revoke", "Approve", "Add a node"):
            expect(page.get_by_role("button", name=name)).to_have_count(0)


@pytest.mark.slow
def test_nodes_of_a_fleet_are_drained_and_revoked_and_choices_are_explained(visit: Visit, tmp_path: Path) -> None:
    with real_fleet(tmp_path / "fleet") as fleet:
        for name in ("mini", "tower"):
            fleet.add_node(name, SD_BACKEND="fake")
        fleet.wait_for_nodes()
        body = {"model": "starter", "prompt": "a fox", "steps": 2}
        assert httpx2.post(f"{fleet.url}/api/generate-image", json=body, timeout=120).status_code == 200
        page = visit(f"{fleet.url}/dashboard")
        expect(_section(page, "Nodes").get_by_role("article")).to_have_count(2)
        page.get_by_role("button", name=re.compile("what became of")).first.click()
        window = page.get_by_role("dialog")
        expect(window.get_by_role("row", name=re.compile("Chosen"))).to_have_count(1)
        expect(window.get_by_role("row", name=re.compile("mini|tower"))).to_have_count(2)
        page.keyboard.press("Escape")

        mini = _section(page, "Nodes").get_by_role("article", name="mini")
        mini.get_by_role("button", name="Drain").click()
        expect(mini.get_by_text("Draining", exact=True)).to_be_visible()
        assert next(one for one in fleet.status()["nodes"] if one["name"] == "mini")["is_draining"]
        mini.get_by_role("button", name="Take jobs again").click()
        expect(mini.get_by_text("Draining", exact=True)).to_have_count(0)

        page.get_by_role("button", name="Add a node").click()
        expect(page.get_by_role("dialog").locator("code")).to_contain_text("sdfleet node --join sdf")
        page.keyboard.press("Escape")

        mini.get_by_role("button", name="Revoke").click()
        page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
        expect(_section(page, "Nodes").get_by_role("article")).to_have_count(1)
        assert serious(page) == []
