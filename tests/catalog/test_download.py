"""Downloads: planned first, wanted by somebody, resumed, checked, and there at once or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sdfleet.catalog import download
from sdfleet.catalog.consent import Consent
from sdfleet.catalog.download import PullProgress, fetch, plan_download
from sdfleet.catalog.hubs.hub import Access, Hub
from sdfleet.catalog.hubs.hugging_face import HuggingFace
from sdfleet.catalog.hubs.modelscope import ModelScope
from sdfleet.catalog.identify import identify
from sdfleet.catalog.pulled import MANIFEST, PulledWeights
from sdfleet.errors import (
    AlreadyPulling,
    BrokenCheckpoint,
    CheckpointError,
    ConfirmationRequired,
    DiskFull,
    DownloadCancelled,
    DownloadDamaged,
    HubRateLimited,
    HubUnreachable,
    UnsupportedByModel,
)
from tests.catalog.hub_server import Asked, HubServer, Refusal, files_of
from tests.catalog.hubs import CARD, LARGE, yes

MIB = 2**20


@pytest.fixture(params=["hf", "modelscope"])
def client(request: pytest.FixtureRequest, hub: HubServer, tmp_path: Path) -> Hub:
    """Each hub's real client library, talking to the hub of the test."""
    if request.param == "hf":
        return HuggingFace(Access(endpoint=hub.url))
    return ModelScope(Access(endpoint=hub.url), notes_folder=tmp_path / "notes")


def no_wait(_seconds: float) -> None:
    """The clock of tests."""


def test_a_plan_says_what_would_come_and_fetches_no_file(client: Hub, hub: HubServer, weights: PulledWeights) -> None:
    plan = plan_download(CARD, client, weights)
    assert plan.n_bytes == sum(len(hub.files[file.path]) for file in plan.files)
    assert plan.n_left_bytes == plan.n_bytes
    assert plan.n_free_bytes > 0
    assert (plan.licence, plan.licence_url) == ("Toy Licence", "https://licence.example")
    assert not any("resolve" in asked.path or "FilePath" in asked.path for asked in hub.asked)
    assert not weights.folder.exists()


def test_what_arrives_is_a_checkpoint_without_pickles_and_without_what_nobody_reads(
    client: Hub, hub: HubServer, weights: PulledWeights
) -> None:
    plan = plan_download(CARD, client, weights)
    folder = fetch(plan, yes(plan), client, weights)
    got = files_of(folder)
    assert {path: got[path] for path in got if path != MANIFEST} == {
        path: data
        for path, data in hub.files.items()
        if path not in {"README.md", ".gitattributes", "toy.ckpt", "toy.safetensors"}
        and not path.endswith((".bin", ".onnx"))
        and not path.startswith("safety_checker/")
    }
    assert identify(folder).family == "sd"
    assert weights.verify("toy") == ()
    assert not weights.staging("toy").exists()


@pytest.mark.parametrize("consent", [None, Consent(plan_id="another", given_by="api")])
def test_nothing_is_downloaded_without_a_yes_to_this_plan(
    client: Hub, hub: HubServer, weights: PulledWeights, consent: Consent | None
) -> None:
    plan = plan_download(CARD, client, weights)
    n_asked = len(hub.asked)
    with pytest.raises(ConfirmationRequired):
        fetch(plan, consent, client, weights)
    assert len(hub.asked) == n_asked
    assert not weights.folder.exists()


def test_a_yes_to_other_files_is_no_yes(client: Hub, hub: HubServer, weights: PulledWeights) -> None:
    old = plan_download(CARD, client, weights)
    hub.files["vae/config.json"] += b" "
    with pytest.raises(ConfirmationRequired):
        fetch(plan_download(CARD, client, weights), yes(old), client, weights)


def test_a_broken_connection_is_taken_up_where_it_broke(client: Hub, hub: HubServer, weights: PulledWeights) -> None:
    hub.breaks[LARGE] = [MIB, MIB]
    plan = plan_download(CARD, client, weights)
    fetch(plan, yes(plan), client, weights, wait=no_wait)
    starts = [int(a.byte_range.removeprefix("bytes=").removesuffix("-")) for a in hub.asked if a.byte_range]
    assert min(starts) >= MIB
    assert max(starts) > min(starts)
    assert weights.verify("toy") == ()


def test_a_hub_that_cannot_begin_in_the_middle_sends_it_all_again(
    client: Hub, hub: HubServer, weights: PulledWeights
) -> None:
    hub.ignores_range = True
    hub.breaks[LARGE] = [MIB]
    plan = plan_download(CARD, client, weights)
    fetch(plan, yes(plan), client, weights, wait=no_wait)
    assert weights.verify("toy") == ()


def test_a_hub_that_always_breaks_off_is_given_up_and_what_came_is_kept(
    client: Hub, hub: HubServer, weights: PulledWeights
) -> None:
    hub.breaks[LARGE] = [2 * MIB] + [0] * 20
    plan = plan_download(CARD, client, weights)
    waits: list[float] = []
    with pytest.raises(HubUnreachable):
        fetch(plan, yes(plan), client, weights, wait=waits.append)
    assert waits == [1, 2, 4, 8, 16][: len(waits)]
    assert len(waits) == download.MAX_TRIES
    assert not weights.is_here("toy")
    assert plan_download(CARD, client, weights).n_left_bytes <= plan.n_bytes - 2 * MIB


def test_a_killed_download_goes_on_where_it_was(hub: HubServer, weights: PulledWeights) -> None:
    hub.holds[LARGE] = 5 * MIB // 2
    script = f"""
import huggingface_hub.constants as constants
constants.HF_HUB_OFFLINE = False
from pathlib import Path
from sdfleet.catalog.download import fetch, plan_download
from sdfleet.catalog.hubs.hub import Access
from sdfleet.catalog.hubs.hugging_face import HuggingFace
from sdfleet.catalog.pulled import PulledWeights
from tests.catalog.hubs import CARD, yes
hub, weights = HuggingFace(Access(endpoint={hub.url!r})), PulledWeights(Path({str(weights.folder)!r}))
plan = plan_download(CARD, hub, weights)
tell = lambda progress: print(progress.n_file_bytes, flush=True)
fetch(plan, yes(plan), hub, weights, on_progress=tell)
"""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        arrived = next(int(line) for line in process.stdout if int(line) >= 2 * MIB)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not weights.is_here("toy")
    hub.go_on.set()
    hub.asked.clear()
    client = HuggingFace(Access(endpoint=hub.url))
    plan = plan_download(CARD, client, weights)
    assert plan.n_left_bytes <= plan.n_bytes - arrived
    fetch(plan, yes(plan), client, weights)
    assert [asked.byte_range for asked in hub.asked if asked.is_cdn and "/unet/" in asked.path] == [f"bytes={arrived}-"]
    assert weights.verify("toy") == ()


def test_a_file_with_another_hash_than_announced_is_refused_and_not_kept(
    client: Hub, hub: HubServer, weights: PulledWeights
) -> None:
    hub.announced_sha256[LARGE] = "0" * 64
    plan = plan_download(CARD, client, weights)
    with pytest.raises(DownloadDamaged, match=r"unet/diffusion.*use the other hub with --from"):
        fetch(plan, yes(plan), client, weights)
    assert not weights.is_here("toy")
    assert list(weights.staging("toy").rglob("*.partial")) == []
    assert not (weights.staging("toy") / LARGE).exists()


def test_what_was_kept_and_is_damaged_is_fetched_again(client: Hub, hub: HubServer, weights: PulledWeights) -> None:
    hub.breaks[LARGE] = [2 * MIB] + [0] * 20
    plan = plan_download(CARD, client, weights)
    with pytest.raises(HubUnreachable):
        fetch(plan, yes(plan), client, weights, wait=no_wait)
    partial = next(weights.staging("toy").rglob("*.partial"))
    partial.write_bytes(b"\xff" * partial.stat().st_size)
    hub.breaks[LARGE] = []
    fetch(plan, yes(plan), client, weights)
    assert weights.verify("toy") == ()


def test_a_finished_file_that_changed_on_the_disk_is_fetched_again(
    client: Hub, hub: HubServer, weights: PulledWeights
) -> None:
    hub.breaks[LARGE] = [0] * 20
    plan = plan_download(CARD, client, weights)
    with pytest.raises(HubUnreachable):
        fetch(plan, yes(plan), client, weights, wait=no_wait)
    finished = weights.staging("toy") / "vae/diffusion_pytorch_model.safetensors"
    finished.write_bytes(bytes(reversed(finished.read_bytes())))
    hub.breaks[LARGE] = []
    fetch(plan, yes(plan), client, weights)
    assert weights.verify("toy") == ()


def test_too_little_room_is_told_before_the_first_byte(
    client: Hub, hub: HubServer, weights: PulledWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_download(CARD, client, weights)
    n_asked = len(hub.asked)
    # No disk of a test machine is this small or these files this large: the margin is what is moved.
    monkeypatch.setattr(download, "SPARE_BYTES", 2**62)
    with pytest.raises(DiskFull, match=r"0\.0 GB more and the disk of .* free; .*`sdfleet models du`"):
        fetch(plan, yes(plan), client, weights)
    assert len(hub.asked) == n_asked


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_becomes_full_is_told_and_what_came_is_kept(client: Hub, weights: PulledWeights) -> None:
    plan = plan_download(CARD, client, weights)
    large = next(file for file in plan.files if file.path == LARGE)
    partial = download._partial(weights.staging("toy"), large)
    partial.parent.mkdir(parents=True)
    # Whatever is written to it meets the kernel's own "no space left on device".
    partial.symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=r"became full .*what has arrived is kept"):
        fetch(plan, yes(plan), client, weights, wait=no_wait)
    assert (weights.staging("toy") / "model_index.json").is_file()
    assert not weights.is_here("toy")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_file_system_that_takes_no_large_files_is_told(hub: HubServer, weights: PulledWeights) -> None:
    script = f"""
import resource, signal
import huggingface_hub.constants as constants
constants.HF_HUB_OFFLINE = False
from pathlib import Path
from sdfleet.catalog.download import fetch, plan_download
from sdfleet.catalog.hubs.hub import Access
from sdfleet.catalog.hubs.hugging_face import HuggingFace
from sdfleet.catalog.pulled import PulledWeights
from sdfleet.errors import DiskFull
from tests.catalog.hubs import CARD, yes
hub, weights = HuggingFace(Access(endpoint={hub.url!r})), PulledWeights(Path({str(weights.folder)!r}))
plan = plan_download(CARD, hub, weights)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({2 * MIB}, {2 * MIB}))
try:
    fetch(plan, yes(plan), hub, weights)
except DiskFull as exc:
    print(exc)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=False)
    assert "takes no file as large" in done.stdout, done.stderr
    assert "FAT32" in done.stdout


def test_a_folder_that_cannot_be_written_is_told(client: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    weights = PulledWeights(tmp_path / "file/weights")
    plan = plan_download(CARD, client, weights)
    with pytest.raises(CheckpointError, match="set SD_HOME"):
        fetch(plan, yes(plan), client, weights)


def test_a_stopped_download_stops_and_goes_on_later(client: Hub, hub: HubServer, weights: PulledWeights) -> None:
    plan, stop = plan_download(CARD, client, weights), threading.Event()

    def on_progress(progress: PullProgress) -> None:
        if progress.n_file_bytes >= 2 * MIB:
            stop.set()

    with pytest.raises(DownloadCancelled, match="goes on where it stopped"):
        fetch(plan, yes(plan), client, weights, on_progress=on_progress, cancel=stop)
    assert plan_download(CARD, client, weights).n_left_bytes <= plan.n_bytes - 2 * MIB
    fetch(plan, yes(plan), client, weights)
    assert any(asked.byte_range for asked in hub.asked)


def test_two_downloads_of_one_model_are_not_at_once(client: Hub, weights: PulledWeights) -> None:
    plan = plan_download(CARD, client, weights)
    holder = PulledWeights(weights.folder)
    with holder.locked("toy"), pytest.raises(AlreadyPulling):
        fetch(plan, yes(plan), client, weights)
    fetch(plan, yes(plan), client, weights)


def test_a_rate_limit_is_waited_out_as_long_as_the_hub_says(
    client: Hub, hub: HubServer, weights: PulledWeights
) -> None:
    plan = plan_download(CARD, client, weights)
    refusals = [Refusal(429, {"Retry-After": "7"})]
    hub.decide = lambda asked: refusals.pop() if refusals and "vocab.json" in asked.path else None
    waits: list[float] = []
    fetch(plan, yes(plan), client, weights, wait=waits.append)
    assert waits == [7.0]


def test_a_rate_limit_of_an_hour_is_told_and_not_waited_for(
    client: Hub, hub: HubServer, weights: PulledWeights
) -> None:
    plan = plan_download(CARD, client, weights)
    hub.decide = lambda _asked: Refusal(429, {"Retry-After": "3600"})
    waits: list[float] = []
    with pytest.raises(HubRateLimited, match="try again in 3600 s") as caught:
        fetch(plan, yes(plan), client, weights, wait=waits.append)
    assert caught.value.retry_after_s == 3600
    assert waits == []


def test_progress_counts_up_to_the_planned_bytes(client: Hub, weights: PulledWeights) -> None:
    plan = plan_download(CARD, client, weights)
    told: list[PullProgress] = []
    fetch(plan, yes(plan), client, weights, on_progress=told.append)
    counts = [progress.n_bytes for progress in told]
    assert counts == sorted(counts)
    assert counts[-1] == plan.n_bytes == told[-1].n_total_bytes


def test_a_download_that_is_here_asks_the_hub_for_no_file(client: Hub, hub: HubServer, weights: PulledWeights) -> None:
    plan = plan_download(CARD, client, weights)
    fetch(plan, yes(plan), client, weights)
    again = plan_download(CARD, client, weights)
    assert again.is_here
    n_asked = len(hub.asked)
    assert fetch(again, yes(again), client, weights) == plan.folder
    assert len(hub.asked) == n_asked


def test_a_newer_state_of_the_repository_replaces_the_old_one(
    client: Hub, hub: HubServer, weights: PulledWeights
) -> None:
    plan = plan_download(CARD, client, weights)
    fetch(plan, yes(plan), client, weights)
    hub.files["scheduler/scheduler_config.json"] = b'{"_class_name": "EulerDiscreteScheduler"}'
    newer = plan_download(CARD, client, weights)
    assert not newer.is_here
    folder = fetch(newer, yes(newer), client, weights)
    assert b"Euler" in (folder / "scheduler/scheduler_config.json").read_bytes()
    assert sorted(path.name for path in weights.folder.iterdir() if path.is_dir()) == ["toy"]


def test_a_repository_that_is_no_whole_checkpoint_never_appears(
    client: Hub, hub: HubServer, weights: PulledWeights
) -> None:
    del hub.files["tokenizer/merges.txt"]
    plan = plan_download(CARD, client, weights)
    with pytest.raises(BrokenCheckpoint, match="merges"):
        fetch(plan, yes(plan), client, weights)
    assert not weights.is_here("toy")


def test_a_model_that_the_card_has_on_another_hub_only_is_told(client: Hub, weights: PulledWeights) -> None:
    elsewhere = {"hf": "modelscope", "modelscope": "hf"}[client.source]
    card = CARD.model_copy(update={client.source: None})
    with pytest.raises(UnsupportedByModel, match=f"use --from {elsewhere}"):
        plan_download(card, client, weights)


@pytest.mark.usefixtures("online")
def test_a_hub_that_is_not_there_is_told_with_the_ways_out(weights: PulledWeights) -> None:
    nobody = "http://127.0.0.1:9"
    with pytest.raises(HubUnreachable, match=r"SD_HF_ENDPOINT, or use --from modelscope"):
        plan_download(CARD, HuggingFace(Access(endpoint=nobody)), weights)


def test_what_a_hub_lists_outside_of_the_checkpoint_is_never_written(
    client: Hub, hub: HubServer, weights: PulledWeights
) -> None:
    hub.files["unet/../../../escaped.json"] = b"{}"
    hub.files["unet/deeper/config.json"] = b"{}"
    plan = plan_download(CARD, client, weights)
    assert [file.path for file in plan.files if ".." in file.path or "deeper" in file.path] == []


def test_only_the_hub_of_the_test_is_asked(client: Hub, hub: HubServer, weights: PulledWeights) -> None:
    seen: list[Asked] = []
    hub.decide = seen.append
    plan = plan_download(CARD, client, weights)
    fetch(plan, yes(plan), client, weights)
    assert all(asked.token is None and not asked.cookie for asked in seen)
