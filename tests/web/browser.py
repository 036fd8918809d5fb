"""A real browser for tests: headless Chromium as the system has it, in which every fault of a page fails the test."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Error, Page, ViewportSize, sync_playwright

AXE = Path(__file__).parent / "vendor" / "axe.js"
WIDE: ViewportSize = {"width": 1400, "height": 900}
NARROW: ViewportSize = {"width": 390, "height": 844}
# Longer than anything a test waits for; reached only where something hangs.
PATIENCE_MS = 60_000


def find_chromium() -> str | None:
    """Where the system's Chromium or Chrome is."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    """A browser. While it is open this thread runs an event loop of playwright's, so close it in time."""
    chromium = find_chromium()
    assert chromium is not None
    with sync_playwright() as play:
        # A container's root may not make sandboxes, and its /dev/shm is small.
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = play.chromium.launch(executable_path=chromium, args=options)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Faults:
    """What went wrong inside pages: errors of their scripts, and what their policy refused."""

    # No slots: playwright hangs something of its own on whoever listens.

    told: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        """Note this page's faults from now on."""
        page.on("pageerror", self._on_error)
        page.on("console", self._on_console)

    def _on_error(self, error: Error) -> None:
        self.told.append(f"error: {error}\n{error.stack or ''}")

    def _on_console(self, message: ConsoleMessage) -> None:
        # The browser's own word for every answer that is no 200; what the page makes of those is what tests look at.
        is_answer = message.text.startswith("Failed to load resource")
        if message.type == "error" and not is_answer:
            self.told.append(f"console: {message.text}")


def serious(page: Page) -> list[str]:
    """What axe-core finds on the page as it stands that keeps somebody from using it."""
    # Not add_script_tag: the page's own policy would refuse it.
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found: dict[str, Any] = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{fault['id']} ({fault['impact']}): {fault['help']}: {node['html'][:200]}: {node['failureSummary'][:300]}"
        for fault in found["violations"]
        if fault["impact"] in {"serious", "critical"}
        for node in fault["nodes"]
    ]
