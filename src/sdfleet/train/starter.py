"""Makes the built-in model from nothing: draws its world, trains every part, writes a diffusers folder.

    python -m sdfleet.train.starter --folder ~/.cache/sdfleet/train/starter --seed 1

Each stage leaves its state in the work folder; the same command goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from sdfleet.train.autoencoder import train_decoder, train_encoder
from sdfleet.train.dataset import load_latent_map, render_set
from sdfleet.train.denoiser import Drawing, Recipe, train_denoiser
from sdfleet.train.export import export
from sdfleet.train.learner import Plan, mean_state_of
from sdfleet.train.networks import Sizes, make_autoencoder, make_denoiser, make_text_encoder
from sdfleet.train.peers import join, leave
from sdfleet.train.text import Lesson, train_text
from sdfleet.train.tokens import encode_captions, load_tokenizer, train_tokenizer

log = logging.getLogger(__name__)

Stage = Literal["render", "text", "decoder", "encoder", "denoiser", "export"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True, slots=True, kw_only=True)
class StarterPlan:
    """How much of everything; the defaults made the shipped weights on two CPU cores."""

    n_pictures: int = 120_000
    text_samples: int = 100_000
    decoder_samples: int = 32_000
    encoder_samples: int = 16_000
    denoiser_samples: int = 478_000
    cooldown_samples: int = 86_000
    batch: int = 64
    lr: float = 2.5e-3


CPU_PLAN = StarterPlan()
SHIPPED_SIZES = Sizes()
# One accelerator: the same recipe with more of it and larger batches. Not measured.
ACCELERATOR_PLAN = StarterPlan(
    n_pictures=400_000,
    text_samples=2_000_000,
    decoder_samples=1_000_000,
    encoder_samples=200_000,
    denoiser_samples=8_000_000,
    cooldown_samples=1_600_000,
    batch=1024,
    lr=3e-3,
)


def train_starter(
    folder: Path,
    *,
    seed: int = 1,
    weights: Path | None = None,
    plan: StarterPlan = CPU_PLAN,
    n_workers: int = 2,
    device: str = "cpu",
    stages: Sequence[Stage] = STAGES,
    resumes: bool = True,
    sizes: Sizes = SHIPPED_SIZES,
) -> Path:
    """Run the stages in `folder` and answer the folder of the finished weights (`folder/weights` if not said).

    n_workers: processes of one thread each that train the denoiser together, on a CPU; one on an accelerator.
    resumes: go on from the states in the folder; otherwise the states of the stages asked for are removed first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights or folder / "weights"
    if not resumes:
        for stage in stages:
            (folder / f"{stage}.pt").unlink(missing_ok=True)
    if device != "cpu":
        n_workers = 1
    torch.manual_seed(seed)
    if not (folder / "tokenizer").exists():
        train_tokenizer(seed).save_pretrained(folder / "tokenizer")
    latent_map = load_latent_map(folder, seed)
    for stage in stages:
        log.info("stage %s", stage)
        match stage:
            case "render":
                render_set(folder, n=plan.n_pictures, seed=seed, n_processes=max(1, n_workers))
            case "text":
                pictures = render_set(folder, n=plan.n_pictures, seed=seed, n_processes=1)
                encoder = make_text_encoder(load_tokenizer(folder), sizes)
                train_text(encoder, pictures, folder, seed=seed, planned_samples=plan.text_samples, device=device)
            case "decoder":
                vae = make_autoencoder(sizes)
                train_decoder(vae, latent_map, folder, seed=seed, planned_samples=plan.decoder_samples, device=device)
            case "encoder":
                vae = make_autoencoder(sizes)
                train_encoder(vae, latent_map, folder, seed=seed, planned_samples=plan.encoder_samples, device=device)
            case "denoiser":
                work = DenoiserWork(
                    folder=folder,
                    seed=seed,
                    plan=plan,
                    n_workers=n_workers,
                    device=device,
                    sizes=sizes,
                )
                _train_denoiser_with_workers(work)
            case "export":
                for name, digest in export(folder, weights, sizes).items():
                    log.info("%s %s", digest, name)
    return weights


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `train_starter`."""
    parser = argparse.ArgumentParser(prog="sdfleet train starter", description="make the built-in model from nothing")
    parser.add_argument("--folder", type=Path, required=True, help="where states are kept; the same folder resumes")
    parser.add_argument("--weights", type=Path, help="where the finished diffusers folder goes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--samples", type=int, help="planned samples of the denoiser")
    parser.add_argument("--cooldown", type=int, help="how many of them are the cool-down")
    parser.add_argument("--workers", type=int, default=2, help="one-thread processes that train the denoiser together")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the larger accelerator plan")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--restart", action="store_true", help="forget the states of these stages")
    chosen = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    base = CPU_PLAN if chosen.device == "cpu" else ACCELERATOR_PLAN
    fields = {name: getattr(base, name) for name in StarterPlan.__slots__}
    fields["denoiser_samples"] = chosen.samples or base.denoiser_samples
    fields["cooldown_samples"] = chosen.cooldown or base.cooldown_samples
    if chosen.device == "cpu":
        torch.set_num_threads(1)
    train_starter(
        chosen.folder,
        seed=chosen.seed,
        weights=chosen.weights,
        plan=StarterPlan(**fields),
        n_workers=chosen.workers,
        device=chosen.device,
        stages=chosen.stages,
        resumes=not chosen.restart,
    )
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserWork:
    """What every worker process has to know; see `train_starter`."""

    folder: Path
    seed: int
    plan: StarterPlan
    n_workers: int
    device: str
    sizes: Sizes


def _train_denoiser_with_workers(work: DenoiserWork) -> None:
    if work.n_workers == 1:
        _train_denoiser_as(0, work)
        return
    (work.folder / "meeting").unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_train_denoiser_as, args=(rank, work)) for rank in range(work.n_workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"a denoiser worker ended with exit codes {[worker.exitcode for worker in workers]}")


def _train_denoiser_as(rank: int, work: DenoiserWork) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    folder, plan = work.folder, work.plan
    if rank == 0:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if work.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(work.seed)
    peers = join(folder / "meeting", rank=rank, n=work.n_workers)
    tokenizer = load_tokenizer(folder)
    encoder = make_text_encoder(tokenizer, work.sizes)
    if (folder / "text.pt").exists():
        lesson = Lesson(encoder)
        lesson.load_state_dict(mean_state_of(lesson, folder / "text.pt"))
    unet = make_denoiser(work.sizes)
    if work.device == "cpu":
        # Written-out attention: with torch 2.13 the backward pass of the fused one took 28 % of a step on an AVX-512
        # core (2026-11-20), and a step without it 68 instead of 94 samples a second.
        unet.set_attn_processor(AttnProcessor())
    train_denoiser(
        Drawing(encoder, unet),
        render_set(folder, n=plan.n_pictures, seed=work.seed, n_processes=1),
        folder,
        empty=torch.from_numpy(encode_captions(tokenizer, [""])[0].astype("int64")),
        latent_map=load_latent_map(folder, work.seed),
        recipe=Recipe(batch=plan.batch, lr=plan.lr),
        seed=work.seed,
        plan=Plan(planned_samples=plan.denoiser_samples, cooldown_samples=plan.cooldown_samples),
        peers=peers,
        device=work.device,
    )
    leave(peers)


if __name__ == "__main__":
    raise SystemExit(main())
