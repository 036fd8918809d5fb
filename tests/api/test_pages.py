"""The page's files: what a browser gets, and what it is allowed to do with them."""

from __future__ import annotations

import functools
import gzip
import hashlib
import re
from importlib import resources
from pathlib import Path

import httpx2
import pytest

from tests.api.serving import Running

# A busy machine is slow now and then; that is no failure.
ask = functools.partial(httpx2.request, timeout=60)
WEB = Path(str(resources.files("sdfleet"))) / "web"
AS_BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.mark.parametrize("path", ["/", "/studio", "/dashboard"])
def test_a_browser_gets_a_page_that_runs_nothing_but_its_own_files(fake_server: Running, path: str) -> None:
    answer = ask("GET", fake_server.url + path, headers=AS_BROWSER)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "{" not in answer.text
    for address in re.findall(r'(?:src|href)="([^"]*)"', answer.text):
        assert address.startswith("/static/")
        assert ask("GET", fake_server.url + address).status_code == 200, address


def test_programs_that_look_whether_somebody_is_here_still_get_a_line(fake_server: Running) -> None:
    assert "is running" in ask("GET", fake_server.url).text
    assert ask("GET", fake_server.url, headers={"user-agent": "ollama/0.6"}).text == "Ollama is running"


def test_a_file_is_kept_for_ever_under_its_version_and_asked_for_again_under_another(fake_server: Running) -> None:
    page = ask("GET", f"{fake_server.url}/studio").text
    found = re.search(r'src="(/static/[0-9a-f]{16})/app.js"', page)
    assert found is not None
    answer = ask("GET", f"{fake_server.url}{found[1]}/app.js")
    assert answer.headers["cache-control"].endswith("immutable")
    assert answer.headers["content-type"].startswith("text/javascript")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.content == (WEB / "app.js").read_bytes()
    old = ask("GET", f"{fake_server.url}/static/0000000000000000/app.js")
    assert (old.status_code, old.headers["cache-control"]) == (200, "no-cache")
    etag = {"if-none-match": old.headers["etag"]}
    assert ask("GET", f"{fake_server.url}/static/0000000000000000/app.js", headers=etag).status_code == 304


def test_a_file_travels_packed_where_the_browser_can_read_that(fake_server: Running) -> None:
    address = f"{fake_server.url}/static/x/style.css"
    with httpx2.stream("GET", address, timeout=60, headers={"accept-encoding": "gzip"}) as answer:
        raw = b"".join(answer.iter_raw())
        assert answer.headers["content-encoding"] == "gzip"
    assert gzip.decompress(raw) == (WEB / "style.css").read_bytes()
    assert "content-encoding" not in ask("GET", address, headers={"accept-encoding": "identity"}).headers


@pytest.mark.parametrize(
    "name", ["..%2fapp.py", "vendor%2f..%2f..%2fapp.py", "vendor/README.md", "index.html", "", "vendor", "%00"]
)
def test_nothing_but_the_files_of_the_page_is_given_out(fake_server: Running, name: str) -> None:
    answer = ask("GET", f"{fake_server.url}/static/x/{name}")
    assert answer.status_code == 404
    assert answer.json()["code"] == "not_found"


def test_foreign_files_are_those_that_were_taken_in() -> None:
    for folder in (WEB / "vendor", Path(__file__).parents[1] / "web" / "vendor"):
        lines = (folder / "SHA256SUMS").read_text().splitlines()
        listed = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
        there = {path.name for path in folder.iterdir()} - {"README.md", "SHA256SUMS"}
        assert listed.keys() == there
        for name, digest in listed.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


def test_the_page_asks_nobody_else_for_anything() -> None:
    own = [path for path in WEB.iterdir() if path.suffix in {".js", ".css", ".html"}]
    assert own
    for path in own:
        assert not re.search(r"https?://", path.read_text(encoding="utf-8")), path.name


def test_no_file_of_the_page_is_long() -> None:
    for path in WEB.glob("*.js"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path.name
