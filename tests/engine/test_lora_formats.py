"""A LoRA on weights that are kept in few bits adds to them what it adds to plain ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdfleet.catalog.store import Catalog
from sdfleet.domain import JobId
from sdfleet.engine.components import Components
from sdfleet.engine.devices import choose_device
from sdfleet.engine.events import EngineOptions, WeightFormat
from tests import loras, single_files, tiny
from tests.engine.drawing import FLOAT32, drawing, most_levels_apart, ours
from tests.engine.test_single_files import imported, write_gguf

Checkpoints = Callable[[str], Path]


def widened(folder: Path, components: Components, target: Path) -> Path:
    """A copy of the toy in plain numbers: those that these components' denoiser computes with."""
    pipe = tiny.load(folder)
    name = loras.denoiser_of(pipe)
    kept: Any = components.use("unet" if name == "unet" else "transformer")
    with torch.no_grad():
        for path, plain in getattr(pipe, name).named_modules():
            if isinstance(plain, nn.Linear):
                layer = kept.get_submodule(path)
                # Asked of the layer itself, so that it does not matter how it keeps them.
                answer = layer(torch.eye(plain.in_features))
                plain.weight.copy_((answer if layer.bias is None else answer - layer.bias).T)
            elif isinstance(plain, nn.Conv2d):
                plain.weight.copy_(kept.get_submodule(path).weight)
    pipe.save_pretrained(target)
    return target


def check(name: str, folder: Path, checkpoint: Path, options: EngineOptions, tmp_path: Path) -> None:
    """`checkpoint`, drawn with these options, takes a LoRA as the same numbers in plain take it when it is merged."""
    components = Components(checkpoint, choose_device("cpu", "float32", options.weights))
    plain = widened(folder, components, tmp_path / "plain")
    changes = loras.changes_for(folder, has_text=False)
    lora = loras.used(loras.save(tmp_path / "a.safetensors", loras.as_kohya(changes)), 0.7)
    # The sampler that means the same with a toy's settings and with a published checkpoint's.
    one = drawing(name, checkpoint, steps=3, loras=(lora,), **({"sampler": "ddim"} if name == "sd15" else {}))
    bare = replace(one, job_id=JobId("bare"), loras=())

    changed, without = ours(one, bare, options=options)

    merged = loras.merged(plain, tmp_path / "merged", (changes, 0.7))
    assert most_levels_apart(without, ours(replace(bare, checkpoint=str(plain)))[0]) <= 1
    assert most_levels_apart(changed, ours(replace(bare, checkpoint=str(merged)))[0]) <= 1
    assert most_levels_apart(changed, without) > 5


@pytest.mark.parametrize(
    ("name", "how"), [("sd15", "int8"), ("sd15", "nf4"), ("flux-dev", "int8"), ("flux-dev", "nf4")]
)
def test_layers_in_8_and_4_bits_take_a_lora(
    name: str, how: WeightFormat, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = checkpoints(name)
    # The text encoders in full, or T5 would be another one beside the plain numbers.
    check(name, folder, folder, replace(FLOAT32, weights=how, text_weights="full"), tmp_path)


@pytest.mark.parametrize(("name", "how"), [("sd15", "Q8_0"), ("flux-dev", "Q4_0")])
def test_layers_in_ggufs_blocks_take_a_lora(name: str, how: str, tmp_path: Path) -> None:
    folder, file = single_files.write(name, tmp_path)
    catalog = Catalog(tmp_path / "models", built_in=(), published_cards=())
    packed = write_gguf(file, tmp_path / "packed.gguf", how)
    check(name, folder, imported(catalog, packed, base=folder).entry.folder, FLOAT32, tmp_path)
