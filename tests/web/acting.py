"""What people do in the studio, in the words of its tests."""

from __future__ import annotations

import functools
from typing import Any

import httpx2
from playwright.sync_api import Page

from sdfleet.storage.pictures import decode
from tests.api.serving import Running

# A busy machine is slow now and then; that is no failure.
ask = functools.partial(httpx2.request, timeout=60)


def ask_for(page: Page, prompt: str) -> None:
    """Ask for a picture."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Generate", exact=True).click()


def finished(page: Page) -> Any:
    """The picture on the stage."""
    return page.locator("img.finished")


def draw(here: Running, prompt: str, **more: Any) -> dict[str, Any]:
    """A picture that somebody else asked for; what the server answered."""
    answer = ask("POST", f"{here.url}/api/txt2img", json={"prompt": prompt, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def last_job(here: Running) -> dict[str, Any]:
    """The newest job, whole."""
    # A list of jobs is without their input pictures, and so without what these make of a job.
    found: dict[str, Any] = ask("GET", f"{here.url}/api/jobs/{jobs_of(here)[0]['id']}").json()
    return found


def jobs_of(here: Running) -> list[dict[str, Any]]:
    """The newest jobs, without their input pictures."""
    found: list[dict[str, Any]] = ask("GET", f"{here.url}/api/jobs").json()["jobs"]
    return found


def pixels(data: bytes) -> bytes:
    """The values of a file's pixels."""
    return decode(data).data
