"""Toy checkpoints of every family through their whole life on a real server, from import to removal."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import httpx2
import psutil
import pytest

from sdfleet import compose
from sdfleet.backends.local import LocalBackend
from sdfleet.settings import load_settings
from sdfleet.storage import pictures
from tests import single_files, tiny
from tests.api.pixels import picture_file
from tests.api.serving import Running, running
from tests.engine.test_single_files import write_gguf

pytestmark = pytest.mark.slow

FAMILY_OF = {
    "sd15": "sd", "sd21": "sd", "sdxl": "sdxl", "sdxl-refiner": "sdxl", "sd3": "sd3", "sd3-no-t5": "sd3", "sd35": "sd3",
    "flux-dev": "flux", "flux-schnell": "flux", "klein": "flux2", "klein-base": "flux2", "zimage": "zimage",
}  # fmt: skip
# FLUX.2 and Z-Image have no layout of single files yet.
IN_ONE_FILE = [kind for kind in FAMILY_OF if kind in single_files.BUILDERS]
LIVES = [
    *((kind, "folder") for kind in FAMILY_OF),
    *((kind, "safetensors") for kind in IN_ONE_FILE),
    ("flux-dev", "gguf"),
    ("sd15", "gguf"),
]
MIB = 2**20
Weights = Callable[[str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Iterator[Running]:
    """One engine that draws with torch and lets nothing go by itself; `anchor` keeps it up, as its start takes long."""
    given: dict[str, Any] = {"backend": "local", "engines": 1, "device": "cpu", "dtype": "float32", "executor": "torch"}
    with running(tmp_path_factory.mktemp("lives"), keep_alive=-1, model="absent", **given) as here:
        path = weights("sd15", "safetensors")[1]
        imported(here, path, name="anchor", base=path)
        asked(here, "POST", "/api/models/anchor/pin")
        yield here


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """(what is imported, the folder that has what it lacks) of a toy; read them only."""
    root = tmp_path_factory.mktemp("weights")

    def written(kind: str, form: str) -> tuple[Path, Path]:
        if form == "folder":
            folder = root / "tiny" / kind
            return (folder if folder.exists() else tiny.write(kind, root / "tiny")), folder
        folder, file = single_files.write(kind, root)
        if form == "safetensors":
            return file, folder
        packed = root / f"{kind}.gguf"
        return (packed if packed.exists() else write_gguf(file, packed, "Q8_0")), folder

    return written


def imported(server: Running, path: Path, *, name: str, base: Path) -> None:
    """As another process of this machine does it: the server is not told."""
    settings = load_settings(home=server.house.settings.home)
    compose.import_checkpoint(settings, path, name=name, base=str(base) if path.is_file() else None, prediction=None)


def asked(server: Running, method: str, path: str, **body: Any) -> Any:
    answer = httpx2.request(method, f"{server.url}{path}", json=body or None, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json() if answer.content else None


def models(server: Running) -> dict[str, dict[str, Any]]:
    return {model["name"]: model for model in asked(server, "GET", "/api/models")["models"]}


def in_memory(server: Running) -> set[str]:
    return {name for name, model in models(server).items() if model["loaded"]}


def drawn(server: Running, name: str, *, kind: str, seed: int = 7, steps: int = 2) -> bytes:
    """The pixels of a picture; a refiner is given one to refine."""
    if kind == "sdxl-refiner":
        image = base64.b64encode(picture_file()).decode()
        body = {"prompt": "a cat", "model": name, "seed": seed, "steps": 4, "width": 64, "height": 64, "image": image}
        answer = asked(server, "POST", "/api/img2img", **body)["images"][0]
    else:
        body = {"prompt": "a cat", "model": name, "seed": seed, "steps": steps, "size": "64x64"}
        answer = asked(server, "POST", "/v1/images/generations", **body, response_format="b64_json")["data"][0]
    return pictures.decode(base64.b64decode(answer["b64_json"])).data


def engine_pid(server: Running) -> int | None:
    backend = server.house.runtime._backend
    assert isinstance(backend, LocalBackend)
    return backend.pid


@pytest.mark.parametrize(("kind", "form"), LIVES, ids=[f"{kind}-{form}" for kind, form in LIVES])
def test_a_checkpoint_of_each_kind_lives_from_import_to_removal(
    server: Running, weights: Weights, kind: str, form: str
) -> None:
    path, base = weights(kind, form)
    before = {file: file.stat().st_mtime_ns for file in base.rglob("*") if file.is_file()}
    name = f"{kind}-{form}"
    assert name not in models(server)

    imported(server, path, name=name, base=base)
    assert models(server)[name]["family"] == FAMILY_OF[kind]
    loaded = asked(server, "POST", f"/api/models/{name}/load")
    assert (loaded["loaded"], loaded["size_bytes"] > 10_000) == (True, True)
    first, other = (drawn(server, name, kind=kind, seed=seed) for seed in (7, 8))
    assert first != other

    assert asked(server, "POST", f"/api/models/{name}/unload")["loaded"] is False
    assert in_memory(server) == {"anchor"}
    assert drawn(server, name, kind=kind) == first  # which loads it again

    asked(server, "DELETE", "/api/delete", model=name)
    assert name not in models(server)
    assert asked(server, "GET", "/info")["device"]["checkpoints"] == [str(weights("sd15", "safetensors")[1])]
    assert {file: file.stat().st_mtime_ns for file in base.rglob("*") if file.is_file()} == before
    assert path.exists()


def test_jobs_of_three_families_at_once_draw_what_each_draws_alone(server: Running, weights: Weights) -> None:
    kinds = ("sd15", "sd35", "flux-schnell")
    for kind in kinds:
        path, base = weights(kind, "folder")
        imported(server, path, name=f"mixed-{kind}", base=base)
    jobs = [(kind, seed) for seed in range(4) for kind in kinds]
    alone = {(kind, seed): drawn(server, f"mixed-{kind}", kind=kind, seed=seed) for kind, seed in jobs}
    for kind in kinds:
        asked(server, "POST", f"/api/models/mixed-{kind}/unload")

    with ThreadPoolExecutor(len(jobs)) as threads:
        together = list(threads.map(lambda job: drawn(server, f"mixed-{job[0]}", kind=job[0], seed=job[1]), jobs))

    # Rows that share a step may round differently in their last bit, which is at most one level of 255.
    for job, picture in zip(jobs, together, strict=True):
        assert max(abs(a - b) for a, b in zip(picture, alone[job], strict=True)) <= 1, job
    assert in_memory(server) == {"anchor", *(f"mixed-{kind}" for kind in kinds)}
    for kind in kinds:
        asked(server, "DELETE", "/api/delete", model=f"mixed-{kind}")


def test_memory_returns_to_its_base_when_one_of_two_checkpoints_leaves(server: Running, tmp_path: Path) -> None:
    path = _large(tmp_path / "large")
    imported(server, path, name="large", base=path)
    drawn(server, "anchor", kind="anchor")
    # What libraries keep from now on is not the checkpoint's. The engine alone is flat after the first time; in its
    # process threads come and go, and what the allocator keeps for them stands after five.
    for _ in range(5):
        drawn(server, "large", kind="sd15")
        asked(server, "POST", "/api/models/large/unload")
    process = psutil.Process(engine_pid(server))
    base = process.memory_info().rss

    for _ in range(3):
        drawn(server, "large", kind="sd15")
        assert process.memory_info().rss > base + 100 * MIB
        asked(server, "POST", "/api/models/large/unload")
        assert process.memory_info().rss < base + 25 * MIB

    assert in_memory(server) == {"anchor"}
    asked(server, "DELETE", "/api/delete", model="large")


def test_the_engines_process_ends_with_the_last_checkpoint_and_all_its_memory_is_free(
    server: Running,
) -> None:
    pid = engine_pid(server)
    assert asked(server, "POST", "/api/models/anchor/unload")["pinned"] is False
    assert not psutil.pid_exists(pid or 0)
    assert (engine_pid(server), in_memory(server)) == (None, set())
    assert asked(server, "GET", "/health")["status"] == "healthy"
    assert len(drawn(server, "anchor", kind="anchor")) == 64 * 64 * 3


def _large(folder: Path) -> Path:
    """An SD 1.5 whose denoiser has about 50 million parameters, 200 MB in float32."""
    pipe = tiny.build_sd15()
    config = {**pipe.unet.config, "block_out_channels": (256, 512), "norm_num_groups": 32, "layers_per_block": 2}
    pipe.unet = diffusers.UNet2DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder
