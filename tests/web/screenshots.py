"""Pictures of every view of the page for the docs: light and dark, wide and narrow.

    python -m tests.web.screenshots                     # all views, into docs/images
    python -m tests.web.screenshots --views studio mask --to /tmp/shots --home /tmp/drawn

The built-in model draws the pictures; with --home they are kept for the next run. The fleet is a router with three
nodes, as processes of their own. Look at what comes out: nothing here judges it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.api.serving import running
from tests.fleet.real_fleet import RealFleet, real_fleet
from tests.web.browser import NARROW, PATIENCE_MS, WIDE, Faults, browsing

QUALITY = 78
MAX_BYTES = 150_000
ASK_S = 300

PROMPTS = (
    "a red circle on a blue background", "a tree at sunset", "a white heart inside a red circle on a gray background",
    "a big pink heart", "a small yellow star on a purple background", "the sun over a meadow",
    "a green triangle on an orange background", "a white circle on a striped red and blue background",
    "a yellow smiling face", "a white ring on black", "three orange stars on a blue background", "a pink flower",
    "a purple diamond on a yellow background", "the moon and stars", "a snowman with a red scarf",
    "two blue hearts on a pink background", "an orange cat face", "a blue car at night",
    "a red star to the left of a green heart", "a purple fish in the water", "snowy mountains at sunset",
    "a black star on a gradient from yellow to red", "a yellow house with a brown roof at night",
    "a red house with a blue roof", "a green boat on the sea at sunset",
)  # fmt: skip
SHOWN = "a green boat on the sea at sunset"


def main() -> None:
    """Take the pictures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path(__file__).parents[2] / "docs" / "images")
    parser.add_argument("--home", type=Path, default=None, help="where the drawn pictures are kept")
    parser.add_argument("--views", nargs="*", default=None, help=f"only these of {', '.join([*STUDIO, *DASHBOARD])}")
    asked = parser.parse_args()
    asked.to.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=PATIENCE_MS)
    wanted = set(asked.views or [*STUDIO, *DASHBOARD])
    with contextlib.ExitStack() as stack:
        home = asked.home or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if wanted & set(STUDIO):
            take_studio(home, asked.to, wanted)
        if wanted & set(DASHBOARD):
            take_dashboard(home, asked.to, wanted)


# ------------------------------------------------------------------------------------------------------- the studio


def take_studio(home: Path, to: Path, wanted: set[str]) -> None:
    """The views of the studio, of a server whose gallery holds what the built-in model drew."""
    with running(home / "studio", backend="local", device="cpu", dtype="float32") as here:
        if not httpx2.get(f"{here.url}/api/outputs", timeout=ASK_S).json()["outputs"]:
            for seed, prompt in enumerate(PROMPTS):
                body = {"prompt": prompt, "seed": seed + 7, "steps": 24}
                httpx2.post(f"{here.url}/api/txt2img", json=body, timeout=ASK_S).raise_for_status()
            newest = httpx2.get(f"{here.url}/api/outputs", timeout=ASK_S).json()["outputs"]
            for output in newest[1::6]:
                httpx2.put(f"{here.url}/api/outputs/{output['id']}/favourite", timeout=ASK_S).raise_for_status()
        with browsing() as browser:
            for name, view in STUDIO.items():
                if name in wanted and name not in {"sign-in", "empty"}:
                    take(browser, here.url, name, view, to)
    with running(home / "empty", backend="fake") as here, browsing() as browser:
        if "empty" in wanted:
            take(browser, here.url, "empty", empty, to)
    with running(home / "keys", backend="fake", api_key="a secret of many words") as here, browsing() as browser:
        if "sign-in" in wanted:
            take(browser, here.url, "sign-in", sign_in, to)


def empty(page: Page) -> None:
    """Nothing was made yet."""
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()
    expect(page.locator(".empty")).to_be_visible()


def studio(page: Page) -> None:
    """A finished picture with what can be done with it."""
    page.get_by_label("Prompt", exact=True).fill(SHOWN)
    page.locator(".cell").first.click()
    expect(page.locator(".facts-list")).to_contain_text("Seed")
    expect(page.locator("img.finished")).not_to_have_js_property("naturalWidth", 0)
    expect(page.locator(".tokens").first).to_contain_text("tokens")


def drawing(page: Page) -> None:
    """Pictures in the making; `take` cancels them afterwards."""
    for prompt, n, steps in (("a purple fish in the water", 4, 600), ("a yellow house at night", 1, 600)):
        page.get_by_label("Prompt", exact=True).fill(prompt)
        page.get_by_role("spinbutton", name="Pictures").fill(str(n))
        page.get_by_label("Steps", exact=True).fill(str(steps))
        page.get_by_role("button", name=re.compile("^Generate")).click()
        expect(page.locator(".viewer-foot .prompt-line")).to_have_text(prompt)
    page.locator(".queue-open").first.click()
    expect(page.get_by_test_id("standing")).to_have_text(re.compile(r"^Step \d{3,}"))
    expect(page.locator("img.preview")).to_have_count(4)


def mask(page: Page) -> None:
    """The brush."""
    studio(page)
    page.get_by_role("button", name="Redraw a part").click()
    canvas = page.locator(".mask-board canvas")
    expect(canvas).to_be_visible()
    box = canvas.bounding_box()
    assert box is not None
    across, down = (0.2, 0.45, 0.7), (0.2, 0.12, 0.22)
    page.mouse.move(box["x"] + box["width"] * across[0], box["y"] + box["height"] * down[0])
    page.mouse.down()
    for x, y in zip(across, down, strict=True):
        page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y, steps=6)
    page.mouse.up()


def compare(page: Page) -> None:
    """Two pictures laid over each other."""
    studio(page)
    page.get_by_role("button", name="Compare with another picture").click()
    page.locator(".cell").nth(2).click()
    expect(page.get_by_role("dialog").locator("dd").last).to_be_visible()


def models(page: Page) -> None:
    """Models that are here, and that can be downloaded."""
    page.get_by_role("button", name="More models").click()
    expect(page.locator(".model-row").first).to_be_visible()


def code(page: Page) -> None:
    """The request to take along."""
    studio(page)
    page.get_by_role("button", name="Copy as curl, Python or JSON").last.click()
    expect(page.locator("pre.code")).to_be_visible()


def history(page: Page) -> None:
    """The list of all requests beside the pictures."""
    studio(page)
    page.get_by_role("tab", name="History").click()
    expect(page.locator(".history li").first).to_be_visible()
    page.get_by_role("tab", name="History").scroll_into_view_if_needed()


def sign_in(page: Page) -> None:
    """The question for the key."""
    expect(page.get_by_role("heading", name="This server wants a key")).to_be_visible()


STUDIO: dict[str, Callable[[Page], None]] = {
    "empty": empty, "studio": studio, "history": history, "mask": mask, "compare": compare, "models": models,
    "code": code, "drawing": drawing, "sign-in": sign_in,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the dashboard


def take_dashboard(home: Path, to: Path, wanted: set[str]) -> None:
    """The views of a router with three nodes at work."""
    with tempfile.TemporaryDirectory(dir=home if home.is_dir() else None) as folder, real_fleet(Path(folder)) as fleet:
        for name in ("studio-mini", "tower", "laptop"):
            fleet.add_node(name)
        fleet.wait_for_nodes()
        with browsing() as browser:
            for name, view in DASHBOARD.items():
                if name in wanted:
                    with at_work(fleet):
                        take(browser, f"{fleet.url}/dashboard", name, view, to)


@contextlib.contextmanager
def at_work(fleet: RealFleet) -> Iterator[None]:
    """While inside, every node draws; some jobs have ended before, one of them badly."""

    def draw(seed: int) -> None:
        body = {"model": "starter", "prompt": PROMPTS[seed], "seed": seed, "steps": 8 + seed}
        httpx2.post(f"{fleet.url}/api/generate-image", json=body, timeout=ASK_S).raise_for_status()

    # As many at once as there are nodes: each of them learns how long it takes.
    with ThreadPoolExecutor(3) as clients:
        list(clients.map(draw, range(len(PROMPTS))))
    long = [
        httpx2.post(f"{fleet.url}/api/jobs", json={"prompt": prompt, "steps": 900, "n": 2}, timeout=ASK_S).json()["id"]
        for prompt in PROMPTS[:7]
    ]
    try:
        yield
    finally:
        for job in long:
            httpx2.delete(f"{fleet.url}/api/jobs/{job}", timeout=ASK_S)


def dashboard(page: Page) -> None:
    """The whole page, from the tiles to the requests."""
    nodes = page.get_by_role("region", name="Nodes").get_by_role("article")
    expect(nodes).to_have_count(3)
    expect(nodes.first).to_contain_text(re.compile("step [1-9]"))
    expect(page.get_by_role("region", name="Requests").get_by_role("row").nth(3)).to_be_visible()
    expect(page.get_by_role("region", name="Health")).to_be_visible()


def request(page: Page) -> None:
    """Why a job went where it went."""
    dashboard(page)
    page.get_by_role("button", name="Done", exact=True).click()
    page.get_by_role("button", name=re.compile("what became of")).first.click()
    expect(page.get_by_role("dialog").get_by_role("row", name=re.compile("Chosen"))).to_be_visible()


DASHBOARD: dict[str, Callable[[Page], None]] = {"dashboard": dashboard, "request": request}


# ---------------------------------------------------------------------------------------------------------- a picture


def take(browser: Browser, url: str, name: str, view: Callable[[Page], None], to: Path) -> None:
    """`page-<name>-<light|dark>-<wide|narrow>.webp`, four of them."""
    for width, viewport in (("wide", WIDE), ("narrow", NARROW)):
        for scheme in ("light", "dark"):
            context = browser.new_context(
                viewport=viewport, color_scheme=scheme, reduced_motion="reduce", has_touch=width == "narrow"
            )
            context.set_default_timeout(PATIENCE_MS)
            page = context.new_page()
            faults = Faults()
            faults.watch(page)
            page.goto(url)
            view(page)
            whole = name == "dashboard"
            page.evaluate("document.fonts.ready")
            shot = page.screenshot(full_page=whole, animations="disabled")
            target = to / f"page-{name}-{scheme}-{width}.webp"
            Image.open(io.BytesIO(shot)).convert("RGB").save(target, quality=QUALITY, method=6)
            print(f"{target.name:44} {target.stat().st_size:7} bytes", flush=True)  # noqa: T201 - a command
            assert target.stat().st_size < MAX_BYTES, target
            assert faults.told == [], faults.told
            if name == "drawing":
                while page.get_by_role("button", name=re.compile("^Cancel")).count():
                    page.get_by_role("button", name=re.compile("^Cancel")).last.click()
                    page.wait_for_timeout(300)
            context.close()


if __name__ == "__main__":
    main()
