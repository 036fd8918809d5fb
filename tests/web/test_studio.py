"""What a person does in the studio, done in a real browser against the real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.api.serving import Running, running
from tests.catalog.conftest import online
from tests.catalog.hub_server import serving
from tests.catalog.hubs import toy_hub
from tests.web.acting import ask, ask_for, draw, finished, jobs_of, pixels
from tests.web.browser import NARROW, PATIENCE_MS, WIDE, serious

__all__ = ["online"]

Visit = Callable[..., Page]

expect.set_options(timeout=PATIENCE_MS)

# ------------------------------------------------------------------------------------------------------ making pictures


def test_a_prompt_becomes_a_picture_that_the_gallery_has(visit: Visit, starter_server: Running) -> None:
    page = visit(starter_server.url)
    page.get_by_label("Prompt", exact=True).fill("a red circle on a blue background")
    expect(page.locator(".tokens").first).to_contain_text("7/75 tokens")
    page.keyboard.press("Control+Enter")
    picture = finished(page)
    expect(picture).to_be_visible()
    expect(picture).to_have_js_property("naturalWidth", 128)
    expect(page.locator(".cell img").first).to_have_attribute("alt", "a red circle on a blue background")
    expect(page.locator(".cell img").first).not_to_have_js_property("naturalWidth", 0)
    expect(page.locator(".facts-list")).to_contain_text("Seed")


def test_previews_and_steps_are_seen_while_it_is_drawn(visit: Visit, starter_server: Running) -> None:
    page = visit(starter_server.url)
    page.get_by_label("Steps", exact=True).fill("400")
    ask_for(page, "a green triangle")
    expect(page.get_by_test_id("standing")).to_contain_text("of 400, about")
    expect(page.locator("img.preview")).to_be_visible()
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.get_by_test_id("standing")).to_have_count(0)
    assert jobs_of(starter_server)[0]["state"] == "cancelled"


def test_a_changed_setting_is_the_one_that_is_drawn_with(visit: Visit, fake_server: Running) -> None:
    page = visit(fake_server.url)
    page.get_by_role("button", name="3:2").click()
    page.get_by_label("Steps", exact=True).fill("7")
    page.get_by_label("Guidance", exact=True).fill("4.5")
    page.get_by_label("Sampler").select_option("euler_a")
    page.get_by_label("Seed", exact=True).fill("18446744073709551615")
    page.get_by_label("Negative prompt").fill("blur")
    ask_for(page, "every setting")
    expect(finished(page)).to_be_visible()
    job = jobs_of(fake_server)[0]
    made = {name: job[name] for name in ("steps", "guidance", "sampler", "seed", "negative_prompt", "width", "height")}
    assert made == {
        "steps": 7, "guidance": 4.5, "sampler": "euler_a", "seed": 2**64 - 1, "negative_prompt": "blur",
        "width": 160, "height": 104,
    }  # fmt: skip
    # A seed that was typed is kept, to the last digit.
    expect(page.get_by_label("Seed", exact=True)).to_have_value("18446744073709551615")


def test_a_number_that_is_being_typed_stays_while_the_page_hears_of_jobs(visit: Visit, fake_server: Running) -> None:
    page = visit(fake_server.url)
    with fake_server.holding() as gate:
        ask_for(page, "draws while somebody types")
        gate.wait_for_job()
        page.get_by_label("Guidance", exact=True).focus()
        page.keyboard.press("Control+A")
        page.keyboard.type("4.")
        gate.let(2)
        expect(page.get_by_test_id("standing")).to_contain_text("Step 2 of")
        page.keyboard.type("5")
        expect(page.get_by_label("Guidance", exact=True)).to_have_value("4.5")
        gate.let()


def test_several_requests_are_under_way_at_once_and_each_can_be_cancelled(visit: Visit, fake_server: Running) -> None:
    page = visit(fake_server.url)
    with fake_server.holding() as gate:
        for prompt in ("one of three", "two of three", "three of three"):
            ask_for(page, prompt)
            expect(page.locator(".prompt-line")).to_have_text(prompt)
        expect(page.locator(".queue li")).to_have_count(3)
        page.get_by_role("button", name="Cancel: two of three").click()
        expect(page.locator(".queue li")).to_have_count(2)
        gate.let()
        expect(page.locator(".queue li")).to_have_count(0)
    states = {job["prompt"]: job["state"] for job in jobs_of(fake_server)[:3]}
    assert states == {"one of three": "done", "two of three": "cancelled", "three of three": "done"}


def test_a_request_that_waits_says_how_many_are_before_it(visit: Visit, server: Callable[..., Running]) -> None:
    here = server(max_pictures=1)
    page = visit(here.url)
    with here.holding() as gate:
        ask_for(page, "is being drawn")
        gate.wait_for_job()
        for prompt, place in (("the first to wait", "Next in line"), ("the second to wait", "1 waiting job before it")):
            ask_for(page, prompt)
            expect(page.locator(".queue li").filter(has_text=prompt)).to_contain_text(place)
        gate.let()
        expect(page.locator(".queue li")).to_have_count(0)


def test_a_reload_during_a_job_finds_it_going_on(visit: Visit, fake_server: Running) -> None:
    page = visit(fake_server.url)
    with fake_server.holding() as gate:
        ask_for(page, "outlives a reload")
        gate.wait_for_job()
        gate.let(2)
        expect(page.get_by_test_id("standing")).to_contain_text("Step 2 of")
        page.reload()
        expect(page.get_by_label("Prompt", exact=True)).to_have_value("outlives a reload")
        page.locator(".queue-open").click()
        expect(page.get_by_test_id("standing")).to_contain_text("Step 2 of")
        gate.let()
        expect(finished(page)).to_be_visible()


def test_a_server_that_was_lost_is_said_and_found_again(visit: Visit, tmp_path: Path) -> None:
    with running(tmp_path / "home") as here:
        port = int(here.url.rpartition(":")[2])
        page = visit(here.url)
        expect(page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()
    expect(page.get_by_text("The server does not answer. Trying again")).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill("asked for while it was away")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator(".form-foot .fault")).to_contain_text("does not answer")
    with running(tmp_path / "home", listen_on=port) as here:
        expect(page.get_by_text("Trying again; nothing")).to_have_count(0)
        page.locator(".form-foot").get_by_role("button", name="Try again").click()
        expect(finished(page)).to_be_visible()
        assert [job["prompt"] for job in jobs_of(here)] == ["asked for while it was away"]


def test_a_fault_is_told_beside_its_field_and_goes_when_that_is_changed(visit: Visit, fake_server: Running) -> None:
    page = visit(fake_server.url)
    page.get_by_label("Width in pixels").fill("500")
    page.get_by_label("Width in pixels").press("Tab")
    ask_for(page, "an odd size")
    told = page.locator("#size-told")
    expect(told).to_contain_text("500 px is not a multiple of 8: use 496 or 504")
    page.get_by_role("button", name="1:1").click()
    expect(told).not_to_contain_text("500")
    page.get_by_label("Prompt", exact=True).fill(" ")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.get_by_text("Say what the picture should show.")).to_be_visible()


def test_what_a_model_ignores_is_off_and_says_why(visit: Visit, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    card = 'name = "plain"\nfamily = "sd"\ntitle = "Plain"\nwidth_px = 64\nheight_px = 64\nsteps = 4\nguidance = 0.0\n'
    card += 'sampler = "lcm"\nignores = ["negative_prompt", "guidance", "mask"]\n'
    (models / "plain.toml").write_text(card + f'folder = "{tmp_path}"\n')
    with running(tmp_path / "home", model_dir=models) as here:
        page = visit(here.url)
        expect(page.get_by_label("Negative prompt")).to_be_enabled()
        page.get_by_label("Model", exact=True).select_option("plain")
        expect(page.get_by_label("Negative prompt")).to_be_disabled()
        expect(page.get_by_text("Plain draws without a negative prompt.")).to_be_visible()
        expect(page.get_by_label("Guidance", exact=True)).to_be_disabled()
        expect(page.get_by_label("Steps", exact=True)).to_have_value("4")


# --------------------------------------------------------------------------------------------------------------- models


def test_a_model_is_downloaded_after_its_plan_got_a_yes(visit: Visit, online: None, tmp_path: Path) -> None:  # noqa: ARG001 - sets the stage
    models = tmp_path / "models"
    models.mkdir()
    (models / "toy.toml").write_text(
        'name = "toy"\nfamily = "sd"\ntitle = "Toy"\nhf = "Maker/Toy-1"\nlicence = "Toy Licence"\n'
        'width_px = 64\nheight_px = 64\nsteps = 4\nguidance = 2.0\nsampler = "ddim"\n'
    )
    with (
        serving(toy_hub(tmp_path / "published")) as hub,
        running(tmp_path / "home", model_dir=models, hf_endpoint=hub.url) as here,
    ):
        page = visit(here.url)
        page.get_by_label("Model", exact=True).select_option("toy")
        dialog = page.get_by_role("dialog", name="Download toy")
        expect(dialog).to_contain_text("Toy Licence")
        assert hub.asked_for("resolve") == []
        dialog.get_by_role("button", name="Yes, download").click()
        expect(page.get_by_text("toy is here.")).to_be_visible()
        expect(page.get_by_label("Model", exact=True)).to_have_value("toy")
        ask_for(page, "drawn with it")
        expect(finished(page)).to_be_visible()
        assert jobs_of(here)[0]["model"] == "toy"


# ----------------------------------------------------------------------------------------------------------------- keys


def test_with_a_key_one_signs_in_and_the_key_stays_nowhere(visit: Visit, server: Callable[..., Running]) -> None:
    here = server(api_key="a secret of many words")
    page = visit(here.url)
    expect(page.get_by_role("heading", name="This server wants a key")).to_be_visible()
    page.get_by_label("Key", exact=True).fill("a guess")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("the key is not known here")
    page.get_by_label("Key", exact=True).fill("a secret of many words")
    page.get_by_role("button", name="Sign in").click()
    ask_for(page, "behind a key")
    expect(finished(page)).to_be_visible()
    expect(finished(page)).not_to_have_js_property("naturalWidth", 0)
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    kept = page.evaluate(
        "() => JSON.stringify({...localStorage}) + JSON.stringify({...sessionStorage}) + location.href"
    )
    assert "secret of" not in kept + cookie["value"]
    page.reload()
    expect(page.locator(".cell")).to_have_count(1)
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="This server wants a key")).to_be_visible()


def test_a_key_that_may_only_look_makes_no_pictures(visit: Visit, server: Callable[..., Running]) -> None:
    here = server()
    _, secret = here.call(here.house.keys.create("viewer", scopes=("read",)))
    page = visit(here.url)
    expect(page.get_by_role("heading", name="This server wants a key")).to_be_visible()
    page.get_by_label("Key", exact=True).fill(secret)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("Your key may look, but not make pictures.")).to_be_visible()
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_disabled()


# --------------------------------------------------------------------------------------------------------------- others


@pytest.mark.parametrize("kind", ["curl", "Python", "JSON"])
def test_the_request_can_be_taken_along_as_code_that_works(
    visit: Visit, fake_server: Running, kind: str, tmp_path: Path
) -> None:
    page = visit(fake_server.url)
    page.get_by_label("Prompt", exact=True).fill('it\'s "quoted" \\ and $HOME')
    page.get_by_label("Seed", exact=True).fill("5")
    page.get_by_role("button", name="Copy as curl, Python or JSON").click()
    page.get_by_role("button", name=kind, exact=True).click()
    code = page.locator("pre.code").inner_text()
    match kind:
        case "curl":
            subprocess.run(["bash", "-c", code], cwd=tmp_path, check=True, capture_output=True)
        case "Python":
            subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
        case _:
            answer = ask(
                "POST",
                f"{fake_server.url}/api/txt2img",
                json=json.loads(code),
                headers={"Accept": "image/png"},
                timeout=60,
            )
            (tmp_path / "picture.png").write_bytes(answer.content)
    assert pixels((tmp_path / "picture.png").read_bytes())
    job = jobs_of(fake_server)[0]
    assert (job["prompt"], job["seed"]) == ('it\'s "quoted" \\ and $HOME', 5)


@pytest.mark.parametrize("kind", ["curl", "Python"])
def test_code_with_a_picture_is_copied_whole_and_takes_the_key_from_its_variable(
    visit: Visit, server: Callable[..., Running], kind: str, tmp_path: Path
) -> None:
    here = server(api_key="a secret of many words")
    headers = {"Authorization": "Bearer a secret of many words"}
    ask("POST", f"{here.url}/api/txt2img", json={"prompt": "the first"}, headers=headers).raise_for_status()
    page = visit(here.url, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_label("Key", exact=True).fill("a secret of many words")
    page.get_by_role("button", name="Sign in").click()
    page.locator(".cell").first.click()
    page.get_by_role("button", name="Use as input").click()
    expect(page.locator(".input-picture img")).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill("another 'one'")
    page.locator(".form-foot").get_by_role("button", name="Copy as curl, Python or JSON").click()
    page.get_by_role("button", name=kind, exact=True).click()
    expect(page.get_by_text("shortened here and copied whole")).to_be_visible()
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_text(f"Copied as {kind}.")).to_be_visible()
    code = page.evaluate("navigator.clipboard.readText()")
    assert "secret" not in code
    command = ["bash", "-c", code] if kind == "curl" else [sys.executable, "-c", code]
    with_key = {**os.environ, "SD_API_KEY": "a secret of many words"}  # noqa: TID251 - set for a child
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=with_key)
    assert pixels((tmp_path / "picture.png").read_bytes())
    job = ask("GET", f"{here.url}/api/jobs", headers=headers).json()["jobs"][0]
    assert job["prompt"] == "another 'one'"


def test_on_a_phone_nothing_is_wider_than_the_screen(visit: Visit, fake_server: Running) -> None:
    draw(fake_server, "seen on a phone, with a prompt that is a good deal longer than any phone is wide")
    page = visit(fake_server.url, viewport=NARROW, has_touch=True)
    page.locator(".cell").first.click()
    expect(finished(page)).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= NARROW["width"]


def test_the_page_is_used_with_the_keyboard_alone(visit: Visit, fake_server: Running) -> None:
    for prompt in ("older", "newer"):
        draw(fake_server, prompt)
    page = visit(fake_server.url)
    expect(page.locator(".cell").first).to_be_visible()
    page.locator(".cell").first.focus()
    page.keyboard.press("Enter")
    expect(finished(page)).to_have_attribute("alt", "newer")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(finished(page)).to_have_attribute("alt", "older")
    page.locator("#main").focus()
    page.keyboard.press("ArrowLeft")
    expect(finished(page)).to_have_attribute("alt", "newer")


def test_the_first_load_is_small(visit: Visit, fake_server: Running) -> None:
    page = visit(fake_server.url)
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()
    sizes = page.evaluate(
        """() => performance.getEntriesByType("resource").concat(performance.getEntriesByType("navigation"))
            .map((entry) => [entry.name, entry.transferSize])"""
    )
    assert sum(size for _, size in sizes) < 150_000, sizes


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_no_view_keeps_anybody_out(visit: Visit, fake_server: Running, scheme: str, viewport: dict[str, int]) -> None:
    for prompt in ("looked at by a checker", "another one"):
        draw(fake_server, prompt, negative_prompt="blur")
    page = visit(fake_server.url, color_scheme=scheme, viewport=viewport)
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()
    found = {"empty": serious(page)}
    page.locator(".cell").first.click()
    expect(page.locator(".facts-list")).to_contain_text("Seed")
    found["picture"] = serious(page)
    page.get_by_role("button", name="Redraw a part").click()
    expect(page.locator(".mask-board canvas")).to_be_visible()
    found["mask"] = serious(page)
    page.get_by_role("button", name="Keep the mask").click()
    found["input"] = serious(page)
    page.get_by_role("button", name="Copy as curl, Python or JSON").first.click()
    expect(page.locator("pre.code")).to_be_visible()
    found["code"] = serious(page)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="More models").click()
    expect(page.locator(".model-row").first).to_be_visible()
    found["models"] = serious(page)
    page.locator(".model-row", has_text="sd15").get_by_role("button", name="Download").click()
    pull = page.get_by_role("dialog", name="Download sd15")
    expect(pull.locator(".fault, .facts-list").first).to_be_visible()
    found["pull"] = serious(page)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Compare with another picture").click()
    page.locator(".cell").nth(1).click()
    expect(page.get_by_role("dialog", name="Compare").locator("dd").last).to_be_visible()
    found["compare"] = serious(page)
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="History").click()
    expect(page.locator(".history li").first).to_be_visible()
    found["history"] = serious(page)
    page.get_by_label("Search requests").fill("nothing has these words")
    expect(page.get_by_text("Nothing found.")).to_be_visible()
    found["nothing"] = serious(page)
    with fake_server.holding():
        ask_for(page, "being drawn")
        expect(page.get_by_test_id("standing")).to_be_visible()
        found["drawing"] = serious(page)
        page.get_by_role("button", name="Cancel", exact=True).click()
        expect(page.get_by_test_id("standing")).to_have_count(0)
    assert {view: faults for view, faults in found.items() if faults} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_sign_in_keeps_nobody_out(
    visit: Visit, server: Callable[..., Running], scheme: str, viewport: dict[str, int]
) -> None:
    page = visit(server(api_key="a secret of many words").url, color_scheme=scheme, viewport=viewport)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= viewport["width"]
    expect(page.get_by_label("Key", exact=True)).to_be_focused()
    assert serious(page) == []
