"""Models and hubs for the tests of downloads."""

from __future__ import annotations

from pathlib import Path

from sdfleet.catalog.cards import Card
from sdfleet.catalog.consent import Consent
from sdfleet.catalog.download import DownloadPlan
from tests.catalog.folders import safetensors, write_sd
from tests.catalog.hub_server import HubServer, files_of

CARD = Card(
    name="toy", family="sd", licence="Toy Licence", licence_url="https://licence.example", hf="Maker/Toy-1",
    modelscope="Maker/Toy-1", width_px=64, height_px=64, steps=4, guidance=2.0, sampler="ddim",
)  # fmt: skip
LARGE = "unet/diffusion_pytorch_model.safetensors"
TOKEN = "hub-token-of-a-test"


def toy_hub(folder: Path) -> HubServer:
    """A hub with one model: a large file of 4 MB, and things beside it that nobody needs."""
    files = files_of(write_sd(folder, sample_size=8))
    files[LARGE] = safetensors({"conv_in.weight": (8, 4, 3, 3), "filling": (2_000_000,)})
    files |= {
        "README.md": b"# Toy", "LICENSE.md": b"do what you like", ".gitattributes": b"*.safetensors filter=lfs",
        "unet/diffusion_pytorch_model.bin": b"pickle", "toy.ckpt": b"pickle", "vae/model.onnx": b"onnx",
        "safety_checker/config.json": b"{}", "toy.safetensors": b"everything in one",
    }  # fmt: skip
    return HubServer("Maker/Toy-1", files)


def yes(plan: DownloadPlan) -> Consent:
    """The consent of somebody who saw this plan."""
    return Consent(plan_id=plan.id, given_by="command line")
