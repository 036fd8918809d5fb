"""What the dashboard costs a router: 3 nodes, 200 jobs, several readers of its live events, for some minutes.

    python benchmarks/dashboard.py                          # 2 minutes without and 10 with readers
    python benchmarks/dashboard.py --minutes 2 --readers 1  # a short look

A real router with its broker and real nodes that make up their pictures at once, so that nothing is measured but the
router. First without readers, then with them, it is idle and counts what it takes. Then 200 jobs come, spread over the
time, once while nobody reads and once while they do: the difference is what the dashboard costs. One of the readers is
the page itself in a headless Chromium, where there is one. The share is of one core, of the router alone. Memory of the
router and of the page (after a collection) is told each half minute: it may settle, it must not grow.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.fleet.real_fleet import RealFleet, real_fleet
from tests.web.browser import browsing, find_chromium

TELL_EVERY_S = 30.0
ALONE_S = 120.0


class Meter:
    """The router's process."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)

    def cpu_s(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def memory_mb(self) -> float:
        return float(self._process.memory_info().rss) / 1e6

    def share(self, seconds: float) -> float:
        """Percent of one core over so long from now."""
        begun_s, before_s = time.monotonic(), self.cpu_s()
        time.sleep(seconds)
        return 100 * (self.cpu_s() - before_s) / (time.monotonic() - begun_s)


class Reader(threading.Thread):
    """Somebody who looks at the dashboard: its events, and what a page asks for beside them."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self.n_events = 0
        self.n_bytes = 0
        self.is_done = False

    def run(self) -> None:
        asked_s = 0.0
        with httpx2.Client(base_url=self._url, timeout=60) as client:
            while not self.is_done:
                with client.stream("GET", "/dashboard/events") as events:
                    for line in events.iter_lines():
                        self.n_events += line.startswith("data: ")
                        self.n_bytes += len(line)
                        if self.is_done:
                            return
                        if time.monotonic() - asked_s > TELL_EVERY_S:
                            asked_s = time.monotonic()
                            for path in ("series?window=1h", "traces?limit=60"):
                                httpx2.get(f"{self._url}/dashboard/api/{path}", timeout=60)


@contextlib.contextmanager
def read_by(url: str, n_readers: int) -> Iterator[list[Reader]]:
    readers = [Reader(url) for _ in range(n_readers)]
    for reader in readers:
        reader.start()
    try:
        yield readers
    finally:
        for reader in readers:
            reader.is_done = True


def draw(fleet: RealFleet, n_jobs: int, *, over_s: float = 0.0) -> None:
    begun_s = time.monotonic()

    def one(i: int) -> int:
        time.sleep(max(0.0, begun_s + over_s * i / n_jobs - time.monotonic()))
        body = {"model": "starter", "prompt": f"picture {i}", "steps": 4}
        return httpx2.post(f"{fleet.url}/api/generate-image", json=body, timeout=240).status_code

    with ThreadPoolExecutor(8) as clients:
        codes = list(clients.map(one, range(n_jobs)))
    print(f"{codes.count(200)} of {n_jobs} jobs done", flush=True)


@contextlib.contextmanager
def page_of(url: str) -> Iterator[Callable[[], float]]:
    """The dashboard in a browser; what is yielded tells the megabytes of its scripts' memory. 0 where there is none."""
    if find_chromium() is None:
        yield lambda: 0.0
        return
    with browsing() as browser:
        page = browser.new_page()
        page.goto(f"{url}/dashboard")
        page.wait_for_selector(".node")
        tools = page.context.new_cdp_session(page)
        tools.send("Performance.enable")

        def heap_mb() -> float:
            tools.send("HeapProfiler.collectGarbage")
            told = tools.send("Performance.getMetrics")["metrics"]
            return float(next(one["value"] for one in told if one["name"] == "JSHeapUsedSize")) / 1e6

        yield heap_mb


def watch(fleet: RealFleet, meter: Meter, heap_mb: Callable[[], float], *, seconds: float, n_jobs: int) -> float:
    """Percent of one core while the jobs come, over all the time."""
    begun_s, before_s = time.monotonic(), meter.cpu_s()
    at_work = threading.Thread(target=draw, args=(fleet, n_jobs), kwargs={"over_s": 0.9 * seconds})
    at_work.start()
    while (left_s := begun_s + seconds - time.monotonic()) > 0:
        share = meter.share(min(TELL_EVERY_S, max(1.0, left_s)))
        print(f"{share:5.1f} % of one core, router {meter.memory_mb():6.1f} MB, page {heap_mb():5.2f} MB", flush=True)
    at_work.join()
    return 100 * (meter.cpu_s() - before_s) / (time.monotonic() - begun_s)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--minutes", type=float, default=10.0)
    asked.add_argument("--readers", type=int, default=3)
    asked.add_argument("--nodes", type=int, default=3)
    asked.add_argument("--jobs", type=int, default=200)
    told = asked.parse_args()
    window_s = min(30.0, told.minutes * 60 / 4)
    with tempfile.TemporaryDirectory(prefix="sdfleet-dashboard-") as folder, real_fleet(Path(folder)) as fleet:
        for i in range(told.nodes):
            fleet.add_node(f"node-{i}", SD_BACKEND="fake")
        fleet.wait_for_nodes()
        assert fleet.router.process is not None
        meter = Meter(fleet.router.process.pid)
        draw(fleet, told.jobs)
        alone = meter.share(window_s)
        print(f"nobody reads: {alone:.1f} % of one core")
        with read_by(fleet.url, told.readers) as readers:
            time.sleep(2)
            read = meter.share(window_s)
            print(f"{told.readers} read: {read:.1f} % of one core, {read - alone:.1f} % for them")
        seconds = told.minutes * 60
        # The same jobs a minute, for as long as a share needs.
        alone_s = min(seconds, ALONE_S)
        n_alone = round(told.jobs * alone_s / seconds)
        without = watch(fleet, meter, lambda: 0.0, seconds=alone_s, n_jobs=n_alone)
        with read_by(fleet.url, told.readers - 1) as readers, page_of(fleet.url) as heap_mb:
            share = watch(fleet, meter, heap_mb, seconds=seconds, n_jobs=told.jobs)
            print(f"at work: {without:.1f} % with nobody, {share:.1f} % read")
            print(f"for {told.readers} readers: {share - without:.1f} % of one core")
            n_events, n_bytes = (sum(getattr(one, name) for one in readers) for name in ("n_events", "n_bytes"))
            print(f"{n_events} events, {n_bytes / max(1, n_events):.0f} bytes each")


if __name__ == "__main__":
    main()
