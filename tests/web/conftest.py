"""The browser, and the servers that its pages come from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.api.conftest import fake_server, server, starter_server
from tests.web.browser import PATIENCE_MS, WIDE, Faults, browsing, find_chromium

__all__ = ["fake_server", "server", "starter_server"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser of one file of tests."""
    if find_chromium() is None:
        pytest.skip("no Chromium is installed")
    with browsing() as browser:
        yield browser


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """`visit(url, viewport=NARROW, color_scheme="dark")` is the page; its faults fail the test at its end."""
    with contextlib.ExitStack() as stack:
        faults = Faults()

        def go(url: str, **options: Any) -> Page:
            context = chromium.new_context(**{"viewport": WIDE, **options})
            stack.callback(context.close)
            context.set_default_timeout(PATIENCE_MS)
            page = context.new_page()
            faults.watch(page)
            page.goto(url)
            return page

        yield go
    assert faults.told == []
