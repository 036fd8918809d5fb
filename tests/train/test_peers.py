"""Workers that train together hold the same weights, and what they share is a true mean."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch

from sdfleet.train.learner import Learner
from sdfleet.train.peers import join, leave


def _learn(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    peers = join(folder / "meeting", rank=rank, n=2)
    network = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4))
    learner = Learner(network, lr=1e-2, peers=peers, dtype=torch.float32)
    for step in range(3):
        rows = torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * step + rank))
        learner.update(network(rows).square().mean(), n_samples=10, rate=1.0)
    shared = [torch.tensor([float(rank), 1.0])]
    peers.mean(shared)
    torch.save(
        {"masters": learner.masters, "mean": shared[0], "told": peers.from_first([rank + 7.0])}, folder / f"{rank}.pt"
    )
    leave(peers)


def test_two_workers_stay_equal_and_hear_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_learn, args=(rank, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first["masters"], second["masters"], strict=True))
    assert first["mean"].tolist() == second["mean"].tolist() == [0.5, 1.0]
    assert first["told"] == second["told"] == [7.0]
