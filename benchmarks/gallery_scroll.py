"""Whether a gallery of 10 000 pictures scrolls as one of 100 does: frames, long tasks, cells, requests.

    python benchmarks/gallery_scroll.py                    # 100 against 10 000
    python benchmarks/gallery_scroll.py --pictures 100 1000 50000

A real server, whose rows are all written beforehand, and a headless Chromium that turns the wheel through as many
screens of each gallery, then goes to its end with one key. The ratios are what counts; times are this machine's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx2
from playwright.sync_api import Browser, expect

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.api.serving import running
from tests.web.browser import PATIENCE_MS, WIDE, browsing
from tests.web.many import multiply

# Scrolls by half a screen for each frame, there and back, and tells what the frames took.
SCROLL = """async (nFrames) => {
    const panel = document.querySelector("#gallery-panel");
    const took = [];
    let longMs = 0;
    const long = new PerformanceObserver((list) => { for (const one of list.getEntries()) longMs += one.duration; });
    long.observe({entryTypes: ["longtask"]});
    let mostCells = 0;
    let by = panel.clientHeight / 2;
    let last = await new Promise(requestAnimationFrame);
    for (let i = 0; i < nFrames; i += 1) {
        if (panel.scrollTop + panel.clientHeight >= panel.scrollHeight - 1) by = -Math.abs(by);
        if (panel.scrollTop <= 0) by = Math.abs(by);
        panel.scrollBy(0, by);
        const now = await new Promise(requestAnimationFrame);
        took.push(now - last);
        last = now;
        mostCells = Math.max(mostCells, document.querySelectorAll(".cell").length);
    }
    await new Promise((done) => setTimeout(done, 100));
    took.sort((a, b) => a - b);
    const at = (share) => took[Math.min(took.length - 1, Math.floor(share * took.length))];
    return {p50_ms: at(0.5), p95_ms: at(0.95), worst_ms: took.at(-1), long_ms: longMs, cells: mostCells,
        nodes: document.querySelectorAll("*").length};
}"""
TO_END = """async () => {
    const begun = performance.now();
    const cells = document.querySelectorAll(".cell");
    cells[cells.length >> 1].focus();
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "End", bubbles: true}));
    const n = () => document.querySelector(".sheet").getAttribute("aria-label");
    const isThere = () => !n().includes("and more") && document.activeElement.dataset.index > 0
        && Number(document.activeElement.dataset.index) === parseInt(n().replaceAll(",", "")) - 1;
    while (!isThere()) await new Promise(requestAnimationFrame);
    return performance.now() - begun;
}"""


def main() -> None:
    """Print a line for each size, and how much more the largest takes than the smallest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--frames", type=int, default=300)
    asked = parser.parse_args()
    expect.set_options(timeout=PATIENCE_MS)
    print("pictures  frame p50   p95  worst   long tasks  cells  nodes   to the end  pages  thumbnails")
    found = [measure(n, n_frames=asked.frames) for n in asked.pictures]
    for name in ("p50_ms", "p95_ms", "worst_ms", "nodes"):
        print(f"{name}: {found[-1][name] / found[0][name]:.2f} times that of {asked.pictures[0]} pictures")


def measure(n: int, *, n_frames: int) -> dict[str, Any]:
    """One gallery of `n` pictures."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as here, browsing() as browser:
        httpx2.post(f"{here.url}/api/txt2img", json={"prompt": "the oldest"}, timeout=60).raise_for_status()
        multiply(here, n=n)
        found = look(browser, here.url, n_frames=n_frames)
    print(
        f"{n:8}  {found['p50_ms']:6.1f} ms {found['p95_ms']:5.1f} {found['worst_ms']:6.1f}  {found['long_ms']:8.0f} ms"
        f"  {found['cells']:5} {found['nodes']:6}   {found['end_ms']:7.0f} ms  {found['pages']:5}"
        f"  {found['thumbnails']:10}",
        flush=True,
    )
    return found


def look(browser: Browser, url: str, *, n_frames: int) -> dict[str, Any]:
    """What a browser finds."""
    page = browser.new_page(viewport=WIDE)
    page.set_default_timeout(PATIENCE_MS)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    expect(page.locator(".cell img").first).not_to_have_js_property("naturalWidth", 0)
    found: dict[str, Any] = page.evaluate(SCROLL, n_frames)
    found["end_ms"] = page.evaluate(TO_END)
    found["pages"] = sum("/api/outputs?" in one for one in asked)
    found["thumbnails"] = sum(one.endswith("/thumbnail") for one in asked)
    return found


if __name__ == "__main__":
    main()
