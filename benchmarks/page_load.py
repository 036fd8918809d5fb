"""What the first visit of the page costs: bytes over the wire, requests, and the time until Generate can be pressed.

    python benchmarks/page_load.py                # each page five times, with nothing in the browser's cache

A real server on this machine's loopback, and a headless Chromium. The target is 150 kB and one second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, expect

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.api.serving import running
from tests.web.browser import PATIENCE_MS, WIDE, browsing

# Resolves when what the selector names is there and can be used.
READY = """async (selector) => {
    while (!document.querySelector(selector)) await new Promise(requestAnimationFrame);
    const took_ms = performance.now();
    const files = [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")];
    return {took_ms, n_bytes: files.reduce((sum, file) => sum + file.transferSize, 0), n_files: files.length};
}"""
READY_WHEN = {"/studio": "button[type=submit].primary:not(:disabled)", "/dashboard": ".node"}


def main() -> None:
    """Print a line for each page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    asked = parser.parse_args()
    expect.set_options(timeout=PATIENCE_MS)
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as here, browsing() as browser:
        for path, selector in READY_WHEN.items():
            found = [visit(browser, here.url + path, selector) for _ in range(asked.times)]
            took_ms = sorted(one["took_ms"] for one in found)
            print(
                f"{path:11} {found[0]['n_bytes'] / 1000:6.1f} kB in {found[0]['n_files']} requests, ready after "
                f"{statistics.median(took_ms):.0f} ms ({took_ms[0]:.0f} to {took_ms[-1]:.0f})"
            )


def visit(browser: Browser, url: str, selector: str) -> dict[str, Any]:
    """One first visit."""
    context = browser.new_context(viewport=WIDE)
    page = context.new_page()
    page.goto(url, wait_until="commit")
    found: dict[str, Any] = page.evaluate(READY, selector)
    context.close()
    return found


if __name__ == "__main__":
    main()
