"""A LoRA's picture is that of a checkpoint with the LoRA merged into it, by diffusers; without it nothing changes.

Tolerance: 1 level of 255 in float32, as in test_equality.py. What the authors' names of layers stand for is asked of
diffusers' own converters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdfleet.domain import JobId, Lora
from sdfleet.engine.components import Components
from sdfleet.engine.devices import choose_device
from sdfleet.engine.engine import Engine
from sdfleet.engine.events import EngineOptions, JobDone, JobFailed
from sdfleet.engine.lora import Loras
from sdfleet.errors import UnsupportedByModel
from tests import loras, tiny, toys
from tests.engine.drawing import FLOAT32, drawing, most_levels_apart, ours, pictures, run, theirs

Checkpoints = Callable[[str], Path]

FAMILIES = ("sd15", "sd21", "sdxl", "sd3", "flux-dev")
# Drawn by diffusers' pipelines in other tests; here merged weights drawn by us are as good.
OTHER_FAMILIES = ("klein", "zimage")


def _done(engine: Engine, *drawings: Any) -> list[JobDone]:
    for one in drawings:
        engine.submit(one)
    return [event for event in run(engine) if isinstance(event, JobDone)]


@pytest.fixture
def engine() -> Any:
    made = Engine(FLOAT32)
    yield made
    made.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_kohyas_layout_draws_what_diffusers_draws_with_merged_weights(
    name: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = checkpoints(name)
    changes = loras.changes_for(folder)
    lora = loras.used(loras.save(tmp_path / "a.safetensors", loras.as_kohya(changes)), 0.7)
    one = drawing(name, folder, steps=3, loras=(lora,))

    picture = ours(one)[0]

    like = replace(one, checkpoint=str(loras.merged(folder, tmp_path / "merged", (changes, 0.7))), loras=())
    assert most_levels_apart(picture, theirs(like)) <= 1
    assert most_levels_apart(picture, ours(replace(one, loras=()))[0]) > 5


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_networks_with_qwen_draw_as_with_merged_weights(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoints(name)
    changes = loras.changes_for(folder, has_text=False)
    lora = loras.used(loras.save(tmp_path / "a.safetensors", loras.as_diffusers(changes)), 0.5)
    one = drawing(name, folder, steps=2, loras=(lora,))

    merged = loras.merged(folder, tmp_path / "merged", (changes, 0.5))

    picture = ours(one)[0]
    assert most_levels_apart(picture, ours(replace(one, checkpoint=str(merged), loras=()))[0]) <= 1
    assert most_levels_apart(picture, ours(replace(one, loras=()))[0]) > 5


@pytest.mark.parametrize("write", [loras.as_diffusers, loras.as_first_diffusers])
def test_diffusers_layouts_draw_the_same_as_kohyas(
    write: Callable[[loras.Changes], dict[str, Tensor]], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = checkpoints("sdxl")
    changes = loras.changes_for(folder)
    one = loras.used(loras.save(tmp_path / "a.safetensors", loras.as_kohya(changes)))
    other = loras.used(loras.save(tmp_path / "b.safetensors", write(changes)))

    first, second = ours(
        drawing("sdxl", folder, job="a", loras=(one,)), drawing("sdxl", folder, job="b", loras=(other,))
    )

    assert most_levels_apart(first, second) == 0


def test_pefts_layout_takes_alpha_from_the_config_beside_it(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoints("sd15")
    changes = loras.changes_for(folder, has_text=False)
    kohya = loras.save(tmp_path / "a.safetensors", loras.as_kohya(changes))
    peft = loras.save(tmp_path / "b" / "adapter_model.safetensors", loras.as_peft(changes, component="unet"))
    (peft.parent / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1}))

    first, second = ours(
        drawing("sd15", folder, job="a", loras=(loras.used(kohya),)),
        drawing("sd15", folder, job="b", loras=(loras.used(peft),)),
    )

    assert most_levels_apart(first, second) == 0


def test_alpha_is_read_from_what_diffusers_writes_into_the_header(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoints("sd15")
    changes = loras.changes_for(folder, has_text=False)
    tensors = {name.replace("base_model.model.", "unet."): tensor
               for name, tensor in loras.as_peft(changes, component="unet").items()}  # fmt: skip
    told = {"format": "pt", "lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 1})}
    kohya = loras.save(tmp_path / "a.safetensors", loras.as_kohya(changes))
    theirs_ = loras.save(tmp_path / "b.safetensors", tensors, metadata=told)

    first, second = ours(
        drawing("sd15", folder, job="a", loras=(loras.used(kohya),)),
        drawing("sd15", folder, job="b", loras=(loras.used(theirs_),)),
    )

    assert most_levels_apart(first, second) == 0


# Names that the authors gave layers, as kohya's files have them, with (out, in) in the toy. Not FLUX.1's linear1: the
# converter cuts that where the published model's width is, and tests/engine/test_single_files.py has its order.
AUTHORS: dict[str, dict[str, tuple[int, ...]]] = {
    "sdxl": {
        "input_blocks_3_1_transformer_blocks_0_attn1_to_q": (8, 8),
        "input_blocks_3_1_transformer_blocks_0_attn2_to_k": (8, 96),
        "input_blocks_3_1_proj_in": (8, 8),
        "middle_block_1_transformer_blocks_0_ff_net_2": (8, 32),
        "output_blocks_1_1_transformer_blocks_0_attn1_to_out_0": (8, 8),
        "input_blocks_1_0_in_layers_2": (4, 4, 3, 3),
        "input_blocks_2_0_op": (4, 4, 3, 3),
        "input_blocks_3_0_emb_layers_1": (8, 16),
        "output_blocks_1_2_conv": (8, 8, 3, 3),
        "output_blocks_2_0_skip_connection": (4, 12, 1, 1),
    },
    "flux-dev": {
        "double_blocks_0_img_attn_qkv": (96, 32),
        "double_blocks_0_txt_attn_qkv": (96, 32),
        "double_blocks_0_img_attn_proj": (32, 32),
        "double_blocks_0_txt_mlp_2": (32, 128),
        "double_blocks_0_img_mod_lin": (192, 32),
        "single_blocks_0_linear2": (32, 160),
        "single_blocks_0_modulation_lin": (96, 32),
    },
    "klein": {
        "double_blocks.0.img_attn.qkv": (96, 32),
        "double_blocks.0.txt_attn.proj": (32, 32),
        "double_blocks.0.img_mlp.0": (192, 32),
        "single_blocks.0.linear1": (288, 32),
        "single_blocks.0.linear2": (32, 128),
    },
    "zimage": {
        "layers_0_attention_qkv": (96, 32),
        "layers_1_attention_out": (32, 32),
        "layers_0_feed_forward_w1": (85, 32),
    },
}


def _by_diffusers(name: str, pipe: Any, tensors: dict[str, Tensor]) -> loras.Changes:
    """The changes by diffusers' names, by diffusers' own converter."""

    def today(key: str) -> str:
        # An older spelling, which diffusers itself turns into this when it loads.
        key = key.replace(".processor.", ".").replace("to_out_lora", "to_out.0.lora").replace("_lora.", ".lora.")
        return key.replace(".lora.down.weight", ".lora_A.weight").replace(".lora.up.weight", ".lora_B.weight")

    more = {"unet_config": pipe.unet.config} if name == "sdxl" else {}
    converted = type(pipe).lora_state_dict(dict(tensors), **more)
    alphas: dict[str, float] = {}
    if isinstance(converted, tuple):
        converted, found = converted[:2]
        alphas = {today(key).removesuffix(".alpha").removesuffix(".lora_A.weight"): v for key, v in found.items()}
    converted = {today(key): tensor for key, tensor in converted.items()}
    changes: loras.Changes = {}
    for key, down in converted.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removesuffix(".lora_A.weight")
            component, _, within = layer.partition(".")
            # Where no alpha came out it is in the tensors.
            changes[component, within] = (down, converted[f"{layer}.lora_B.weight"], alphas.get(layer, loras.RANK))
    return changes


@pytest.mark.parametrize("name", AUTHORS)
def test_authors_names_mean_the_layers_that_diffusers_takes_them_for(
    name: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = checkpoints(name)
    pipe = tiny.load(folder)
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for layer, shape in AUTHORS[name].items():
        down, up, alpha = loras.drawn(shape, generator, gain=0.3)
        # diffusers reads FLUX.2's in this spelling alone.
        prefix, kinds = ("diffusion_model.", "AB") if name == "klein" else ("lora_unet_", ("down", "up"))
        tensors |= {f"{prefix}{layer}.lora_{kinds[0]}.weight": down, f"{prefix}{layer}.lora_{kinds[1]}.weight": up}
        if name != "klein":
            tensors[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
    path = loras.save(tmp_path / "a.safetensors", tensors)

    changes = _by_diffusers(name, pipe, tensors)
    one = drawing(name, folder, steps=2, loras=(loras.used(path),))
    bare = replace(one, job_id=JobId("bare"), loras=())
    picture, without = ours(one, bare)

    assert len(changes) >= len(AUTHORS[name])
    merged = loras.merged(folder, tmp_path / "merged", (changes, 1.0))
    assert most_levels_apart(picture, ours(replace(bare, checkpoint=str(merged)))[0]) <= 1
    assert most_levels_apart(picture, without) > 0


def test_fluxs_single_blocks_are_cut_as_the_checkpoint_is(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoints("flux-dev")
    down, up, alpha = loras.drawn((224, 32), torch.Generator().manual_seed(4), gain=0.3)
    key = "lora_unet_single_blocks_0_linear1"
    whole = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    layers = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    cut: loras.Changes = {
        ("transformer", f"single_transformer_blocks.0.{layer}"): (down, rows, alpha)
        for layer, rows in zip(layers, up.split([32, 32, 32, 128]), strict=True)
    }

    by_authors = loras.used(loras.save(tmp_path / "a.safetensors", whole))
    by_diffusers = loras.used(loras.save(tmp_path / "b.safetensors", loras.as_kohya(cut)))

    one, other = ours(
        drawing("flux-dev", folder, job="a", steps=2, loras=(by_authors,)),
        drawing("flux-dev", folder, job="b", steps=2, loras=(by_diffusers,)),
    )

    assert most_levels_apart(one, other) == 0


@pytest.fixture
def two_loras(checkpoints: Checkpoints, tmp_path: Path) -> tuple[Path, Path]:
    """Two files for sd15 with other numbers."""
    folder = checkpoints("sd15")
    return tuple(  # type: ignore[return-value]  # of two
        loras.save(tmp_path / f"{seed}.safetensors", loras.as_kohya(loras.changes_for(folder, seed=seed)))
        for seed in (1, 2)
    )


def test_scale_0_and_pictures_after_a_lora_are_the_original_to_the_byte(
    checkpoints: Checkpoints, two_loras: tuple[Path, Path], engine: Engine
) -> None:
    one = drawing("sd15", checkpoints("sd15"))

    def drawn(job: str, *used: Lora) -> Any:
        engine.submit(replace(one, job_id=JobId(job), loras=used))
        return pictures(run(engine))[job, 0]

    before = drawn("before")
    changed = drawn("with", loras.used(two_loras[0]))
    zero = drawn("zero", loras.used(two_loras[0], 0.0))

    assert most_levels_apart(changed, before) > 5
    assert (zero == before).all()
    assert (drawn("after") == before).all()


def test_a_batch_of_two_sets_and_none_gives_each_its_own_picture(
    checkpoints: Checkpoints, two_loras: tuple[Path, Path]
) -> None:
    one = drawing("sd15", checkpoints("sd15"))
    first, second = loras.used(two_loras[0]), loras.used(two_loras[1], -0.5, text_scale=0.25)
    sets: dict[str, tuple[Lora, ...]] = {"none": (), "first": (first,), "second": (second,), "both": (first, second)}
    drawings = [replace(one, job_id=JobId(name), loras=used) for name, used in sets.items()]

    together = ours(*drawings)

    for picture, each in zip(together, drawings, strict=True):
        assert most_levels_apart(picture, ours(each)[0]) == 0
    assert min(most_levels_apart(a, b) for i, a in enumerate(together) for b in together[:i]) > 5


def test_two_loras_at_once_are_the_sum_of_both(
    checkpoints: Checkpoints, two_loras: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = checkpoints("sd15")
    both = (loras.used(two_loras[0], 0.5), loras.used(two_loras[1], -0.75))
    one = drawing("sd15", folder, loras=both)

    parts = [(loras.changes_for(folder, seed=seed), scale) for seed, scale in ((1, 0.5), (2, -0.75))]
    merged = loras.merged(folder, tmp_path / "merged", *parts)

    assert most_levels_apart(ours(one)[0], ours(replace(one, checkpoint=str(merged), loras=()))[0]) <= 1


def test_the_text_encoders_scale_is_their_own(
    checkpoints: Checkpoints, two_loras: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = checkpoints("sd15")
    one = drawing("sd15", folder, loras=(loras.used(two_loras[0], 0.0, text_scale=0.8),))
    changes = loras.changes_for(folder, seed=1)
    text = {place: change for place, change in changes.items() if place[0] == "text_encoder"}
    merged = loras.merged(folder, tmp_path / "merged", (text, 0.8))

    assert most_levels_apart(ours(one)[0], ours(replace(one, checkpoint=str(merged), loras=()))[0]) <= 1


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(device="cpu", dtype="bfloat16", n_threads=1),
        EngineOptions(device="cpu", dtype="float32", n_threads=1, memory_mode="eco"),
        EngineOptions(device="cpu", dtype="float32", n_threads=1, weights="fp8"),
    ],
    ids=["packed bfloat16", "by phase", "fp8"],
)
def test_every_format_of_weights_takes_loras_and_is_itself_again(
    options: EngineOptions, checkpoints: Checkpoints, two_loras: tuple[Path, Path]
) -> None:
    one = drawing("sd15", checkpoints("sd15"), steps=2)
    with_lora = replace(one, job_id=JobId("with"), loras=(loras.used(two_loras[0]),))

    together = ours(one, with_lora, options=options)

    assert most_levels_apart(*together) > 3
    assert most_levels_apart(together[0], ours(one, options=options)[0]) == 0
    assert most_levels_apart(together[1], ours(with_lora, options=options)[0]) == 0


def test_a_lora_of_another_checkpoint_is_refused_naming_both_sides(
    checkpoints: Checkpoints, engine: Engine, tmp_path: Path
) -> None:
    changes = loras.changes_for(checkpoints("sd3"), has_text=False)
    path = loras.save(tmp_path / "ink.safetensors", loras.as_kohya(changes))

    engine.submit(drawing("sd15", checkpoints("sd15"), loras=(loras.used(path, text_scale=0.0),)))
    (failed,) = [event for event in run(engine) if isinstance(event, JobFailed)]

    assert isinstance(failed.error, UnsupportedByModel)
    assert "'ink' fits no layer" in str(failed.error)
    assert f"it changes {len(changes)} layers, such as context_embedder;" in str(failed.error)
    assert "the checkpoint is Stable Diffusion" in str(failed.error)
    assert "draw with a checkpoint of the kind" in failed.error.hint


def test_layers_without_a_place_are_counted_and_named(checkpoints: Checkpoints, engine: Engine, tmp_path: Path) -> None:
    changes = loras.changes_for(checkpoints("sd15"))
    tensors = loras.as_kohya(changes) | loras.as_kohya({("unet", "nowhere.to_q"): next(iter(changes.values()))})
    path = loras.save(tmp_path / "ink.safetensors", tensors)

    (done,) = _done(engine, drawing("sd15", checkpoints("sd15"), loras=(loras.used(path),)))

    n = len(changes)
    assert (
        f"1 of {n + 1} layers of the LoRA 'ink' have no place in this checkpoint and were left out: nowhere_to_q"
        in (done.warnings)
    )


def test_files_that_were_used_stay_within_the_budget(checkpoints: Checkpoints, two_loras: tuple[Path, Path]) -> None:
    device = choose_device("cpu", "float32")
    components = Components(checkpoints("sd15"), device)
    one = Loras(components, device, family="sd")
    with one.on_denoiser((loras.used(two_loras[0]),), "unet"):
        n_bytes = one.resident_bytes()
    small = Loras(components, device, family="sd", most_bytes=n_bytes + n_bytes // 2)
    for path in (*two_loras, two_loras[0]):
        with small.on_denoiser((loras.used(path),), "unet"):
            assert small.resident_bytes() == n_bytes
    small.take_off()


def test_what_stands_for_the_denoiser_makes_room_for_torch_while_a_lora_is_on(
    checkpoints: Checkpoints, two_loras: tuple[Path, Path]
) -> None:
    device = choose_device("cpu", "float32")
    components = Components(checkpoints("sd15"), device)
    faster = object()
    components.serve("unet", lambda: faster)
    one = Loras(components, device, family="sd")

    with one.on_denoiser((loras.used(two_loras[0]),), "unet"):
        assert isinstance(components.use("unet"), torch.nn.Module)
        n_bytes = components.resident_bytes()
    with one.on_denoiser((), "unet"):
        assert components.use("unet") is faster
    assert n_bytes > 0
    assert one.drop()
    assert components.resident_bytes() == 0


def test_what_was_compiled_without_a_lora_is_not_used_with_one(
    checkpoints: Checkpoints, two_loras: tuple[Path, Path]
) -> None:
    device = choose_device("cpu", "float32")
    components = Components(checkpoints("sd15"), device)
    unet = components.use("unet")
    one = Loras(components, device, family="sd")
    lora = loras.used(two_loras[0])

    def answer(*used: Lora) -> Tensor:
        with torch.inference_mode(), one.on_denoiser(used, "unet"):
            told: Tensor = unet(
                torch.ones(1, 4, 8, 8), torch.tensor([500.0]), torch.ones(1, 77, toys.CLIP_L_WIDTH), return_dict=False
            )[0]
            return told

    bare, changed = answer(), answer(lora)
    for block in unet.down_blocks:
        block.compile(backend="eager")

    assert torch.equal(answer(), bare)
    assert torch.equal(answer(lora), changed)
    assert torch.equal(answer(), bare)
    torch.compiler.reset()
