"""Training at toy size: it learns, it resumes to the same weights, and its parts fit together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdfleet.train.dataset import PictureSet, draw_pictures, load_latent_map
from sdfleet.train.denoiser import Drawing, Recipe, draw_batch, drawing_loss, train_denoiser
from sdfleet.train.latents import LatentMap, fit_latent_map, to_signed
from sdfleet.train.learner import Learner, Plan
from sdfleet.train.muon import orthogonalise
from sdfleet.train.networks import Sizes, make_denoiser, make_sampler, make_text_encoder
from sdfleet.train.tokens import MAX_TOKENS, encode_captions, train_tokenizer

TOY = Sizes(text_width=32, text_layers=1, widths=(16, 32), attends=(False, True), norm_groups=8, vae_widths=(16, 16))
RECIPE = Recipe(batch=8, lr=4e-3)
MAP = LatentMap(weight=torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 8, bias=torch.zeros(8))
EMPTY = torch.zeros(MAX_TOKENS, dtype=torch.long)


class _ToyEncoder(nn.Module):
    """Token states without a tokenizer: an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(64, TOY.text_width)

    def forward(self, tokens: Tensor) -> _States:
        return _States(self.token_embedding(tokens))


class _States:
    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states


@pytest.fixture(scope="module")
def pictures() -> PictureSet:
    rng = np.random.default_rng(0)
    drawn = draw_pictures(64, 3)
    latents = MAP.encode(drawn).numpy().astype(np.float16)
    labels = rng.integers(0, 10, (64, 16, 16), dtype=np.uint8)
    return PictureSet(latents=latents, labels=labels, tokens=rng.integers(0, 64, (64, 6, MAX_TOKENS), dtype=np.int16))


def _drawing() -> Drawing:
    torch.manual_seed(0)
    return Drawing(_ToyEncoder(), make_denoiser(TOY))


def _train(folder: Path, pictures: PictureSet, planned_samples: int) -> Learner:
    plan = Plan(planned_samples=planned_samples, cooldown_samples=16, warmup_samples=8)
    return train_denoiser(_drawing(), pictures, folder, empty=EMPTY, latent_map=MAP, recipe=RECIPE, seed=1, plan=plan)


def test_training_lowers_the_loss(pictures: PictureSet) -> None:
    learner = Learner(_drawing(), lr=4e-3)
    signal = make_sampler().alphas_cumprod
    losses: list[float] = []
    for _ in range(20):
        chance = torch.Generator().manual_seed(4)
        batch = draw_batch(pictures, chance, n=8, level_bias=0.3, empty=EMPTY, signal=signal, latent_map=MAP)
        drawing = learner.module
        assert isinstance(drawing, Drawing)
        loss, _ = drawing_loss(drawing, batch, RECIPE, evenness=0.0)
        learner.update(loss, n_samples=8, rate=1.0)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path: Path, pictures: PictureSet) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    uninterrupted = _train(whole, pictures, 64)
    _train(halves, pictures, 64)
    (halves / "denoiser-before-cooldown.pt").rename(halves / "denoiser.pt")
    resumed = _train(halves, pictures, 64)
    assert resumed.samples_seen == uninterrupted.samples_seen == 64
    assert all(torch.equal(a, b) for a, b in zip(resumed.masters, uninterrupted.masters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(resumed.mean, uninterrupted.mean, strict=True))


def test_a_plan_file_ends_a_run_early(tmp_path: Path, pictures: PictureSet) -> None:
    (tmp_path / "plan.json").write_text('{"planned_samples": 24, "cooldown_samples": 8}')
    assert _train(tmp_path, pictures, 64).samples_seen == 24


def test_the_written_out_forward_pass_is_the_networks_own() -> None:
    drawing = _drawing().eval()
    noisy = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    levels = torch.tensor([10, 999])
    tokens = torch.randint(64, (2, MAX_TOKENS), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, _, _ = drawing(noisy, levels, tokens)
        states = drawing.encoder(tokens).last_hidden_state
        theirs = drawing.unet(noisy, levels, states).sample
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_rate_warms_up_stays_and_cools_down() -> None:
    plan = Plan(planned_samples=1000, cooldown_samples=200, warmup_samples=100)
    assert plan.rate(0) == pytest.approx(0.01)
    assert plan.rate(400) == 1.0
    assert plan.rate(900) == pytest.approx(0.5)
    assert plan.rate(1000) == pytest.approx(0.01)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    stack = torch.randn(3, 24, 60, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(stack, n_iterations=5).float())
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3


def test_latents_are_whitened() -> None:
    drawn = draw_pictures(300, 1)
    latents = fit_latent_map(drawn).encode(drawn)
    assert latents.shape == (300, 8, 16, 16)
    assert latents.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1, 0.6, 0.6, 0.6, 0.6, 0.6], abs=0.01)
    assert float(to_signed(drawn).abs().max()) <= 1.0


def test_latents_still_tell_the_mean_colour_of_a_cell() -> None:
    drawn = draw_pictures(200, 1)
    latent_map = fit_latent_map(drawn)
    told = latent_map.mean_colours(latent_map.encode(drawn))
    true = torch.from_numpy(drawn).permute(0, 3, 1, 2).float().unflatten(3, (16, 8)).unflatten(2, (16, 8)).mean((3, 5))
    assert float((told - true).abs().mean()) < 1.0


def test_the_latent_map_is_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdfleet.train.dataset.N_MAP_PICTURES", 50)
    first = load_latent_map(tmp_path, 1)
    again = load_latent_map(tmp_path, 2)
    assert torch.equal(first.weight, again.weight)


def test_every_word_of_the_world_is_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdfleet.train.tokens.N_CAPTIONS", 12_000)
    monkeypatch.setattr("sdfleet.train.tokens.MIN_FREQUENCY", 12)
    tokenizer = train_tokenizer(1)
    text = "a red circle above two blue diamonds on a yellow background"
    assert len(tokenizer(text)["input_ids"]) == len(text.split()) + 2
    ids = encode_captions(tokenizer, ["", "Ünknown wörds 漢字 are bytes"])
    assert ids.shape == (2, MAX_TOKENS)
    assert ids.max() < len(tokenizer)
    states = make_text_encoder(tokenizer, TOY)(torch.from_numpy(ids.astype(np.int64))).last_hidden_state
    assert states.shape == (2, MAX_TOKENS, TOY.text_width)
