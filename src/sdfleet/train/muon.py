"""Muon: momentum whose matrices are orthogonalised before each step, with AdamW for everything else.

Source of the rule: Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the
step scaled to the size AdamW would take as in Liu et al., "Muon is scalable for LLM training" (2025).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sdfleet.train.peers import ALONE, Peers

# Coefficients of the quintic iteration from the first source: they push every singular value to about one.
QUINTIC = (3.4445, -4.7750, 2.0315)
# The step of an orthogonal update, in units of AdamW's typical step (second source).
RMS = 0.2


def orthogonalise(stack: Tensor, *, n_iterations: int) -> Tensor:
    """The nearest (roughly) orthogonal matrices of a stack [k, rows, columns], in bfloat16."""
    x = stack.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(n_iterations):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if is_tall else x


class Muon(torch.optim.Optimizer):
    """One optimizer for both kinds of parameters.

    matrices: convolution and linear weights inside the network, moved by orthogonalised momentum.
    others: embeddings, norms, biases, first and last layers, moved by AdamW.
    Both are float32 master weights; `lr` of each group is set by the caller before a step. Workers that hold the
    same weights share the orthogonalising: each does some of the matrices and sends the result round.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float = 0.01,
        n_iterations: int = 5,
        peers: Peers = ALONE,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "kind": "matrix", "momentum": 0.95},
            {"params": list(others), "kind": "other", "betas": (0.9, 0.98)},
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.n_iterations = n_iterations
        self.peers = peers

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "matrix":
                self._step_matrices(params, group)
            else:
                self._step_others(params, group)

    def _step_matrices(self, params: list[Tensor], group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for param in params:
            state = self.state[param]
            if not state:
                state["momentum"] = torch.zeros_like(param)
            by_shape[(len(param), param[0].numel())].append(param)
        moves = {
            shape: torch.zeros(len(members), *shape, dtype=torch.bfloat16, device=members[0].device)
            for shape, members in by_shape.items()
        }
        for shape in self._own_shapes(list(by_shape), [len(members) for members in by_shape.values()]):
            ahead = [self._ahead(param, group["momentum"]).reshape(shape) for param in by_shape[shape]]
            moves[shape] = orthogonalise(torch.stack(ahead), n_iterations=self.n_iterations).contiguous()
        if self.peers.n > 1:
            self.peers.total(list(moves.values()))
        for shape, members in by_shape.items():
            size = group["lr"] * RMS * max(shape) ** 0.5
            for param, move in zip(members, moves[shape], strict=True):
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(move.reshape(param.shape).to(param.dtype), alpha=-size)

    def _ahead(self, param: Tensor, decay: float) -> Tensor:
        """Nesterov's look ahead: the gradient and the momentum after it."""
        grad = param.grad
        assert grad is not None
        momentum: Tensor = self.state[param]["momentum"]
        momentum.lerp_(grad, 1 - decay)
        return torch.lerp(grad, momentum, decay)

    def _own_shapes(self, shapes: list[tuple[int, int]], counts: list[int]) -> list[tuple[int, int]]:
        """The shapes this worker orthogonalises: the costliest first, each to whoever has least to do."""
        costs = [n * min(shape) ** 2 * max(shape) for shape, n in zip(shapes, counts, strict=True)]
        loads = [0] * self.peers.n
        own: list[tuple[int, int]] = []
        for index in sorted(range(len(shapes)), key=lambda k: -costs[k]):
            rank = loads.index(min(loads))
            loads[rank] += costs[index]
            if rank == self.peers.rank:
                own.append(shapes[index])
        return own

    def _step_others(self, params: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for param in params:
            grad = param.grad
            assert grad is not None
            state = self.state[param]
            if not state:
                state["steps"] = 0
                state["mean"] = torch.zeros_like(param)
                state["power"] = torch.zeros_like(param)
            state["steps"] += 1
            state["mean"].lerp_(grad, 1 - beta1)
            state["power"].lerp_(grad.square(), 1 - beta2)
            mean = state["mean"] / (1 - beta1 ** state["steps"])
            power = state["power"] / (1 - beta2 ** state["steps"])
            param.addcdiv_(mean, power.sqrt().add_(1e-8), value=-group["lr"])
