"""Worker processes that train one network together: each works on its own rows, then all share what they found.

On two cores, two processes of one thread each train faster than one process of two threads (benchmarked with the
built-in model's denoiser), and a neighbour who takes a core for a moment holds up one sum, not every operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """This process's place among the workers."""

    rank: int
    n: int

    def mean(self, tensors: list[Tensor]) -> None:
        """Replace every tensor by its mean over all workers, in place."""
        self._share(tensors)
        torch._foreach_div_(tensors, self.n)

    def total(self, tensors: list[Tensor]) -> None:
        """Replace every tensor by its sum over all workers, in place."""
        self._share(tensors)

    def from_first(self, values: list[float]) -> list[float]:
        """The first worker's values, on every worker."""
        shared = torch.tensor(values, dtype=torch.float64)
        torch.distributed.broadcast(shared, src=0)
        return [float(v) for v in shared]

    def _share(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        fresh = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.reshape(tensor.shape) for part, tensor in zip(fresh, tensors, strict=True)])


ALONE = Peers(rank=0, n=1)


def join(meeting_file: Path, *, rank: int, n: int) -> Peers:
    """Meet the other workers on this machine; returns when all have come. A single worker needs no meeting."""
    if n > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=n)
    return Peers(rank=rank, n=n)


def leave(peers: Peers) -> None:
    """End what `join` began."""
    if peers.n > 1:
        torch.distributed.destroy_process_group()
