"""LoRAs and embeddings on disk: recognised from their headers, found in their folders, refused with what to do."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from sdfleet.catalog.adapter_header import read_facts
from sdfleet.catalog.adapter_use import find_loras
from sdfleet.catalog.adapters import Adapters
from sdfleet.catalog.cards import Card
from sdfleet.catalog.headers import read_header
from sdfleet.domain import LoraUse
from sdfleet.errors import BrokenCheckpoint, InvalidValue, PickleRefused, UnknownName, UnsupportedByModel

Shapes = Mapping[str, tuple[int, ...]]

KOHYA: Shapes = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 2048),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight": (640, 4),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.alpha": (),
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (8, 1280),
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (5120, 8),
}
SD15: Shapes = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 768),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight": (320, 4),
}


def write(path: Path, shapes: Shapes, *, fill: int = 0, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of one number, repeated."""
    at, header = 0, {}
    for name, shape in shapes.items():
        n_bytes = 2
        for side in shape:
            n_bytes *= side
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    told = header if metadata is None else {"__metadata__": dict(metadata), **header}
    text = json.dumps(told).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes([fill]) * at)
    return path


@pytest.fixture
def adapters(tmp_path: Path) -> Adapters:
    return Adapters(tmp_path / "models")


def _lora(**layers: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (n_out, n_in) in layers.items():
        shapes |= {f"lora_unet_{layer}.lora_down.weight": (2, n_in), f"lora_unet_{layer}.lora_up.weight": (n_out, 2)}
    return shapes


@pytest.mark.parametrize(
    ("shapes", "layout", "family"),
    [
        (KOHYA, "kohya", "sdxl"),
        (SD15, "diffusers", "sd"),
        (_lora(down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k=(320, 1024)), "kohya", "sd"),
        (_lora(joint_blocks_0_x_block_attn_qkv=(4608, 1536)), "kohya", "sd3"),
        (_lora(single_blocks_0_linear1=(21504, 3072)), "kohya", "flux"),
        (_lora(single_blocks_0_linear1=(27648, 3072)), "kohya", "flux2"),
        (_lora(layers_0_attention_qkv=(11520, 3840)), "kohya", "zimage"),
        (
            {
                "base_model.model.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072),
                "base_model.model.single_transformer_blocks.0.attn.to_q.lora_B.weight": (3072, 4),
            },
            "PEFT",
            "flux",
        ),
        # SD3's and FLUX's double blocks have the same names: that is seen when it is used.
        (_lora(transformer_blocks_0_attn_to_q=(64, 64)), "kohya", None),
    ],
)
def test_layout_and_family_are_told_from_the_header(
    shapes: Shapes, layout: str, family: str | None, tmp_path: Path
) -> None:
    facts = read_facts(read_header(write(tmp_path / "a.safetensors", shapes)), label="it")
    assert facts is not None
    assert (facts.kind, facts.layout, facts.family) == ("lora", layout, family)


@pytest.mark.parametrize(
    ("name", "what"),
    [("x.hada_w1_a", "a LoHa"), ("x.lokr_w1", "a LoKr"), ("x.dora_scale", "a DoRA"),
     ("x.lora_magnitude_vector", "a DoRA"), ("x.oft_blocks", "an OFT")],
)  # fmt: skip
def test_other_ways_to_change_a_layer_are_refused_by_name(name: str, what: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {**SD15, name: (2, 2)})
    with pytest.raises(UnsupportedByModel, match=what) as caught:
        read_facts(read_header(path), label="it")
    assert "as a plain LoRA" in caught.value.hint


def test_half_a_lora_is_broken(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", dict(list(SD15.items())[:1]))
    with pytest.raises(BrokenCheckpoint, match="half of what changes"):
        read_facts(read_header(path), label="it")


@pytest.mark.parametrize(
    ("shapes", "n_vectors", "family", "word"),
    [
        ({"emb_params": (3, 768)}, 3, "sd", ""),
        ({"<cat-toy>": (1024,)}, 1, "sd", "<cat-toy>"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, 2, "sdxl", ""),
    ],
)
def test_embeddings_are_told_from_the_header(
    shapes: Shapes, n_vectors: int, family: str, word: str, tmp_path: Path
) -> None:
    facts = read_facts(read_header(write(tmp_path / "a.safetensors", shapes)), label="it")
    assert facts is not None
    assert (facts.kind, facts.n_vectors, facts.family, facts.word) == ("embedding", n_vectors, family, word)


def test_files_that_somebody_put_into_the_folders_are_found(adapters: Adapters) -> None:
    write(adapters.folder("lora") / "style" / "Ink_v1.5.safetensors", SD15, metadata={"ss_output_name": "ink"})
    write(adapters.folder("lora") / "paper" / "adapter_model.safetensors", KOHYA)
    write(adapters.folder("embedding") / "easynegative.safetensors", {"emb_params": (2, 768)})

    assert [adapter.name for adapter in adapters.all("lora")] == ["Ink_v1.5", "paper"]
    assert {adapters.find("lora", name).name for name in ("Ink_v1.5", "ink_V1.5", "ink")} == {"Ink_v1.5"}
    assert list(adapters.words()) == ["easynegative"]


def test_an_import_copies_the_file_and_the_original_stays(adapters: Adapters, tmp_path: Path) -> None:
    file = write(tmp_path / "My LoRA.safetensors", SD15)
    facts = adapters.identify(file)
    assert facts is not None

    adapter = adapters.add(file, facts)

    assert adapter.path == adapters.folder("lora") / "My LoRA.safetensors"
    assert adapters.remove(adapter) == file.stat().st_size
    assert adapters.all("lora") == ()
    assert file.is_file()


def test_pefts_config_is_copied_with_its_file(adapters: Adapters, tmp_path: Path) -> None:
    file = write(tmp_path / "moon" / "adapter_model.safetensors", SD15)
    (file.parent / "adapter_config.json").write_text('{"lora_alpha": 2}')
    facts = adapters.identify(file)
    assert facts is not None

    adapter = adapters.add(file, facts)

    assert adapter.name == "moon"
    assert (adapter.path.parent / "adapter_config.json").is_file()
    adapters.remove(adapter)
    assert list(adapters.folder("lora").iterdir()) == []


def test_a_name_that_stands_for_another_file_is_taken(adapters: Adapters, tmp_path: Path) -> None:
    for at, fill in (("a", 0), ("b", 1)):
        file = write(tmp_path / at / "ink.safetensors", SD15, fill=fill)
        facts = adapters.identify(file)
        assert facts is not None
        if fill:
            with pytest.raises(InvalidValue, match="already stands for") as caught:
                adapters.add(file, facts)
            assert "--name" in caught.value.hint
        else:
            adapters.add(file, facts)


@pytest.mark.parametrize("name", ["../ink", "a/b", "a:b", "<x>", ".ink", ""])
def test_what_is_no_name_is_refused(name: str, adapters: Adapters, tmp_path: Path) -> None:
    file = write(tmp_path / "ok.safetensors", SD15)
    facts = adapters.identify(file)
    assert facts is not None
    if not name:
        return
    with pytest.raises(InvalidValue):
        adapters.add(file, facts, name=name)


def test_an_unknown_name_says_where_to_put_the_file(adapters: Adapters) -> None:
    with pytest.raises(UnknownName, match="no LoRA named 'ink'") as caught:
        adapters.find("lora", "ink")
    assert f"put its .safetensors file into {adapters.folder('lora')}" in caught.value.hint


def test_a_pickle_is_refused_by_name(adapters: Adapters, tmp_path: Path) -> None:
    pickle = tmp_path / "neg.pt"
    pickle.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(PickleRefused):
        adapters.identify(pickle)
    adapters.folder("embedding").mkdir(parents=True)
    (adapters.folder("embedding") / "neg.pt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(PickleRefused):
        adapters.find("embedding", "neg")


def test_a_linked_file_is_unlinked_and_a_linked_folder_left_alone(adapters: Adapters, tmp_path: Path) -> None:
    file = write(tmp_path / "elsewhere" / "ink.safetensors", SD15)
    adapters.folder("lora").mkdir(parents=True)
    (adapters.folder("lora") / "ink.safetensors").symlink_to(file)
    assert adapters.remove(adapters.find("lora", "ink")) == 0
    assert file.is_file()

    (adapters.folder("lora") / "theirs").symlink_to(file.parent, target_is_directory=True)
    from sdfleet.errors import CheckpointError

    with pytest.raises(CheckpointError, match="another program"):
        adapters.remove(adapters.find("lora", "ink"))
    assert file.is_file()


def test_the_content_is_that_of_the_weights_alone(adapters: Adapters, tmp_path: Path) -> None:
    one = write(tmp_path / "a.safetensors", SD15, metadata={"ss_tag": "1"})
    same = write(tmp_path / "b.safetensors", SD15, metadata={"ss_tag": "another"})
    other = write(tmp_path / "c.safetensors", SD15, fill=1)
    assert adapters.content(one) == adapters.content(same) != adapters.content(other)


def test_a_lora_of_another_family_is_refused_before_anything_is_loaded(adapters: Adapters) -> None:
    write(adapters.folder("lora") / "ink.safetensors", KOHYA)
    card = Card(name="toy", family="sd", width_px=64, height_px=64, steps=3, guidance=4.0, sampler="ddim")
    with pytest.raises(UnsupportedByModel, match="'ink' is for SDXL, the checkpoint toy is Stable Diffusion") as caught:
        find_loras(adapters, [LoraUse(name="ink")], card, warnings=[])
    assert "draw with a checkpoint of SDXL" in caught.value.hint


def test_a_file_that_has_changed_since_the_request_is_told(adapters: Adapters) -> None:
    write(adapters.folder("lora") / "ink.safetensors", SD15)
    card = Card(name="toy", family="sd", width_px=64, height_px=64, steps=3, guidance=4.0, sampler="ddim")
    warnings: list[str] = []
    _, (filled,) = find_loras(adapters, [LoraUse(name="INK")], card, warnings=warnings)
    assert (filled.name, warnings) == ("ink", [])
    write(adapters.folder("lora") / "ink.safetensors", SD15, fill=1)
    find_loras(adapters, [filled], card, warnings=warnings)
    assert warnings == ["the LoRA 'ink' holds something else now than when this was asked for"]
