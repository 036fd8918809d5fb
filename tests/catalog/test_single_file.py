"""What one file is told to be, from names and shapes alone, and what is said where it cannot be drawn with."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sdfleet.catalog.headers import Header
from sdfleet.catalog.single_file.importing import import_file, name_from
from sdfleet.catalog.single_file.layout import read_any_header, read_layout
from sdfleet.catalog.store import Catalog
from sdfleet.errors import (
    BrokenCheckpoint,
    CheckpointNotFound,
    InvalidValue,
    PickleRefused,
    SdfleetError,
    UnknownName,
    UnsupportedByModel,
)
from tests import single_files
from tests.catalog.folders import safetensors

KINDS = {
    "sd15": ("sd", "StableDiffusionPipeline", {"unet", "vae", "text_encoder"}),
    "sd15-inpaint": ("sd", "StableDiffusionInpaintPipeline", {"unet", "vae", "text_encoder"}),
    "sd21": ("sd", "StableDiffusionPipeline", {"unet", "vae", "text_encoder"}),
    "sdxl": ("sdxl", "StableDiffusionXLPipeline", {"unet", "vae", "text_encoder", "text_encoder_2"}),
    "sdxl-inpaint": ("sdxl", "StableDiffusionXLInpaintPipeline", {"unet", "vae", "text_encoder", "text_encoder_2"}),
    "sdxl-refiner": ("sdxl", "StableDiffusionXLImg2ImgPipeline", {"unet", "vae", "text_encoder_2"}),
    "sd3": (
        "sd3",
        "StableDiffusion3Pipeline",
        {"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"},
    ),
    "flux-dev": ("flux", "FluxPipeline", {"transformer"}),
    "flux-fill": ("flux", "FluxFillPipeline", {"transformer"}),
}
Written = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """(folder, file) of a toy checkpoint; read them only."""
    root = tmp_path_factory.mktemp("single")
    return lambda kind: single_files.write(kind, root)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "models", built_in=(), published_cards=())


def put(catalog: Catalog, file: Path, *, name: str = "mine", base: str | Path | None = None) -> Any:
    """Import without looking at every weight, which is the engine's part."""
    return import_file(
        catalog,
        file,
        name=name,
        base=None if base is None else str(base),
        prediction=None,
        check=lambda _: None,
    )


def header_of(*names: str, metadata: Mapping[str, str] | None = None) -> Header:
    shapes = dict.fromkeys(names, (4, 4))
    return Header(
        shapes=shapes,
        bytes_by_dtype={"F16": 32 * len(names)},
        n_parameters=16 * len(names),
        dtypes=dict.fromkeys(names, "F16"),
        metadata=metadata or {},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_family_variant_and_contents_come_from_the_header(kind: str, written: Written, tmp_path: Path) -> None:
    _, file = written(kind)
    # The name says nothing.
    renamed = tmp_path / "something-else.bin.tmp"
    shutil.copyfile(file, renamed)
    layout = read_layout(read_any_header(renamed))
    assert (layout.family, layout.pipeline_class, set(layout.parts)) == KINDS[kind]


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux-dev"])
def test_a_denoiser_alone_is_known_under_each_prefix(kind: str, prefix: str, written: Written) -> None:
    header = read_any_header(written(kind)[1])
    old = "model.diffusion_model."
    shapes = {
        prefix + name.removeprefix(old): shape
        for name, shape in header.shapes.items()
        if name.startswith(old) or kind.startswith("flux")
    }
    alone = Header(shapes=shapes, bytes_by_dtype={}, n_parameters=0, dtypes=dict.fromkeys(shapes, "F32"))
    assert (read_layout(alone).family, len(read_layout(alone).parts)) == (KINDS[kind][0], 1)


@pytest.mark.parametrize(
    ("kind", "extra", "metadata", "asked", "predicted"),
    [
        ("sd15", (), {}, None, "epsilon"),
        ("sd15", (), {}, "v", "v_prediction"),
        ("sd21", (), {}, None, "v_prediction"),
        ("sd21", (), {}, "epsilon", "epsilon"),
        ("sd21", (), {"modelspec.prediction_type": "epsilon"}, None, "epsilon"),
        ("sdxl", ("v_pred",), {}, None, "v_prediction"),
        ("sdxl", (), {"modelspec.prediction_type": "v"}, None, "v_prediction"),
    ],
)
def test_what_a_unet_predicts_is_told_by_the_header_or_the_person_or_assumed(
    written: Written, kind: str, extra: tuple[str, ...], metadata: dict[str, str], asked: Any, predicted: str
) -> None:
    read = read_any_header(written(kind)[1])
    header = Header(
        shapes={**read.shapes, **dict.fromkeys(extra, (0,))},
        bytes_by_dtype={},
        n_parameters=0,
        dtypes=read.dtypes,
        metadata=metadata,
    )
    layout = read_layout(header, prediction=asked)
    assert layout.scheduler.config["prediction_type"] == predicted
    is_assumed = not extra and not metadata and asked is None
    assert [("--prediction" in note) for note in layout.notes] == [True] * is_assumed


def test_a_schedule_without_signal_at_its_end_is_told_by_its_mark(written: Written) -> None:
    read = read_any_header(written("sdxl")[1])
    shapes = {**read.shapes, "v_pred": (0,), "ztsnr": (0,)}
    config = read_layout(Header(shapes=shapes, bytes_by_dtype={}, n_parameters=0, dtypes=read.dtypes)).scheduler.config
    assert (config["rescale_betas_zero_snr"], config["timestep_spacing"]) == (True, "trailing")


def test_a_flow_model_has_no_prediction_to_choose(written: Written) -> None:
    with pytest.raises(UnsupportedByModel, match="leave --prediction out"):
        read_layout(read_any_header(written("flux-dev")[1]), prediction="v")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["lora_unet_down_blocks_0.lora_up.weight"], "is a LoRA"),
        (["transformer.x.lora_A.weight"], "is a LoRA"),
        (["control_model.input_hint_block.0.weight"], "is a ControlNet"),
        (["distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight"], "is a Chroma model"),
        (["double_stream_modulation_img.lin.weight"], "is a FLUX.2 model"),
        (["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.scale_weight"], "scales beside"),
        (["double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4"], "bitsandbytes"),
        (["decoder.conv_in.weight"], "holds no denoiser"),
        (["transformer_blocks.0.attn.to_q.weight"], "holds no denoiser"),
    ],
)
def test_what_is_no_checkpoint_is_told_what_it_is(names: list[str], told: str) -> None:
    with pytest.raises(UnsupportedByModel, match=told) as caught:
        read_layout(header_of(*names))
    assert caught.value.hint


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model.safetensors"])
@pytest.mark.parametrize("start", [b"\x80\x02}q\x00", b"zip"])
def test_a_pickle_is_refused_by_any_name(tmp_path: Path, catalog: Catalog, name: str, start: bytes) -> None:
    path = tmp_path / name
    if start == b"zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02")
    else:
        path.write_bytes(start)
    with pytest.raises(PickleRefused, match=r"convert it to \.safetensors"):
        put(catalog, path)


def test_a_truncated_file_is_refused(written: Written, catalog: Catalog, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(written("sd15")[1].read_bytes()[:-1000])
    with pytest.raises(BrokenCheckpoint, match=r"1000 of .* bytes of weights are missing"):
        put(catalog, path)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("flux-dev", ["FLUX.1 (its denoiser alone)", "the vae is missing", "the text_encoder is missing",
                      "the text_encoder_2 is missing"]),
        ("sd15", ["Stable Diffusion (with vae, text_encoder)", "the tokenizer (CLIP's vocabulary of 519 tokens)"]),
    ],
)  # fmt: skip
def test_everything_that_is_missing_is_told_at_once(
    kind: str, told: list[str], written: Written, catalog: Catalog, tmp_path: Path
) -> None:
    with pytest.raises(BrokenCheckpoint) as caught:
        put(catalog, written(kind)[1])
    assert [words in caught.value.message for words in told] == [True] * len(told), caught.value.message
    assert "--base NAME_OR_FOLDER" in str(caught.value.hint)
    assert not list((tmp_path / "models").rglob("*.*"))


def test_what_a_file_lacks_comes_from_the_base(written: Written, catalog: Catalog) -> None:
    folder, file = written("flux-dev")
    catalog.add(folder, name="whole")
    done = put(catalog, file, base="whole")
    assert (done.entry.card.family, done.entry.card.guidance) == ("flux", 3.5)
    assert {part.name: part.n_bytes for part in catalog.inspect(done.entry).components if part.n_bytes} == {
        part.name: part.n_bytes for part in catalog.inspect(catalog.resolve("whole")).components if part.n_bytes
    }
    assert done.notes == tuple(
        f"the {name} is taken from {folder / name}" for name in ("vae", "text_encoder", "text_encoder_2")
    )


def test_a_base_that_is_gone_is_told(written: Written, catalog: Catalog, tmp_path: Path) -> None:
    folder, file = written("flux-dev")
    own = tmp_path / "base"
    shutil.copytree(folder, own)
    entry = put(catalog, file, base=own).entry
    shutil.rmtree(own)
    with pytest.raises(BrokenCheckpoint, match="which is not there any more") as caught:
        catalog.inspect(entry)
    assert "3 faults" in caught.value.message


def test_kontext_is_told_by_its_base(written: Written, catalog: Catalog, tmp_path: Path) -> None:
    folder, file = written("flux-dev")
    own = tmp_path / "base"
    shutil.copytree(folder, own)
    index = json.loads((own / "model_index.json").read_text())
    (own / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxKontextPipeline"}))
    assert catalog.inspect(put(catalog, file, base=own).entry).pipeline_class == "FluxKontextPipeline"


@pytest.mark.parametrize(
    ("base", "error", "told"),
    [
        ("sdxl", BrokenCheckpoint, "is flux, the base .* is sdxl"),
        ("file", CheckpointNotFound, "is a file"),
        ("nothing", UnknownName, "nothing"),
    ],
)
def test_a_base_that_cannot_be_one_is_refused(
    base: str, error: type[SdfleetError], told: str, written: Written, catalog: Catalog
) -> None:
    places = {"sdxl": str(written("sdxl")[0]), "file": str(written("sdxl")[1]), "nothing": "nothing"}
    with pytest.raises(error, match=told):
        put(catalog, written("flux-dev")[1], base=places[base])


def test_text_encoders_of_another_width_are_refused(written: Written, catalog: Catalog, tmp_path: Path) -> None:
    folder, file = written("flux-dev")
    own = tmp_path / "base"
    shutil.copytree(folder, own)
    config = own / "text_encoder_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"d_model": 96}))
    with pytest.raises(BrokenCheckpoint, match="the text_encoder_2 is 96 wide where the transformer takes 128"):
        put(catalog, file, base=own)


def test_clips_vocabulary_is_taken_from_any_model_that_is_here(written: Written, catalog: Catalog) -> None:
    catalog.add(written("sdxl")[0], name="other")
    entry = put(catalog, written("sd21")[1]).entry
    marks = json.loads((entry.folder / "tokenizer/tokenizer_config.json").read_text())
    assert (marks["pad_token"], marks["eos_token"]) == ("!", "<|endoftext|>")
    assert catalog.inspect(entry).family == "sd"


def test_sd3_goes_without_its_t5_where_nobody_has_the_tokenizer(written: Written, catalog: Catalog) -> None:
    catalog.add(written("sdxl")[0], name="other")
    done = put(catalog, written("sd3")[1])
    assert catalog.inspect(done.entry).t5 == "left_out"
    assert "its T5 is left out" in done.notes[-1]


def test_an_import_leaves_the_file_as_it_was_and_copies_no_weight(
    written: Written, catalog: Catalog, tmp_path: Path
) -> None:
    folder, file = written("sdxl")
    before = (file.stat().st_mtime_ns, file.stat().st_size)
    put(catalog, file, base=folder)
    assert (file.stat().st_mtime_ns, file.stat().st_size) == before
    assert not list((tmp_path / "models").rglob("*.safetensors"))


def test_removing_an_import_leaves_the_file_and_the_base(written: Written, catalog: Catalog, tmp_path: Path) -> None:
    folder, file = written("flux-dev")
    put(catalog, file, base=folder)
    catalog.forget("mine")
    assert file.is_file()
    assert (folder / "vae").is_dir()
    assert not list((tmp_path / "models").rglob("*.*"))


def test_the_same_file_again_renews_and_another_is_refused(written: Written, catalog: Catalog, tmp_path: Path) -> None:
    folder, file = written("sd15")
    put(catalog, file, base=folder)
    put(catalog, file, base=folder)
    other = tmp_path / "other.safetensors"
    shutil.copyfile(file, other)
    with pytest.raises(InvalidValue, match="already stands for"):
        put(catalog, other, base=folder)


@pytest.mark.parametrize("name", ["../x", "UPPER", "", "a/b"])
def test_a_name_that_could_be_a_path_writes_nothing(
    name: str, written: Written, catalog: Catalog, tmp_path: Path
) -> None:
    with pytest.raises(InvalidValue):
        put(catalog, written("sd15")[1], name=name, base=written("sd15")[0])
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Model v1.5 (FP16).safetensors", "model-v1.5-fp16"),
        ("..safetensors", "model"),
        ("flux1-dev-Q4_K_S.gguf", "flux1-dev-q4_k_s"),
    ],
)
def test_a_file_gets_a_name_of_its_own(path: str, name: str) -> None:
    assert name_from(Path("/somewhere") / path) == name


def test_a_header_that_lies_about_its_blocks_is_refused(tmp_path: Path, catalog: Catalog) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(safetensors({"input_blocks.0.0.weight": (4, 4, 3, 3), "out.2.weight": (4, 4, 3, 3)}))
    with pytest.raises(SdfleetError, match=r"not those of a UNet|no attention"):
        put(catalog, path)
