"""What a person does with pictures in the studio, done in a real browser against the real server."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.api.serving import Running
from tests.web.acting import ask, ask_for, draw, finished, jobs_of, last_job, pixels
from tests.web.browser import PATIENCE_MS
from tests.web.many import multiply

Visit = Callable[..., Page]

expect.set_options(timeout=PATIENCE_MS)

# ---------------------------------------------------------------------------------------------------- pictures as input


def test_the_brush_says_what_is_drawn_anew(visit: Visit, starter_server: Running) -> None:
    first = draw(starter_server, "a red circle on a blue background", seed=3)
    page = visit(starter_server.url)
    page.locator(".cell").first.click()
    page.get_by_role("button", name="Redraw a part").click()
    board = page.locator(".mask-board canvas")
    box = board.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.15)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.15, steps=8)
    page.mouse.up()
    page.get_by_role("button", name="Keep the mask").click()
    expect(page.locator(".thumb .mask")).to_be_visible()
    ask_for(page, "a yellow square on a blue background")
    expect(page.locator(".facts-list")).to_contain_text("Change")
    job = last_job(starter_server)
    assert (job["task"], job["state"]) == ("inpaint", "done")
    before, after = (
        pixels(base64.b64decode(first["images"][0]["b64_json"])),
        pixels(ask("GET", starter_server.url + job["outputs"][0]["url"]).content),
    )
    # Below the stroke the picture is as it was, but for the rounding of its way through the VAE.
    changed = [abs(a - b) for a, b in zip(before[128 * 64 * 3 :], after[128 * 64 * 3 :], strict=True)]
    assert sum(changed) / len(changed) < 3


def test_a_dropped_and_a_pasted_picture_become_the_input(visit: Visit, fake_server: Running) -> None:
    picture = draw(fake_server, "to be dropped", seed=11)["images"][0]["b64_json"]
    page = visit(fake_server.url)
    expect(page.locator(".drop")).to_be_visible()
    page.evaluate(
        _ARRIVES,
        [picture, "dropped.png", ".drop", "drop"],
    )
    expect(page.get_by_alt_text("Input picture dropped.png")).to_be_visible()
    # "Like this one", from what the file itself says.
    page.get_by_role("button", name="Use this picture's own settings").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("to be dropped")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("11")
    page.get_by_label("How much may change", exact=True).fill("0.4")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(finished(page)).to_be_visible()
    assert last_job(fake_server)["task"] == "img2img"


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_a_picture_may_arrive_anywhere_on_the_page(visit: Visit, fake_server: Running, way: str) -> None:
    picture = draw(fake_server, "from elsewhere")["images"][0]["b64_json"]
    page = visit(fake_server.url)
    expect(page.locator(".drop")).to_be_visible()
    page.evaluate(_ARRIVES, [picture, "elsewhere.png", ".gallery", way])
    expect(page.locator(".input-picture img")).to_be_visible()


def test_a_picture_is_dragged_from_the_gallery_and_what_a_model_cannot_take_is_said(
    visit: Visit, fake_server: Running
) -> None:
    draw(fake_server, "dragged along")
    page = visit(fake_server.url)
    expect(page.locator(".cell img").first).to_be_visible()
    page.evaluate(_DRAGS, [".cell img", ".drop"])
    expect(page.get_by_alt_text("Input picture picture from the gallery")).to_be_visible()
    page.get_by_role("button", name="Remove the input picture").click()
    expect(page.locator(".drop")).to_be_visible()


# What a drag with the mouse comes to; the browser's own has stopped answering for ever in some runs without a screen.
_DRAGS = """([from, to]) => {
    const data = new DataTransfer();
    const tell = (selector, kind) => document.querySelector(selector).dispatchEvent(
        new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
    tell(from, "dragstart");
    if (tell(to, "dragover")) throw new Error("nothing can be dropped there");
    tell(to, "drop");
    tell(from, "dragend");
}"""
_ARRIVES = """([b64, name, selector, kind]) => {
    const bytes = Uint8Array.from(atob(b64), (c) => c.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name, {type: "image/png"}));
    const event = kind === "drop" ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
        : new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true});
    document.querySelector(selector).dispatchEvent(event);
}"""


def test_several_pictures_of_a_kept_seed_are_asked_for_and_one_is_downloaded(
    visit: Visit, fake_server: Running
) -> None:
    page = visit(fake_server.url)
    page.get_by_role("button", name="Roll a seed and keep it").click()
    seed = page.get_by_label("Seed", exact=True).input_value()
    page.get_by_role("spinbutton", name="Pictures").fill("3")
    page.get_by_label("Prompt", exact=True).fill("three of a seed")
    page.get_by_role("button", name="Generate 3").click()
    expect(finished(page)).to_be_visible()
    job = last_job(fake_server)
    assert [output["seed"] for output in job["outputs"]] == [int(seed) + i for i in range(3)]
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert pixels(Path(download.value.path()).read_bytes())
    page.get_by_role("button", name="Keep the seed").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("")


# ---------------------------------------------------------------------------------------------------------- the gallery


def test_a_picture_is_found_kept_compared_and_deleted(visit: Visit, server: Callable[..., Running]) -> None:
    here = server()
    for prompt in ("a Blue Whale", "a red fox", "a grey mouse"):
        draw(here, prompt)
    page = visit(here.url)
    expect(page.locator(".cell")).to_have_count(3)
    page.get_by_label("Search prompts").fill("blue wh")
    expect(page.locator(".cell")).to_have_count(1)
    page.locator(".cell").click()
    page.get_by_role("button", name="Make it a favourite").click()
    expect(page.get_by_role("button", name="No favourite any more")).to_be_visible()
    page.get_by_label("Search prompts").fill("")
    expect(page.locator(".cell")).to_have_count(3)
    page.get_by_role("button", name="Only favourites").click()
    expect(page.locator(".cell")).to_have_count(1)
    page.get_by_role("button", name="Only favourites").click()
    expect(page.locator(".cell")).to_have_count(3)

    page.get_by_role("button", name="Compare with another picture").click()
    page.locator(".cell").first.click()
    compare = page.get_by_role("dialog", name="Compare")
    expect(compare.locator("img")).to_have_count(2)
    page.keyboard.press("Escape")
    expect(compare).to_have_count(0)

    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("button", name="Delete for good").click()
    expect(page.locator(".cell")).to_have_count(2)
    page.reload()
    expect(page.locator(".cell")).to_have_count(2)


def test_like_this_one_takes_over_how_a_picture_was_made(visit: Visit, fake_server: Running) -> None:
    draw(fake_server, "made with care", negative_prompt="haste", steps=9, guidance=2.5, seed=2**63, sampler="heun")
    page = visit(fake_server.url)
    page.locator(".cell").first.click()
    page.get_by_role("button", name="Like this one").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("made with care")
    expect(page.get_by_label("Negative prompt")).to_have_value("haste")
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(2**63))
    expect(page.get_by_label("Sampler")).to_have_value("heun")
    expect(page.get_by_label("Steps", exact=True)).to_have_value("9")
    expect(page.get_by_label("Guidance", exact=True)).to_have_value("2.5")
    expect(page.get_by_label("Width in pixels")).to_have_value("128")
    before = finished(page).get_attribute("src") or ""
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(finished(page)).not_to_have_attribute("src", before)
    expect(page.locator(".facts-list")).to_contain_text(str(2**63))
    first, second = (job["outputs"][0]["id"] for job in jobs_of(fake_server)[:2])
    again = [ask("GET", f"{fake_server.url}/api/outputs/{one}").content for one in (first, second)]
    assert pixels(again[0]) == pixels(again[1])


def test_the_history_tells_of_failures_and_tries_again(visit: Visit, fake_server: Running) -> None:
    page = visit(fake_server.url)
    with fake_server.holding():
        ask_for(page, "to be given up")
        page.get_by_role("button", name="Cancel", exact=True).click()
        page.get_by_role("tab", name="History").click()
        row = page.locator(".history li").filter(has_text="to be given up")
        expect(row).to_contain_text("cancelled")


def test_ten_thousand_pictures_scroll_with_only_those_in_sight(visit: Visit, server: Callable[..., Running]) -> None:
    here = server()
    draw(here, "the oldest of very many")
    multiply(here, n=10_000)
    page = visit(here.url)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    cells = page.locator(".cell")
    expect(cells.first).to_have_attribute("title", "picture 0")
    most = 0
    page.locator("#gallery-panel").hover()
    for _ in range(30):
        page.mouse.wheel(0, 2000)
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        most = max(most, cells.count())
    expect(page.locator(".cell").first).not_to_have_attribute("title", "picture 0")
    # From here to the end at once.
    cells.nth(cells.count() // 2).focus()
    page.keyboard.press("End")
    oldest = page.locator("[data-index='9999']")
    expect(oldest).to_be_focused()
    expect(oldest).to_have_attribute("title", "the oldest of very many")
    expect(page.locator("[data-index='9990']")).to_have_attribute("title", "picture 9990")
    expect(page.locator(".sheet")).to_have_attribute("aria-label", "10,000 pictures")
    most = max(most, cells.count())
    page.keyboard.press("Home")
    expect(page.locator("[data-index='0']")).to_be_focused()
    assert most < 120
    # Twenty pages of 500, and the first one again now and then; small pictures only of what came by.
    assert sum("/api/outputs?" in url for url in asked) < 40
    assert sum(url.endswith("/thumbnail") for url in asked) < 2000
