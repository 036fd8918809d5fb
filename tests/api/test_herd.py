"""The commands of Ollama Herd's page, word for word, against a server on its port."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
import tomli_w
from PIL import Image

from sdfleet.catalog.store import Catalog
from tests.api.serving import Running


def run_command(command: str, folder: Path, here: Running) -> str:
    """The command's output, with the port of the server under test."""
    port = here.url.rpartition(":")[2]
    text = command.replace("localhost:11435", f"localhost:{port}").replace("python3", shlex.quote(sys.executable))
    done = subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_image_commands_of_the_page_work_word_for_word(server: Callable[..., Running], tmp_path: Path) -> None:
    here = server()
    # The page's models are not here; cards of these names point at the built-in weights.
    for name in ("sd3-medium", "sd3.5-large"):
        import_as(here.house.settings.models_folder, name)
    image_commands(here, tmp_path)


def image_commands(here: Running, tmp_path: Path) -> None:
    """Those of the page that draw, and that look at what was drawn."""
    run_command(
        'curl -o a.png http://localhost:11435/api/generate-image -H "Content-Type: application/json" '
        "-d '{\"model\":\"sd3-medium\",\"prompt\":\"a city at dusk\",\"width\":1024,\"height\":1024,\"steps\":20}'",
        tmp_path, here,
    )  # fmt: skip
    run_command(
        'curl -o b.png http://localhost:11435/api/generate-image -H "Content-Type: application/json" '
        "-d '{\"model\":\"sd3.5-large\",\"prompt\":\"an oil portrait\",\"width\":1024,\"height\":1024,\"steps\":30}'",
        tmp_path, here,
    )  # fmt: skip
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (1024, 1024)
    stats = json.loads(
        run_command("curl -s http://localhost:11435/dashboard/api/image-stats | python3 -m json.tool", tmp_path, here)
    )
    assert (stats["total"], stats["completed"], stats["failed"]) == (2, 2, 0)
    status = run_command(
        """curl -s http://localhost:11435/fleet/status | python3 -c "import sys,json
for n in json.load(sys.stdin).get('nodes', []):
    img = n.get('image', {})
    if img: print(n['node_id'], [m['name'] for m in img.get('models_available', [])])" """,
        tmp_path, here,
    )  # fmt: skip
    assert "sd3-medium" in status


def import_as(models: Path, name: str) -> None:
    """A card of this name for the built-in weights, in a folder of models."""
    starter = Catalog(models).resolve("starter")
    text = starter.card.model_copy(update={"name": name, "aliases": (), "folder": str(starter.folder)})
    models.mkdir(parents=True, exist_ok=True)
    facts = text.model_dump(mode="json", exclude_none=True)
    (models / f"{name}.toml").write_text(tomli_w.dumps(facts), encoding="utf-8")


def test_the_answer_is_a_png_with_the_facts_in_its_headers(fake_server: Running) -> None:
    answer = httpx2.post(
        f"{fake_server.url}/api/generate-image",
        json={"model": "starter:latest", "prompt": "x", "seed": 4, "steps": 2},
        headers={"X-Herd-Tags": "a, b"},
    )
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).format == "PNG"
    assert answer.headers["x-seed"] == "4"
    assert answer.headers["x-fleet-model"] == "starter"
    assert answer.headers["x-fleet-requested-model"] == "starter:latest"
    assert answer.headers["x-fleet-fallback"] == "false"
    for name in ("x-fleet-node", "x-fleet-retries", "x-generation-time", "x-queue-time", "x-job-id"):
        assert answer.headers[name]


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"prompt": "x"}, 400, "model is required"),
        ({"model": "starter"}, 400, "prompt is required"),
        ({"model": "nope", "prompt": "x"}, 404, "not available"),
        ({"model": "x/nope", "prompt": "x"}, 404, "not available"),
        ({"model": "starter", "prompt": "x", "width": 7}, 400, "width"),
    ],
)
def test_faults_are_the_ones_herds_clients_know(
    fake_server: Running, body: dict[str, object], status: int, text: str
) -> None:
    answer = httpx2.post(f"{fake_server.url}/api/generate-image", json=body)
    assert answer.status_code == status
    assert text in answer.json()["error"]


def test_malformed_json_is_a_clear_400(fake_server: Running) -> None:
    answer = httpx2.post(f"{fake_server.url}/api/generate-image", content="{")
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_a_request_with_line_breaks_in_its_model_splits_no_header(fake_server: Running) -> None:
    answer = httpx2.post(f"{fake_server.url}/api/generate-image", json={"model": "starter\r\nX-Evil: 1", "prompt": "x"})
    assert answer.status_code == 404
    assert "x-evil" not in answer.headers


def test_the_queue_and_the_fleet_count_this_machine(fake_server: Running) -> None:
    httpx2.post(f"{fake_server.url}/api/generate-image", json={"model": "starter", "prompt": "x", "steps": 1})
    status = httpx2.get(f"{fake_server.url}/fleet/status").json()
    assert status["fleet"]["nodes_online"] == 1
    queue = next(iter(status["queues"].values()))
    assert queue["request_type"] == "image"
    assert queue["completed"] >= 1
    queued = httpx2.get(f"{fake_server.url}/fleet/queue").json()
    assert queued["pending"] == 0
    assert queued["estimated_wait_ms"] is not None
