"""Our networks give what diffusers' and transformers' classes give, and stand aside where they do not know a config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdfleet import starter
from sdfleet.engine.components import Components
from sdfleet.engine.devices import Device
from sdfleet.engine.networks.choice import own_network
from sdfleet.engine.networks.layers import GroupNorm
from sdfleet.errors import BrokenCheckpoint

Checkpoints = Callable[[str], Path]

SD_TOYS = ("sd15", "sd15-inpaint", "sd21", "sdxl", "sdxl-inpaint", "sdxl-refiner")
# Of the largest value of an answer. Most answers are equal bit for bit; where channels lie otherwise in memory, a
# product is summed in another order.
TOLERANCE = 1e-5

# What published checkpoints say, where it is not diffusers' default.
SD15: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}
SD21: dict[str, Any] = {
    "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
    "upcast_attention": True, "dual_cross_attention": False, "only_cross_attention": False, "num_class_embeds": None,
}  # fmt: skip
SDXL: dict[str, Any] = {
    "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
    "block_out_channels": [320, 640, 1280], "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "upcast_attention": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
SDXL_REFINER: dict[str, Any] = SDXL | {
    "cross_attention_dim": 1280, "attention_head_dim": [6, 12, 24, 24], "transformer_layers_per_block": 4,
    "block_out_channels": [384, 768, 1536, 1536], "projection_class_embeddings_input_dim": 2560,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip

# Thin, with what differs between blocks differing.
THIN_UNET: dict[str, Any] = {
    "block_out_channels": [8, 16, 24], "attention_head_dim": [2, 4, 3], "layers_per_block": [1, 2, 1],
    "transformer_layers_per_block": [1, 2, 3], "cross_attention_dim": [12, 20, 20], "norm_num_groups": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
THIN_VAE: dict[str, Any] = {
    "block_out_channels": [8, 12, 16], "down_block_types": ["DownEncoderBlock2D"] * 3, "norm_num_groups": 4,
    "up_block_types": ["UpDecoderBlock2D"] * 3, "sample_size": 32, "layers_per_block": 2,
}  # fmt: skip
THIN_CLIP: dict[str, Any] = {
    "model_type": "clip_text_model", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 12, "projection_dim": 8,
}  # fmt: skip


def in_format(dtype: torch.dtype) -> Device:
    return Device(kind="cpu", dtype=dtype, vae_dtype=dtype, why="a test")


def is_ours(module: object) -> bool:
    return type(module).__module__.startswith("sdfleet.")


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def twin(theirs: Any, config: Mapping[str, Any]) -> Any:
    """Our network of this config with the weights of theirs, whose names must be the same."""
    build = own_network(type(theirs).__name__, config)
    assert build is not None
    ours = build()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval()


def unet_inputs(config: Any, *, height: int = 16, width: int = 16) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Three rows at three times."""
    random = torch.Generator().manual_seed(3)
    context = config.cross_attention_dim
    context = context if isinstance(context, int) else max(context)
    told: dict[str, Any] = {}
    if config.addition_embed_type == "text_time":
        n_waves = config.addition_time_embed_dim
        n_numbers = 5 + config.projection_class_embeddings_input_dim % 2
        rest = config.projection_class_embeddings_input_dim - n_numbers * n_waves
        numbers = torch.randint(0, 1024, (3, n_numbers), generator=random).float()
        text = torch.randn(3, rest, generator=random)
        told["added_cond_kwargs"] = {"text_embeds": text, "time_ids": numbers}
    sample = torch.randn(3, config.in_channels, height, width, generator=random)
    states = torch.randn(3, 7, context, generator=random)
    return (sample, torch.tensor([1.0, 480.5, 999.0]), states), told


@torch.inference_mode()
def answers_apart(ours: Any, theirs: Any, *, height: int = 16, width: int = 16) -> float:
    args, told = unet_inputs(theirs.config, height=height, width=width)
    args = (args[0].to(theirs.dtype), args[1], args[2].to(theirs.dtype))
    return apart(ours(*args, **told)[0], theirs(*args, **told, return_dict=False)[0])


@pytest.mark.parametrize("name", [*SD_TOYS, "built-in"])
def test_a_checkpoint_is_drawn_by_our_networks_and_they_answer_as_diffusers(
    name: str, checkpoints: Checkpoints
) -> None:
    folder = starter.weights_path() if name == "built-in" else checkpoints(name)
    components = Components(folder, in_format(torch.float32))
    unet, vae = components.use("unet"), components.use("vae")
    their_unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    their_vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()

    assert is_ours(unet)
    assert is_ours(vae)
    # The second size has sides that are odd on the way down.
    assert answers_apart(unet, their_unet) <= TOLERANCE
    assert answers_apart(unet, their_unet, height=11, width=13) <= TOLERANCE
    latents = torch.randn(2, vae.config.latent_channels, 6, 4)
    with torch.inference_mode():
        assert apart(vae.decode(latents)[0], their_vae.decode(latents).sample) <= TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_linear_projection": True, "upcast_attention": True},
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 4, "cross_attention_dim": 20},
        {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-4, "in_channels": 9, "out_channels": 8},
        {"block_out_channels": [7, 14, 21], "norm_num_groups": 7, "attention_head_dim": 7},
    ],
)
def test_a_unet_answers_as_diffusers_with_every_option_it_takes(changes: dict[str, Any]) -> None:
    torch.manual_seed(1)
    theirs = diffusers.UNet2DConditionModel(**{**THIN_UNET, **changes}).eval()
    ours = twin(theirs, dict(theirs.config))

    # Blocks of other context widths cannot share states: then those that attend must agree.
    context = theirs.config.cross_attention_dim
    if not isinstance(context, int):
        changed = {**THIN_UNET, **changes, "cross_attention_dim": [20, 20, 20]}
        theirs = diffusers.UNet2DConditionModel(**changed).eval()
        ours = twin(theirs, dict(theirs.config))
    assert answers_apart(ours, theirs) <= TOLERANCE


def test_bfloat16_is_no_further_from_float32_than_diffusers_bfloat16() -> None:
    torch.manual_seed(1)
    exact = diffusers.UNet2DConditionModel(**{**THIN_UNET, "cross_attention_dim": 20}).eval()
    args, told = unet_inputs(exact.config)
    with torch.inference_mode():
        expected = exact(*args, **told)[0]
        half = exact.to(torch.bfloat16)
        args = (args[0].bfloat16(), args[1], args[2].bfloat16())
        theirs = half(*args, **told)[0].float()
        ours = twin(half, dict(half.config))(*args, **told)[0].float()

    assert apart(ours, expected) <= 1.2 * apart(theirs, expected) + 1e-3


@pytest.mark.parametrize(
    ("config", "n_parameters"),
    [
        (SD15, 859_520_964),
        (SD15 | {"in_channels": 9}, 859_535_364),
        (SD21, 865_910_724),
        (SDXL, 2_567_463_684),
        (SDXL_REFINER, 2_259_526_660),
    ],
)
def test_published_unets_are_ours_weight_by_weight(config: dict[str, Any], n_parameters: int) -> None:
    build = own_network("UNet2DConditionModel", {"_class_name": "UNet2DConditionModel", **config})
    assert build is not None
    ours = build().state_dict()
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**config).state_dict()

    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert sum(tensor.numel() for tensor in ours.values()) == n_parameters


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16, "shift_factor": 0.1},
        {"mid_block_add_attention": False, "norm_num_groups": 2},
    ],
)
@pytest.mark.parametrize("is_tiled", [False, True])
@torch.inference_mode()
def test_a_vae_answers_as_diffusers(changes: dict[str, Any], *, is_tiled: bool) -> None:
    torch.manual_seed(2)
    theirs = diffusers.AutoencoderKL(**{**THIN_VAE, **changes}).eval()
    ours = twin(theirs, dict(theirs.config))
    for module in (ours, theirs):
        module.use_tiling = module.use_slicing = is_tiled
    picture, latents = torch.randn(1, 3, 80, 52), torch.randn(2, ours.config.latent_channels, 21, 13)
    believed, their_belief = ours.encode(picture).latent_dist, theirs.encode(picture).latent_dist

    assert apart(ours.decode(latents)[0], theirs.decode(latents).sample) <= TOLERANCE
    assert apart(believed.mean, their_belief.mean) <= TOLERANCE
    assert apart(believed.std, their_belief.std) <= TOLERANCE


def test_a_vae_with_the_layer_names_of_2022_is_read(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("sd15"), tmp_path / "old")
    before = Components(folder, in_format(torch.float32)).use("vae").state_dict()
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, tensor in load_file(path).items():
        old = name
        for now, then in former.items():
            old = old.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        weights[old] = tensor
    assert weights.keys() != before.keys()
    save_file(weights, path, metadata={"format": "pt"})

    after = Components(folder, in_format(torch.float32)).use("vae").state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("class_name", ["CLIPTextModel", "CLIPTextModelWithProjection"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [2, 39])
@torch.inference_mode()
def test_a_clip_answers_as_transformers(class_name: str, activation: str, end: int) -> None:
    torch.manual_seed(4)
    config = {**THIN_CLIP, "hidden_act": activation, "eos_token_id": end}
    theirs = getattr(transformers, class_name)(transformers.CLIPTextConfig(**config)).eval()
    ours = twin(theirs, config)
    # The end mark once in the middle and then as padding, and a shorter row.
    ids = torch.tensor([[38, 5, 6, 39, 39, 39], [38, 7, 8, 9, 10, 39]])
    told, expected = ours(ids, output_hidden_states=True), theirs(ids, output_hidden_states=True)

    assert [apart(a, b) <= TOLERANCE for a, b in zip(told[:2], (expected[0], expected[1]), strict=True)] == [True] * 2
    assert len(told.hidden_states) == len(expected.hidden_states)
    pairs = zip(told.hidden_states, expected.hidden_states, strict=True)
    assert max(apart(a, b) for a, b in pairs) <= TOLERANCE


@pytest.mark.parametrize(
    ("class_name", "config", "odd"),
    [
        *[
            ("UNet2DConditionModel", THIN_UNET, odd)
            for odd in (
                {"time_cond_proj_dim": 256},
                {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
                {"down_block_types": ["CrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"]},
                {"block_out_channels": [8, 16]},
                {"transformer_layers_per_block": [[1, 2], 2, 3]},
                {"only_cross_attention": [True, True, False]},
                {"class_embed_type": "timestep"},
                {"addition_embed_type": "image"},
                {"addition_embed_type": "text_time", "addition_time_embed_dim": None},
                {"encoder_hid_dim": 64},
                {"resnet_time_scale_shift": "scale_shift"},
                {"norm_num_groups": None},
                {"an_option_of_tomorrow": 1},
            )
        ],
        ("AutoencoderKL", THIN_VAE, {"act_fn": "relu"}),
        ("AutoencoderKL", THIN_VAE, {"up_block_types": ["AttnUpDecoderBlock2D"] * 3}),
        ("AutoencoderKL", THIN_VAE, {"down_block_types": ["DownEncoderBlock2D"]}),
        ("AutoencoderKL", THIN_VAE, {"an_option_of_tomorrow": 1}),
        ("CLIPTextModel", THIN_CLIP, {"hidden_act": "relu"}),
        ("CLIPTextModel", THIN_CLIP, {"model_type": "clip"}),
        ("CLIPTextModel", THIN_CLIP, {"text_config": {}}),
        ("CLIPTextModel", THIN_CLIP, {"eos_token_id": [2, 39]}),
        ("SD3Transformer2DModel", {}, {}),
    ],
)
def test_a_config_with_something_unknown_is_left_to_its_own_class(
    class_name: str, config: dict[str, Any], odd: dict[str, Any]
) -> None:
    assert own_network(class_name, {**config, **odd}) is None


def test_whoever_knows_more_draws_what_we_do_not_know(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("sd15"), tmp_path / "odd")
    for part, odd in (("unet", {"resnet_out_scale_factor": 2.0}), ("text_encoder", {"hidden_act": "relu"})):
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    components = Components(folder, in_format(torch.float32))

    assert isinstance(components.use("unet"), diffusers.UNet2DConditionModel)
    assert isinstance(components.use("text_encoder"), transformers.CLIPTextModel)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_unet_that_lacks_a_weight_is_refused_by_its_name(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("sd15"), tmp_path / "torn")
    rewrite(folder / "unet", lambda weights: weights.__delitem__("conv_in.bias"))

    with pytest.raises(BrokenCheckpoint, match=r"lacks conv_in\.bias"):
        Components(folder, in_format(torch.float32)).use("unet")


def test_a_weight_of_another_shape_is_refused_by_its_name(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("sd15"), tmp_path / "torn")
    rewrite(folder / "unet", lambda weights: weights.update({"conv_in.bias": torch.zeros(3)}))

    with pytest.raises(BrokenCheckpoint, match=r"conv_in\.bias as \[3\] where its config says \[4\]"):
        Components(folder, in_format(torch.float32)).use("unet")


def test_a_weight_of_no_use_is_passed_over_as_diffusers_does(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("sd15"), tmp_path / "more")
    rewrite(folder / "vae", lambda weights: weights.update({"loss.logvar": torch.zeros(1)}))

    assert is_ours(Components(folder, in_format(torch.float32)).use("vae"))


def test_modules_are_ready_to_draw_in_the_format_asked_for(checkpoints: Checkpoints) -> None:
    components = Components(checkpoints("sdxl"), in_format(torch.bfloat16))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        module: nn.Module = components.use(name)
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"cpu"}
        assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("side", [8, 31, 33])
@pytest.mark.parametrize("channels", [64, 640])
def test_a_group_norm_is_torchs_own_in_either_layout_and_keeps_the_layout(channels: int, side: int) -> None:
    ours = GroupNorm(16, channels)
    theirs = torch.nn.GroupNorm(16, channels)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    x = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(3))
    for layout in (torch.contiguous_format, torch.channels_last):
        answer = ours(x.contiguous(memory_format=layout))
        assert answer.is_contiguous(memory_format=layout)
        torch.testing.assert_close(answer, theirs(x), rtol=1e-5, atol=1e-6)


def test_a_small_channels_last_map_never_meets_the_slow_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    real = torch.nn.functional.group_norm

    def noted(x: torch.Tensor, *rest: object) -> torch.Tensor:
        given.append(x.is_contiguous())
        return real(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "group_norm", noted)
    norm = GroupNorm(16, 64)
    norm.load_state_dict(torch.nn.GroupNorm(16, 64).state_dict(), assign=True)
    for side in (16, 32):
        norm(torch.zeros(2, 64, side, side).contiguous(memory_format=torch.channels_last))
    assert given == [True, False]
