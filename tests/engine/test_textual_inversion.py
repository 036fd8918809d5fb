"""Embeddings are read in the place of their names, as diffusers and the web UI read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdfleet.domain import AdapterFile, JobId
from sdfleet.engine.prompt import parse_prompt, split_into_chunks
from sdfleet.engine.textual_inversion import Words
from tests import loras, tiny, toys
from tests.engine.drawing import drawing, most_levels_apart, ours

Checkpoints = Callable[[str], Path]


def _embedding(path: Path, name: str, tensors: dict[str, torch.Tensor]) -> AdapterFile:
    loras.save(path, tensors)
    return AdapterFile(name=name, path=str(path), content=loras.used(path).file.content)


def _tokens(text: str) -> list[int]:
    return [ord(letter) for letter in text if letter != " "]


def test_each_vector_takes_a_tokens_place() -> None:
    words = Words(["ink-9", "ink"], [torch.zeros(3, 4), torch.zeros(1, 4)])
    assert words.ids(_tokens, "a Ink-9 b, ink") == [97, -1, -2, -3, 98, 44, -257]
    assert words.ids(_tokens, "inky") == _tokens("inky")


def test_an_embedding_is_not_cut_at_the_end_of_a_window() -> None:
    words = Words(["ink"], [torch.zeros(3, 4)])
    chunks = split_into_chunks(
        parse_prompt("abc ink d"), lambda text: words.ids(_tokens, text), window=5, goes_on=Words.goes_on
    )
    assert [chunk.ids for chunk in chunks] == [(97, 98, 99), (-1, -2, -3, 100)]


def test_an_embedding_longer_than_a_window_is_cut_after_all() -> None:
    words = Words(["ink"], [torch.zeros(5, 4)])
    chunks = split_into_chunks(
        parse_prompt("ink"), lambda text: words.ids(_tokens, text), window=4, goes_on=Words.goes_on
    )
    assert [len(chunk.ids) for chunk in chunks] == [4, 1]


@pytest.mark.parametrize("key", ["emb_params", "<ink>"])
def test_the_states_are_those_of_diffusers_with_the_embedding_loaded(
    key: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = checkpoints("sd15")
    vectors = torch.randn(2, toys.CLIP_L_WIDTH, generator=torch.Generator().manual_seed(1))
    file = _embedding(tmp_path / "e.safetensors", "<ink>", {key: vectors})
    pipe = tiny.load(folder)
    pipe.load_textual_inversion({"<ink>": vectors}, token="<ink>")
    with torch.inference_mode():
        states, _ = pipe.encode_prompt("a cat <ink> on the moon", "cpu", 1, do_classifier_free_guidance=False)

    one = drawing("sd15", folder, prompt="a cat <ink> on the moon", embeddings=(file,))
    encoded = _encode(one)

    assert torch.equal(encoded.positive.states, states[0])
    plain = _encode(replace(one, prompt="a cat  on the moon", embeddings=()))
    assert encoded.tokens[0].n_tokens == plain.tokens[0].n_tokens + 2


def _encode(one: Any) -> Any:
    from sdfleet.engine.components import Components
    from sdfleet.engine.devices import choose_device
    from sdfleet.engine.families import FAMILIES
    from sdfleet.engine.prompt_cache import PromptCache

    device = choose_device("cpu", "float32")
    with torch.inference_mode():
        return FAMILIES[one.family](Components(Path(one.checkpoint), device), device, PromptCache(0)).encode(one)


def test_both_of_sdxls_encoders_read_their_own_part(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoints("sdxl")
    pipe = tiny.load(folder)
    (token,) = pipe.tokenizer("cat", add_special_tokens=False).input_ids
    as_cat = {
        "clip_l": pipe.text_encoder.get_input_embeddings().weight[token][None],
        "clip_g": pipe.text_encoder_2.get_input_embeddings().weight[token][None],
    }
    file = _embedding(tmp_path / "e.safetensors", "zxq", {name: t.detach() for name, t in as_cat.items()})

    one = drawing("sdxl", folder, job="a", prompt="a (zxq:1.3) on the moon", embeddings=(file,))
    cat = replace(one, job_id=JobId("b"), prompt="a (cat:1.3) on the moon", embeddings=())
    dog = replace(cat, job_id=JobId("c"), prompt="a (zxq:1.3) on the moon")
    by_embedding, by_word, without = ours(one, cat, dog)

    assert most_levels_apart(by_embedding, by_word) == 0
    assert most_levels_apart(by_embedding, without) > 0
