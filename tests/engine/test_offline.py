"""The engine draws with what lies here: neither it nor a library beneath it asks the network for anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from sdfleet import compose
from sdfleet.settings import engine_environment, load_settings

# What a checkpoint of another family than SD's needs of them; the networks' names are looked up on first use.
IMPORTS = """
import sys
asked = []
sys.addaudithook(lambda name, _: asked.append(name) if name.startswith(("socket.connect", "socket.getaddr")) else None)
import diffusers, transformers
assert diffusers.FluxTransformer2DModel and diffusers.SD3Transformer2DModel and diffusers.ZImageTransformer2DModel
assert diffusers.AutoencoderKLFlux2 and transformers.T5EncoderModel and transformers.Qwen3Model
assert asked == [], asked
from huggingface_hub.constants import HF_HUB_OFFLINE
assert HF_HUB_OFFLINE
"""


@pytest.mark.slow
def test_importing_the_libraries_asks_the_network_for_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], env=engine_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("engines", [1, "auto"])
def test_an_engines_process_is_started_offline(engines: Literal[1, "auto"], tmp_path: Path) -> None:
    runtime: Any = compose.standalone(load_settings(home=tmp_path, backend="local", engines=engines))
    backend = runtime._backend
    made = [backend] if engines == 1 else [backend._wide, *backend._small]
    assert {each._env["HF_HUB_OFFLINE"] for each in made} == {"1"}
