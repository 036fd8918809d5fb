"""Pasted messages find their entry: recorded ones, and ones that the libraries say now."""

from __future__ import annotations

import importlib
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from sdfleet import errors
from sdfleet.doctor.entry import Entry
from sdfleet.doctor.explaining import explain
from sdfleet.doctor.table import ENTRIES
from tests.catalog.hub_server import HubServer, gated, serving
from tests.catalog.hubs import toy_hub
from tests.doctor.test_hubs import online

__all__ = ["online"]

PASTED = [
    ("torch-without-cuda", "AssertionError: Torch not compiled with CUDA enabled"),
    ("gpu-driver", "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)."),
    ("gpu-driver", "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
    ("gpu-driver", "Failed to initialize NVML: Driver/library version mismatch"),
    ("card-not-in-build", "RuntimeError: CUDA error: no kernel image is available for execution on the device"),
    ("out-of-memory", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
    ("out-of-memory", "RuntimeError: MPS backend out of memory (MPS allocated: 17.93 GB, other allocations: 1 MB"),
    ("out-of-memory", "RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ("container-memory", "engine_died: the engine's process was killed by SIGKILL"),
    ("container-memory", "sd-web exited with code 137\nReason: OOMKilled"),
    ("float16-on-cpu", "RuntimeError: \"LayerNormKernelImpl\" not implemented for 'Half'"),
    ("float16-on-cpu", "Pipelines loaded with `dtype=torch.float16` cannot run with `cpu` device."),
    ("black-pictures", "RuntimeWarning: invalid value encountered in cast\n  images = (images * 255).round()"),
    ("tokenizer-missing", "OSError: Can't load tokenizer for '/models/sd3/tokenizer'. If you were trying to load it"),
    ("tokenizer-packages", "ImportError: T5Converter requires the protobuf library but it was not found"),
    ("tokenizer-packages", "ValueError: Cannot instantiate this tokenizer from a slow version. If it's based on"),
    ("tokenizer-packages", "TypeError: Descriptors cannot be created directly."),
    ("token-needed",
     ("huggingface_hub.errors.GatedRepoError: 401 Client Error. (Request ID: Root=1-6)\nCannot access gated repo for "
      "url https://huggingface.co/api/models/x.\nAccess to model x is restricted. You must have access to it and be "
      "authenticated to access it. Please log in.")),
    ("licence-not-accepted",
     ("huggingface_hub.errors.GatedRepoError: 403 Client Error. (Request ID: Root=1-6)\nCannot access gated repo for "
      "url https://huggingface.co/x.\nAccess to model x is restricted and you are not in the authorized list. Visit "
      "https://huggingface.co/x to ask for access.")),
    ("token-refused", "HfHubHTTPError: 401 Client Error: Unauthorized\nInvalid credentials in Authorization header"),
    ("token-too-narrow",
     "403 Forbidden: Please enable access to public gated repositories in your fine-grained token settings to view"),
    ("repository-not-found", "RepositoryNotFoundError: 404 Client Error. Repository Not Found for url: https://x"),
    ("repository-gone", "DisabledRepoError: 403 Client Error. Access to this resource is disabled."),
    ("hub-file-not-found", "OSError: x does not appear to have a file named fp16/model.safetensors"),
    ("hub-offline",
     "LocalEntryNotFoundError: Cannot find the requested files in the disk cache, outgoing traffic has been disabled"),
    ("hub-reachable", "httpx2.ConnectTimeout: timed out"),
    ("hub-reachable", "requests.exceptions.SSLError: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"),
    ("hub-reachable", "urllib3.exceptions.MaxRetryError: Max retries exceeded with url: / (Caused by ProxyError("),
    ("hub-reachable", "socket.gaierror: [Errno -3] Temporary failure in name resolution"),
    ("hub-rate-limit", "HfHubHTTPError: 429 Client Error: Too Many Requests for url"),
    ("download-damaged", "OSError: Consistency check failed: file should be of size 100 but has size 90"),
    ("clock", "ssl.SSLCertVerificationError: certificate verify failed: certificate is not yet valid"),
    ("disk-full", "OSError: [Errno 28] No space left on device: '/data/cache'"),
    ("home-not-writable", "PermissionError: [Errno 13] Permission denied: '/data/sdfleet/sdfleet.db'"),
    ("port-in-use", "OSError: [Errno 98] Address already in use"),
    ("port-in-use", "error: port: 127.0.0.1:7860 cannot be listened on: Address already in use; name another"),
    ("database", "sqlite3.OperationalError: database is locked"),
    ("other-server", "error: another server (process 812) uses /home; end it, or give this one a home of its own"),
    ("torchvision-build", "RuntimeError: operator torchvision::nms does not exist"),
    ("two-torches", "ImportError: /site/torch/lib/libtorch_cpu.so: undefined symbol: iJIT_NotifyEvent"),
    ("two-torches", "AttributeError: partially initialized module 'torch' has no attribute 'nn' (most likely due to a"),
    ("packages", "ModuleNotFoundError: No module named 'accelerate'"),
    ("broken-model", "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer"),
    ("broken-model", "OSError: Error no file named diffusion_pytorch_model.safetensors found in directory /m/unet"),
    ("pickle", "_pickle.UnpicklingError: Weights only load failed. This file can still be loaded, to do so"),
    ("compile-workers", "torch._inductor.exc.InductorError: RuntimeError: Cannot find a working triton installation"),
    ("compile-workers", "torch._dynamo.exc.BackendCompilerFailed: backend='inductor' raised: InvalidCxxCompiler: No"),
    ("processor", "Illegal instruction (core dumped)"),
    ("card-fault", "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"),
    ("metal-operator", "NotImplementedError: The operator 'aten::x' is not currently implemented for the MPS device."),
    ("cannot-connect", "Error: connect ECONNREFUSED 127.0.0.1:7860"),
    ("no-key", '{"error": {"message": "this server wants a key", "code": "invalid_api_key"}}'),
    ("too-many-files", "OSError: [Errno 24] Too many open files"),
    ("prompt-cut", "Token indices sequence length is longer than the specified maximum sequence length (92 > 77)."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), PASTED, ids=lambda value: value[:40])
def test_a_pasted_message_finds_its_entry_first(name: str, text: str) -> None:
    found = explain(text)
    assert [one.entry.id for one in found][:1] == [name], [(one.entry.id, one.by) for one in found]
    assert found[0].entry.cure


def test_the_last_lines_of_a_traceback_count_most() -> None:
    text = 'Traceback (most recent call last):\n  File "/torch/_dynamo/exc.py", line 1, in out of memory\n' * 20
    assert explain(f"{text}OSError: [Errno 28] No space left on device")[0].entry.id == "disk-full"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_what_a_person_sees_leads_to_the_entry(entry: Entry) -> None:
    for symptom in entry.symptoms:
        assert entry in [one.entry for one in explain(symptom, most=6)], symptom


def test_a_text_about_nothing_finds_nothing() -> None:
    assert explain("the weather is fine") == ()
    assert explain("") == ()


def test_entries_have_names_of_their_own_and_say_what_to_do() -> None:
    assert len({entry.id for entry in ENTRIES}) == len(ENTRIES)
    assert [entry.id for entry in ENTRIES if not entry.cure or not entry.cause or not entry.symptoms] == []
    assert [entry.id for entry in ENTRIES if entry.check is not None and not entry.looks] == []
    known = {entry.id for entry in ENTRIES if entry.check is not None}
    assert {entry.checked_by for entry in ENTRIES if entry.checked_by} <= known


def _kinds(top: type[errors.SdfleetError]) -> set[str]:
    return {top.code}.union(*(_kinds(kind) for kind in top.__subclasses__()))


def test_every_error_of_downloads_models_engines_and_stores_has_one_entry() -> None:
    importlib.import_module("sdfleet.fleet.transport_nats")  # errors of the fleet's own
    told = [code for entry in ENTRIES for code in entry.codes]
    assert len(told) == len(set(told))
    tops = (
        errors.DownloadError, errors.CheckpointError, errors.EngineDied, errors.EngineFailed, errors.OutOfMemory,
        errors.StorageError, errors.StoreUnavailable, errors.OutputNotWritable, errors.NotAuthenticated,
        errors.HubRateLimited,
    )  # fmt: skip
    assert set().union(*(_kinds(top) for top in tops)) - set(told) == set()
    assert set(told) - _kinds(errors.SdfleetError) == set(), "codes that no error has"


def test_codes_find_their_entry() -> None:
    for entry in ENTRIES:
        for code in entry.codes:
            assert explain(f'{{"code": "{code}"}}')[0].entry == entry, code


# ------------------------------------------------------------------------------------ what the libraries really say


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(("status", "name"), [(401, "token-needed"), (403, "licence-not-accepted")])
def test_what_huggingface_hub_says_of_a_gated_model_is_understood(tmp_path: Path, status: int, name: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError

    hub: HubServer = toy_hub(tmp_path / "published")
    hub.decide = lambda _asked: gated(status)
    with serving(hub), pytest.raises(GatedRepoError) as caught:
        HfApi(endpoint=hub.url, token=False).model_info("Maker/Toy-1")
    said = f"{type(caught.value).__name__}: {caught.value}"
    assert explain(said)[0].entry.id == name, said


@pytest.mark.parametrize("request_id", ["", " (Request ID: Root=1-6740140a-34034010;40117403)"])
@pytest.mark.parametrize("address", ["127.0.0.1:34011", "127.0.0.1:40301", "hub/Toy-401", "hub/Toy-403"])
@pytest.mark.parametrize(("status", "name"), [(401, "token-needed"), (403, "licence-not-accepted")])
def test_only_the_status_of_a_gated_model_counts(status: int, name: str, address: str, request_id: str) -> None:
    said = (
        f"GatedRepoError: {status} Client Error.{request_id}\n\n"
        f"Cannot access gated repo for url http://{address}/resolve/main/model_index.json.\n"
        "Access to model is restricted."
    )
    assert explain(said)[0].entry.id == name


@pytest.mark.usefixtures("online")
def test_what_huggingface_hub_says_of_a_missing_model_is_understood(tmp_path: Path) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with serving(toy_hub(tmp_path / "published")) as hub, pytest.raises(RepositoryNotFoundError) as caught:
        HfApi(endpoint=hub.url, token=False).model_info("Maker/Other")
    assert explain(f"{type(caught.value).__name__}: {caught.value}")[0].entry.id == "repository-not-found"


def test_what_safetensors_says_of_a_file_that_was_cut_off_is_understood(tmp_path: Path) -> None:
    import safetensors

    (tmp_path / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    with (
        pytest.raises(safetensors.SafetensorError) as caught,
        safetensors.safe_open(tmp_path / "cut.safetensors", framework="np"),
    ):
        pass
    assert explain(f"SafetensorError: {caught.value}")[0].entry.id == "broken-model"


def test_what_sqlite_says_of_a_lock_is_understood(tmp_path: Path) -> None:
    one = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    other = sqlite3.connect(tmp_path / "x.db", isolation_level=None, timeout=0.0)
    one.execute("BEGIN EXCLUSIVE")
    with pytest.raises(sqlite3.OperationalError) as caught:
        other.execute("BEGIN EXCLUSIVE")
    one.close()
    other.close()
    assert explain(f"sqlite3.OperationalError: {caught.value}")[0].entry.id == "database"


TORCH_SAYS = {
    "torch-without-cuda": "import torch; torch.zeros(1).cuda()",
    "out-of-memory": "import torch; torch.empty(2**62, dtype=torch.int8)",
    "pickle": "import io, pickle, torch; torch.load(io.BytesIO(pickle.dumps(print)))",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCH_SAYS)
def test_what_torch_says_is_understood(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", TORCH_SAYS[name]], capture_output=True, text=True, check=False)
    if name == "torch-without-cuda" and not re.search("not compiled", done.stderr):
        pytest.skip("this torch is built with CUDA")
    assert explain(done.stderr)[0].entry.id == name, done.stderr
