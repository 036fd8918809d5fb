"""Pictures from checkpoints in one file: the same as from the diffusers folder with the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from sdfleet.catalog import architectures
from sdfleet.catalog.headers import Header
from sdfleet.catalog.single_file.flux import read_flux
from sdfleet.catalog.single_file.gguf_header import PACKED
from sdfleet.catalog.single_file.importing import Imported, import_file
from sdfleet.catalog.single_file.layout import read_layout
from sdfleet.catalog.store import Catalog
from sdfleet.engine.components import Components
from sdfleet.engine.devices import choose_device
from sdfleet.engine.networks.unet import UNetConfig
from sdfleet.engine.single_file import Packed, PackedLinear, check, unpack, wanted_shapes
from sdfleet.errors import BrokenCheckpoint, UnsupportedByModel
from tests import single_files
from tests.engine.drawing import drawing, most_levels_apart, ours, photo, square_mask

KINDS = tuple(single_files.BUILDERS)
Written = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """(folder, file) of a toy checkpoint, written when first asked for; read them only."""
    root = tmp_path_factory.mktemp("single")
    return lambda kind: single_files.write(kind, root)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "models", built_in=(), published_cards=())


def imported(catalog: Catalog, file: Path, *, base: Path | None = None, name: str = "mine") -> Imported:
    return import_file(catalog, file, name=name, base=None if base is None else str(base), prediction=None, check=check)


def _given(kind: str) -> dict[str, Any]:
    if kind == "sdxl-refiner":
        return {"image": photo(), "strength": 0.9}
    more: dict[str, Any] = {"image": photo(), "mask": square_mask(), "strength": 1.0}
    # SD's published schedulers leave the timesteps' spacing to the sampler, the toy's do not. DDIM's is the same.
    return (more if "inpaint" in kind or "fill" in kind else {}) | (
        {"sampler": "ddim"} if kind.startswith(("sd1", "sd2")) else {}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_draws_what_the_folder_of_the_same_weights_draws(
    kind: str, written: Written, catalog: Catalog
) -> None:
    folder, file = written(kind)
    entry = imported(catalog, file, base=folder).entry

    from_file = ours(drawing(kind, entry.folder, **_given(kind)))[0]
    from_folder = ours(drawing(kind, folder, **_given(kind)))[0]

    assert most_levels_apart(from_file, from_folder) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_plan_of_a_single_file_is_that_of_the_folder(kind: str, written: Written, catalog: Catalog) -> None:
    folder, file = written(kind)
    entry = imported(catalog, file, base=folder).entry
    device = choose_device("cpu", "float32")

    assert Components(entry.folder, device).weights() == Components(folder, device).weights()


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl", "sdxl-refiner", "sd3", "sd35", "flux-dev"])
def test_every_missing_and_misshapen_weight_is_refused_at_the_import(
    kind: str, written: Written, catalog: Catalog, tmp_path: Path
) -> None:
    folder, file = written(kind)
    state = load_file(file)
    lost = next(
        name for name in state if name.endswith(("out_layers.3.bias", "x_block.mlp.fc2.bias", "img_mlp.2.bias"))
    )
    bent = next(
        name for name in state if name.endswith(("attn1.to_q.weight", "x_block.attn.qkv.weight", "linear1.weight"))
    )
    for change, told in (
        (lambda: state.pop(lost), "lacks"),
        (lambda: state.update({bent: torch.zeros(state[bent].shape[0] + 1, *state[bent].shape[1:])}), "asks for"),
    ):
        change()
        broken = tmp_path / "broken.safetensors"
        save_file(state, broken)
        with pytest.raises(BrokenCheckpoint, match=told):
            imported(catalog, broken, base=folder)
        assert catalog.entries() == ()
        assert not list((tmp_path / "models").rglob("*.json"))


def test_a_file_that_changed_after_its_import_is_not_drawn_with(
    written: Written, catalog: Catalog, tmp_path: Path
) -> None:
    folder, file = written("sd15")
    own = tmp_path / "own.safetensors"
    shutil.copyfile(file, own)
    entry = imported(catalog, own, base=folder).entry
    own.write_bytes(own.read_bytes()[:-100])

    with pytest.raises(BrokenCheckpoint, match=r"had .* when it was imported"):
        Components(entry.folder, choose_device("cpu", "float32")).use("unet")
    with pytest.raises(BrokenCheckpoint, match=r"had .* when it was imported"):
        catalog.inspect(entry)


def test_a_half_precision_file_is_cast_as_the_folder_is(written: Written, catalog: Catalog, tmp_path: Path) -> None:
    folder, file = written("sdxl")
    half = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, half)
    entry = imported(catalog, half, base=folder).entry
    unet = Components(entry.folder, choose_device("cpu", "float32")).use("unet")

    wanted = Components(folder, choose_device("cpu", "float32")).use("unet").state_dict()
    assert {name: tensor.dtype for name, tensor in unet.state_dict().items()} == dict.fromkeys(wanted, torch.float32)
    assert all(torch.equal(tensor, wanted[name].half().float()) for name, tensor in unet.state_dict().items())


def test_a_text_encoder_of_the_base_is_loaded_from_there(written: Written, catalog: Catalog, tmp_path: Path) -> None:
    folder, file = written("sd15")
    alone = tmp_path / "unet.safetensors"
    prefix = "model.diffusion_model."
    save_file({n.removeprefix(prefix): t for n, t in load_file(file).items() if n.startswith(prefix)}, alone)
    entry = imported(catalog, alone, base=folder).entry

    from_file = ours(drawing("sd15", entry.folder, sampler="ddim"))[0]
    assert most_levels_apart(from_file, ours(drawing("sd15", folder, sampler="ddim"))[0]) <= 1
    assert not list(entry.folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("kind", "convert", "component"),
    [
        *[(kind, "convert_ldm_unet_checkpoint", "unet") for kind in ("sd15", "sd21", "sdxl", "sdxl-refiner")],
        ("sd15", "convert_ldm_vae_checkpoint", "vae"),
        *[(kind, "convert_sd3_transformer_checkpoint_to_diffusers", "transformer") for kind in ("sd3", "sd35")],
    ],
)
def test_renaming_is_what_diffusers_undoes(kind: str, convert: str, component: str, written: Written) -> None:
    """What holds the toy files above, and with them the package's tables, to the names that are published."""
    folder, file = written(kind)
    wanted = load_file(next((folder / component).glob("*.safetensors")))
    config = json.loads((folder / component / "config.json").read_text())

    undone = getattr(single_file_utils, convert)(load_file(file), config=config)

    assert undone.keys() == wanted.keys()
    assert all(torch.equal(undone[name], wanted[name]) for name in wanted)


def test_flux_names_are_what_diffusers_undoes() -> None:
    """At the true width, which diffusers' converter takes for granted, and without numbers."""
    with torch.device("meta"):
        module = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    state = single_files.flux_as_published(dict(module.state_dict()))

    read = read_flux({name: tuple(tensor.shape) for name, tensor in state.items()})
    undone = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(dict(state))

    assert {name: tuple(tensor.shape) for name, tensor in undone.items()} == wanted
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert {name: piece.shape(shapes) for name, piece in read.pieces.items()} == wanted


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl", "flux-dev"])
def test_a_packed_denoiser_draws_nearly_what_the_plain_one_does(
    kind: str, written: Written, catalog: Catalog, tmp_path: Path
) -> None:
    folder, file = written(kind)
    plain = ours(drawing(kind, folder, **_given(kind)))[0].astype(int)
    apart = {}
    for dtype in ("F16", "Q8_0", "Q5_1", "Q4_0"):
        entry = imported(
            catalog, write_gguf(file, tmp_path / f"{dtype}.gguf", dtype), base=folder, name=dtype.lower()
        ).entry
        drawn = ours(drawing(kind, entry.folder, **_given(kind)))[0].astype(int)
        apart[dtype] = abs(drawn - plain).mean()

    assert apart["F16"] < 0.5
    assert apart["F16"] <= apart["Q8_0"] < apart["Q5_1"] < apart["Q4_0"]


def test_a_packed_denoiser_stays_packed_and_is_counted_so(written: Written, catalog: Catalog, tmp_path: Path) -> None:
    folder, file = written("flux-dev")
    entry = imported(catalog, write_gguf(file, tmp_path / "q4.gguf", "Q4_0"), base=folder).entry
    components = Components(entry.folder, choose_device("cpu", "float32"))
    plain = Components(folder, choose_device("cpu", "float32"))
    planned = components.weights().denoiser
    components.use("transformer")

    assert components.resident_bytes() == planned
    assert planned < 0.2 * plain.weights().denoiser


@pytest.mark.parametrize("dtype", sorted(PACKED))
def test_every_packed_format_is_taken_apart_as_its_authors_do(dtype: str) -> None:
    kind = gguf.GGMLQuantizationType[dtype]
    n_numbers, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 40, (6, n_bytes), dtype=np.uint8)

    ours_apart = unpack(torch.from_numpy(blocks), dtype, (6, n_numbers)).float().numpy()

    theirs = gguf.quants.dequantize(blocks, kind)
    # Theirs counts in float32, ours in the blocks' own float16.
    np.testing.assert_allclose(ours_apart, theirs, rtol=2e-3, atol=2e-3 * abs(theirs).max())


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_K"])
def test_a_packed_layer_can_be_compiled_in_one_piece(dtype: str) -> None:
    n_numbers, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
    blocks = torch.from_numpy(np.random.default_rng(0).integers(0, 30, (8, n_bytes), dtype=np.uint8))
    layer = PackedLinear(Packed(blocks=blocks, dtype=dtype, shape=(8, n_numbers)), torch.ones(8))
    x = torch.randn(3, n_numbers)

    compiled = torch.compile(layer, backend="eager", fullgraph=True)

    torch.testing.assert_close(compiled(x), layer(x))


def test_a_kernel_that_lies_flat_gets_its_shape_back(written: Written, catalog: Catalog, tmp_path: Path) -> None:
    folder, file = written("sd15")
    packed = write_gguf(file, tmp_path / "flat.gguf", "Q8_0", flat_kernels=True)
    entry = imported(catalog, packed, base=folder).entry
    unet = Components(entry.folder, choose_device("cpu", "float32")).use("unet")
    wanted = Components(folder, choose_device("cpu", "float32")).use("unet")

    kernel, true = unet.conv_out.weight, wanted.conv_out.weight
    assert kernel.shape == true.shape
    assert float((kernel - true).abs().max()) < 0.02 * float(true.abs().max())


def test_a_truncated_gguf_file_is_refused(written: Written, catalog: Catalog, tmp_path: Path) -> None:
    folder, file = written("flux-dev")
    packed = write_gguf(file, tmp_path / "q8.gguf", "Q8_0")
    packed.write_bytes(packed.read_bytes()[:-1000])

    with pytest.raises(BrokenCheckpoint, match="damaged or truncated"):
        imported(catalog, packed, base=folder)


def test_a_gguf_format_that_is_not_read_is_named(written: Written, catalog: Catalog, tmp_path: Path) -> None:
    folder, file = written("flux-dev")
    packed = write_gguf(file, tmp_path / "tq.gguf", "TQ1_0", least_columns=256)

    with pytest.raises(UnsupportedByModel, match="as TQ1_0, which is not read"):
        imported(catalog, packed, base=folder)


def write_gguf(file: Path, target: Path, dtype: str, *, flat_kernels: bool = False, least_columns: int = 32) -> Path:
    """The denoiser of a toy file as people publish it: bare names, matrices packed, vectors and kernels not."""
    kind = gguf.GGMLQuantizationType[dtype]
    n_numbers, _ = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(target, "flux")
    for name, tensor in load_file(file).items():
        bare = name.removeprefix("model.diffusion_model.")
        if bare == name and name.startswith(("cond_stage", "first_stage", "conditioner", "text_encoders")):
            continue
        data = tensor.numpy()
        if flat_kernels and data.ndim == 4 and data.size % n_numbers == 0:
            writer.add_array(f"comfy.gguf.orig_shape.{bare}", [int(side) for side in data.shape])
            writer.add_tensor(bare, gguf.quants.quantize(data.reshape(-1, n_numbers), kind), raw_dtype=kind)
        elif data.ndim == 2 and data.shape[1] % n_numbers == 0 and data.shape[1] >= least_columns:
            writer.add_tensor(bare, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(bare, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    "name", ["sd15", "sd21", "sdxl", "sd3-medium", "sd3.5-medium", "sd3.5-large", "flux-dev", "flux-schnell"]
)
def test_a_published_models_configs_are_read_off_its_file(name: str) -> None:
    """At full size and without numbers: what the file's shapes give is what the published folder says."""
    known = architectures.load(name)
    states = {component: _empty(part) for component, part in known.parts.items() if component != "scheduler"}
    state: dict[str, torch.Tensor] = {}
    for component, weights in states.items():
        if (known.family, component) == ("sd", "text_encoder"):
            is_second = known.parts[component].config["hidden_size"] == 1024
            prefix, rename = _OPEN_CLIP_OF_SD2 if is_second else _CLIP_OF_SD1
        else:
            prefix, rename = _PUBLISHED[known.family][component]
        state |= {prefix + key: tensor for key, tensor in rename(weights).items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    layout = read_layout(Header(shapes=shapes, bytes_by_dtype={}, n_parameters=0, dtypes=dict.fromkeys(shapes, "F16")))

    assert (layout.pipeline_class, set(layout.parts)) == (known.pipeline, set(states))
    for component, part in layout.parts.items():
        wanted = known.parts[component]
        assert {target: piece.shape(shapes) for target, piece in part.pieces.items()} == {
            key: tuple(tensor.shape) for key, tensor in states[component].items()
        }
        if component == "unet":
            assert UNetConfig.read(part.config) == UNetConfig.read(wanted.config)
            continue
        told = {key: value for key, value in wanted.config.items() if key not in _NOT_OF_THE_WEIGHTS}
        assert {key: part.config.get(key) for key in told} == told, component


# The end mark's id is found in the prompt; OpenCLIP-H's projection is not used; the file holds its codec's true size.
_NOT_OF_THE_WEIGHTS = {"projection_dim"}


def _empty(part: architectures.Part) -> dict[str, torch.Tensor]:
    """The weights of a component without numbers, as a folder has them."""
    names = wanted_shapes(part.class_name, {**part.config})
    return {name: torch.empty(shape, device="meta") for name, shape in names.items()}


def _same(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights


def _without_projection(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if name != "text_projection.weight"}


def _open_clip_h(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return single_files.clip_as_open_clip(weights, has_one_more=True)


def _open_clip_g(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return single_files.clip_as_open_clip(weights, has_one_more=False)


_UNET = ("model.diffusion_model.", single_files.unet_as_published)
_VAE = ("first_stage_model.", single_files.vae_as_published)
_CLIP_OF_SD1 = ("cond_stage_model.transformer.text_model.", _same)
_OPEN_CLIP_OF_SD2 = ("cond_stage_model.model.", _open_clip_h)
_PUBLISHED: dict[str, dict[str, tuple[str, Any]]] = {
    "sd": {"unet": _UNET, "vae": _VAE},
    "sdxl": {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": ("conditioner.embedders.0.transformer.text_model.", _same),
        "text_encoder_2": ("conditioner.embedders.1.model.", _open_clip_g),
    },
    "sd3": {
        "transformer": ("model.diffusion_model.", single_files.sd3_as_published),
        "vae": _VAE,
        "text_encoder": ("text_encoders.clip_l.transformer.", _without_projection),
        "text_encoder_2": ("text_encoders.clip_g.transformer.", _same),
        "text_encoder_3": ("text_encoders.t5xxl.transformer.", _same),
    },
    "flux": {
        "transformer": ("", single_files.flux_as_published),
        "vae": ("vae.", single_files.vae_as_published),
        "text_encoder": ("text_encoders.clip_l.transformer.text_model.", _same),
        "text_encoder_2": ("text_encoders.t5xxl.transformer.", _same),
    },
}
