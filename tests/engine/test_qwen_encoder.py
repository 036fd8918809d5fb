"""What Qwen3 is given to read and what comes out, beside diffusers' pipelines; and that no weight is made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdfleet.engine.components import ComponentName, Components
from sdfleet.engine.devices import choose_device
from sdfleet.engine.qwen_encoder import QwenEncoder, encode_qwen, padded_length, plain_prompt, qwen_length
from sdfleet.engine.text_weights import load_qwen3
from sdfleet.errors import BrokenCheckpoint, InvalidValue, UnsupportedByModel
from tests import tiny

Checkpoints = Callable[[str], Path]
KLEIN_LAYERS = (9, 18, 27)
PROMPTS = ["", "a cat", "ein Bär, 一只猫 (in brackets) [and] BREAK", "a dog on the moon " * 12]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


def encoder(folder: Path, *, thinks: bool, max_length: int = 1024) -> QwenEncoder:
    components = Components(folder, choose_device("cpu", "float32"))
    return QwenEncoder(
        tokenizer=components.use("tokenizer"),
        module=components.use("text_encoder"),
        thinks=thinks,
        max_length=max_length,
    )


@pytest.fixture(scope="module")
def klein(checkpoints: Checkpoints) -> tuple[QwenEncoder, Any]:
    return encoder(checkpoints("klein"), thinks=False), tiny.load(checkpoints("klein"))


@pytest.fixture(scope="module")
def zimage(checkpoints: Checkpoints) -> tuple[QwenEncoder, Any]:
    return encoder(checkpoints("zimage"), thinks=True), tiny.load(checkpoints("zimage"))


@pytest.fixture
def folder(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoints("klein") / "text_encoder", tmp_path / "qwen3")


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("prompt", PROMPTS)
def test_for_klein_the_states_are_bit_for_bit_those_of_diffusers(prompt: str, klein: tuple[QwenEncoder, Any]) -> None:
    qwen, pipe = klein
    states, _ = encode_qwen(qwen, plain_prompt(prompt), layers=KLEIN_LAYERS, length=512)

    assert torch.equal(states, pipe.encode_prompt(prompt)[0][0])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_for_zimage_the_states_are_those_of_diffusers_without_its_padding(
    prompt: str, zimage: tuple[QwenEncoder, Any]
) -> None:
    """Up to rounding: diffusers computes 512 tokens and keeps those of the prompt, here only those are computed."""
    qwen, pipe = zimage
    states, _ = encode_qwen(qwen, plain_prompt(prompt), layers=(-2,))
    with torch.inference_mode():
        ((theirs,), _) = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)

    torch.testing.assert_close(states, theirs, atol=1e-5, rtol=1e-5)


def test_a_long_prompt_gets_more_room_and_is_read_to_its_end(klein: tuple[QwenEncoder, Any]) -> None:
    qwen, pipe = klein
    prompt = "a dog on the moon " * 30
    length = padded_length(qwen_length(qwen, prompt))
    states, counted = encode_qwen(qwen, prompt, layers=KLEIN_LAYERS, length=length)

    assert length == 640
    assert torch.equal(states, pipe.encode_prompt(prompt, max_sequence_length=640)[0][0])
    assert (counted.n_tokens, counted.n_chunks) == (len(prompt), 1)


def test_a_prompt_past_the_limit_is_refused_and_not_cut(klein: tuple[QwenEncoder, Any]) -> None:
    with pytest.raises(InvalidValue, match="1024 is this model's limit"):
        encode_qwen(klein[0], "x" * 1024, layers=KLEIN_LAYERS)


def test_tokens_are_counted_without_the_template(zimage: tuple[QwenEncoder, Any]) -> None:
    counts = [encode_qwen(zimage[0], prompt, layers=(-2,))[1].n_tokens for prompt in ("", "x", "xyz")]
    assert counts == [0, 1, 3]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("a cat (orange), [sleeping]", "a cat (orange), [sleeping]"),
        (r"a smile :\) and \[this\]", "a smile :) and [this]"),
        ("a clock (at 10:30)", "a clock (at 10:30)"),
        (r"a poster \(scale 1:2\)", "a poster (scale 1:2)"),
        ("C:\\new", "C:\\new"),
    ],
)
def test_a_prompt_is_read_as_written(source: str, text: str) -> None:
    assert plain_prompt(source) == text


@pytest.mark.parametrize("source", ["(cat:1.2)", "a ((b) c: .5 ) d", "(x:0)", "a (b, c:10)"])
def test_a_weight_is_refused_with_a_way_out(source: str) -> None:
    with pytest.raises(UnsupportedByModel, match="has no weights") as caught:
        plain_prompt(source)
    assert "write" in caught.value.hint


def test_a_tokenizer_without_its_chat_template_is_broken(zimage: tuple[QwenEncoder, Any]) -> None:
    tokenizer = tiny.build_zimage().tokenizer
    tokenizer.chat_template = None
    bare = QwenEncoder(tokenizer=tokenizer, module=zimage[0].module, thinks=True)
    with pytest.raises(BrokenCheckpoint, match="no chat template"):
        encode_qwen(bare, "a cat", layers=(-2,))


@pytest.mark.parametrize("has_head", [False, True], ids=["tied", "head of its own"])
def test_a_causal_model_is_read_without_its_head(folder: Path, *, has_head: bool) -> None:
    """The head may be the embedding table again, and then is not saved."""
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(folder)(IDS, output_hidden_states=True)
    if has_head:
        rewrite(folder / "model.safetensors", lambda w: w | {"lm_head.weight": torch.ones(3, 3)})
    ours = load_qwen3(folder, dtype=torch.float32)(IDS, output_hidden_states=True)

    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_weights_come_in_the_dtype_asked_for(folder: Path) -> None:
    module = load_qwen3(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module.rotary_emb.inv_freq.dtype == torch.float32
    with pytest.raises(InvalidValue, match="float16 does not run on a CPU"):
        load_qwen3(folder, dtype=torch.float16)


@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "layers.26.mlp.up_proj.weight", "layers.0.self_attn.k_norm.weight"]
)
def test_a_missing_weight_is_named(folder: Path, name: str) -> None:
    rewrite(folder / "model.safetensors", lambda w: {n: t for n, t in w.items() if n != f"model.{name}"})
    with pytest.raises(BrokenCheckpoint, match=f"lacks {name}"):
        load_qwen3(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("checkpoint", "component", "weight"),
    [
        ("zimage", "transformer", "cap_pad_token"),
        ("klein", "transformer", "context_embedder.weight"),
        ("klein", "vae", "bn.running_var"),
    ],
)
def test_what_the_files_lack_is_an_error_and_no_random_number(
    checkpoint: str, component: ComponentName, weight: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoints(checkpoint), tmp_path / "x")
    file = copy / component / "diffusion_pytorch_model.safetensors"
    rewrite(file, lambda w: {n: t for n, t in w.items() if n != weight})
    with pytest.raises(BrokenCheckpoint, match=f"lacks weights that its config asks for: {weight}"):
        Components(copy, choose_device("cpu", "float32")).use(component)


def test_too_shallow_an_encoder_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    from tests.engine.drawing import drawing, ours

    copy = shutil.copytree(checkpoints("klein"), tmp_path / "x")
    config = json.loads((copy / "text_encoder/config.json").read_text())
    (copy / "text_encoder/config.json").write_text(json.dumps(config | {"num_hidden_layers": 26}))
    with pytest.raises(UnsupportedByModel, match="has 26 layers, and FLUX"):
        ours(drawing("klein", copy))


def test_mu_is_that_of_diffusers_for_any_size_and_number_of_steps() -> None:
    from sdfleet.engine.noise_schedule import empirical_mu

    theirs = diffusers.pipelines.flux2.pipeline_flux2_klein.compute_empirical_mu
    for n_tokens in (16, 1024, 4096, 4300, 4301, 16384):
        for n_steps in (1, 4, 28, 200, 500):
            assert empirical_mu(n_tokens, n_steps=n_steps) == pytest.approx(theirs(n_tokens, n_steps), abs=1e-9)
