"""What a router and a node add to each token of a streamed answer, with real processes and a real broker.

    python benchmarks/language_overhead.py [--streams 1 50 500] [--tokens 100] [--every 0.02] [--repeats 3]

A server streams the time at which it sends each token. The same reader asks it directly, through one machine
(`sdfleet serve`), and through a router with two nodes; told is how late tokens were read, in milliseconds. The runs
alternate. All share this machine's cores: with many streams that is what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2

from tests.api.serving import running
from tests.fleet.real_fleet import RealFleet, real_fleet
from tests.language.readers import read_many
from tests.language.streaming_upstream import streaming_upstream


def main() -> None:
    args = _arguments()
    with (
        streaming_upstream() as direct,
        tempfile.TemporaryDirectory() as folder,
        _fleet(Path(folder), direct) as fleet,
        running(Path(folder) / "machine", language_urls=direct) as machine,
    ):
        _wait(machine.url)
        urls = {"direct": direct, "machine": machine.url, "router": fleet.url}
        print("streams  way      p50 ms   p95 ms   p99 ms  p50 above direct  whole")
        for n_streams in args.streams:
            _measure(urls, n_streams, args)


def _measure(urls: dict[str, str], n_streams: int, args: argparse.Namespace) -> None:
    late: dict[str, list[float]] = {way: [] for way in urls}
    n_whole = dict.fromkeys(urls, 0)
    for _ in range(args.repeats):
        for way, url in urls.items():
            found = asyncio.run(read_many(url, n_streams, n_tokens=args.tokens, every_s=args.every))
            n_whole[way] += sum(one.is_whole and len(one.numbers) == args.tokens for one in found)
            # The first tokens of all streams come at once, which no user's do.
            late[way] += [ms for one in found for ms in one.late_ms[5:]]
    direct = statistics.median(late["direct"])
    for way, values in late.items():
        cuts = statistics.quantiles(values, n=100)
        p50, p95, p99 = cuts[49], cuts[94], cuts[98]
        whole = f"{n_whole[way]}/{n_streams * args.repeats}"
        print(f"{n_streams:7d}  {way:8s} {p50:7.2f}  {p95:7.2f}  {p99:7.2f}  {p50 - direct:16.2f}  {whole}")


@contextlib.contextmanager
def _fleet(folder: Path, upstream: str) -> Iterator[RealFleet]:
    with real_fleet(folder) as fleet:
        for name in ("n1", "n2"):
            fleet.add_node(name, SD_BACKEND="fake", SD_LANGUAGE_URLS=upstream)
        fleet.wait_for_nodes()
        _wait(fleet.url)
        yield fleet


def _wait(url: str) -> None:
    while not any(one["id"] == "clock" for one in httpx2.get(f"{url}/v1/models").json()["data"]):
        pass


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 50, 500])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--every", type=float, default=0.02)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
