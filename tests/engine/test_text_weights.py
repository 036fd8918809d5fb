from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sdfleet.engine.text_weights import load_clip_text_encoder, load_t5_encoder
from sdfleet.errors import BrokenCheckpoint, CheckpointNotFound, InvalidValue, PickleRefused

Checkpoints = Callable[[str], Path]
IDS = torch.tensor([[516, 68, 83, 517, 517]])


@pytest.fixture
def clip_folder(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoints("sd15") / "text_encoder", tmp_path / "clip")


@pytest.fixture
def clip_g_folder(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoints("sdxl") / "text_encoder_2", tmp_path / "clip_g")


@pytest.fixture
def t5_folder(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoints("sd3") / "text_encoder_3", tmp_path / "t5")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def clip(folder: Path, *, with_projection: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    return load_clip_text_encoder(folder, dtype=dtype, with_projection=with_projection)


def prefixed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    bare = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    return {name if name.startswith("text_projection") else f"text_model.{name}": t for name, t in bare.items()}


def unprefixed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("layout", [prefixed, unprefixed])
@pytest.mark.parametrize("with_projection", [False, True])
def test_both_layouts_give_what_transformers_gives(
    clip_folder: Path, clip_g_folder: Path, *, with_projection: bool, layout: Callable[..., Any]
) -> None:
    folder = clip_g_folder if with_projection else clip_folder
    cls = transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel
    theirs = cls.from_pretrained(folder)(IDS, output_hidden_states=True)
    rewrite(folder, layout)
    ours = clip(folder, with_projection=with_projection)(IDS, output_hidden_states=True)
    # Equal weights, but a matrix product may round differently where the file's map is not aligned: 4e-7 was seen.
    torch.testing.assert_close(ours[0], theirs[0], atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(ours.hidden_states[-2], theirs.hidden_states[-2], atol=2e-6, rtol=1e-6)


def test_saved_position_ids_are_ignored(clip_folder: Path) -> None:
    before = clip(clip_folder)(IDS)[0]
    rewrite(clip_folder, lambda w: w | {"text_model.embeddings.position_ids": torch.arange(77)[None]})
    assert torch.equal(clip(clip_folder)(IDS)[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_in_the_dtype_asked_for(clip_folder: Path, t5_folder: Path, dtype: torch.dtype) -> None:
    rewrite(clip_folder, lambda w: {name: tensor.half() for name, tensor in w.items()})
    for module in (clip(clip_folder, dtype=dtype), load_t5_encoder(t5_folder, dtype=dtype)):
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert module(IDS.clamp(max=40))[0].dtype == dtype


def test_float16_on_a_cpu_is_refused(clip_folder: Path, t5_folder: Path) -> None:
    with pytest.raises(InvalidValue, match="float16 does not run on a CPU"):
        clip(clip_folder, dtype=torch.float16)
    with pytest.raises(InvalidValue, match="float16 does not run on a CPU"):
        load_t5_encoder(t5_folder, dtype=torch.float16)


def test_missing_weight_is_named(clip_folder: Path) -> None:
    rewrite(clip_folder, lambda w: {n: t for n, t in w.items() if not n.endswith("final_layer_norm.bias")})
    with pytest.raises(BrokenCheckpoint, match=r"lacks final_layer_norm\.bias;"):
        clip(clip_folder)


def test_unexpected_weight_is_named(clip_folder: Path) -> None:
    rewrite(clip_folder, lambda w: w | {"encoder.layers.9.mlp.fc1.bias": torch.zeros(3)})
    with pytest.raises(BrokenCheckpoint, match=r"holds encoder\.layers\.9\.mlp\.fc1\.bias, unknown"):
        clip(clip_folder)


def test_misshapen_weight_is_named_with_both_shapes(clip_folder: Path) -> None:
    rewrite(clip_folder, lambda w: w | {"final_layer_norm.bias": torch.zeros(31)})
    with pytest.raises(BrokenCheckpoint, match=r"final_layer_norm\.bias as \[31\] where its config says \[32\]"):
        clip(clip_folder)


def test_projection_that_is_not_there_is_named(clip_folder: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match=r"lacks text_projection\.weight"):
        clip(clip_folder, with_projection=True)


def test_truncated_file_is_named(clip_folder: Path) -> None:
    path = clip_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors cannot be read"):
        clip(clip_folder)


def test_only_variant_is_read(clip_folder: Path) -> None:
    before = clip(clip_folder)(IDS)[0]
    (clip_folder / "model.safetensors").rename(clip_folder / "model.fp16.safetensors")
    assert torch.equal(clip(clip_folder)(IDS)[0], before)


def test_full_weights_win_over_a_variant(clip_folder: Path) -> None:
    (clip_folder / "model.fp16.safetensors").write_bytes(b"not read")
    assert clip(clip_folder).dtype == torch.float32


def test_several_variants_are_no_guess(clip_folder: Path) -> None:
    (clip_folder / "model.safetensors").rename(clip_folder / "model.fp16.safetensors")
    shutil.copy(clip_folder / "model.fp16.safetensors", clip_folder / "model.ema.safetensors")
    with pytest.raises(BrokenCheckpoint, match=r"model\.ema\.safetensors, model\.fp16\.safetensors"):
        clip(clip_folder)


def shard(folder: Path, variant: str = "") -> dict[str, str]:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for i, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        file = f"model{variant}-0000{i}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / f"model.safetensors.index{variant}.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_sharded_weights_are_put_together(t5_folder: Path, variant: str) -> None:
    before = load_t5_encoder(t5_folder, dtype=torch.float32)(IDS.clamp(max=40))[0]
    shard(t5_folder, variant)
    assert torch.equal(load_t5_encoder(t5_folder, dtype=torch.float32)(IDS.clamp(max=40))[0], before)


def test_missing_shard_is_named(t5_folder: Path) -> None:
    shard(t5_folder)
    (t5_folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BrokenCheckpoint, match=r"model-00002-of-00002\.safetensors is missing"):
        load_t5_encoder(t5_folder, dtype=torch.float32)


def test_index_may_not_point_outside_its_folder(t5_folder: Path) -> None:
    weight_map = shard(t5_folder)
    save_file({"shared.weight": torch.zeros(1)}, t5_folder.parent / "stolen.safetensors")
    outside = dict.fromkeys(weight_map, "../stolen.safetensors")
    (t5_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(BrokenCheckpoint, match=r"names '\.\./stolen\.safetensors'"):
        load_t5_encoder(t5_folder, dtype=torch.float32)


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight"])
def test_t5_finds_its_table_under_either_name(t5_folder: Path, kept: str) -> None:
    theirs = transformers.T5EncoderModel.from_pretrained(t5_folder)(IDS.clamp(max=40))[0]

    def rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        table = weights.pop("shared.weight", None)
        table = weights.pop("encoder.embed_tokens.weight") if table is None else table
        return weights | {kept: table, "decoder.block.0.weight": torch.zeros(1)}

    rewrite(t5_folder, rename)
    module = load_t5_encoder(t5_folder, dtype=torch.float32)
    torch.testing.assert_close(module(IDS.clamp(max=40))[0], theirs, atol=2e-6, rtol=1e-6)
    assert module.shared.weight is module.encoder.embed_tokens.weight


def test_t5_without_its_table_says_so(t5_folder: Path) -> None:
    rewrite(t5_folder, lambda w: {n: t for n, t in w.items() if n != "shared.weight"})
    with pytest.raises(BrokenCheckpoint, match=r"lacks .*shared\.weight"):
        load_t5_encoder(t5_folder, dtype=torch.float32)


def test_pickle_is_refused(clip_folder: Path) -> None:
    (clip_folder / "model.safetensors").rename(clip_folder / "pytorch_model.bin")
    with pytest.raises(PickleRefused, match=r"pytorch_model\.bin"):
        clip(clip_folder)


def test_folder_config_or_weights_that_are_not_there_are_named(clip_folder: Path) -> None:
    (clip_folder / "model.safetensors").unlink()
    with pytest.raises(BrokenCheckpoint, match=r"has no \.safetensors file"):
        clip(clip_folder)
    (clip_folder / "config.json").write_text("{")
    with pytest.raises(BrokenCheckpoint, match=r"config\.json is not JSON"):
        clip(clip_folder)
    (clip_folder / "config.json").unlink()
    with pytest.raises(BrokenCheckpoint, match=r"config\.json is missing"):
        clip(clip_folder)
    with pytest.raises(CheckpointNotFound, match="elsewhere"):
        clip(clip_folder / "elsewhere")


def test_no_parameter_is_left_to_train_or_on_the_meta_device(clip_folder: Path, t5_folder: Path) -> None:
    for module in (clip(clip_folder), load_t5_encoder(t5_folder, dtype=torch.float32)):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
        assert {t.device.type for t in [*module.parameters(), *module.buffers()]} == {"cpu"}
