"""The parts that a network repeats: what is compiled once for all of them, and what is brought in one by one."""

from __future__ import annotations

from torch import nn

# What holds fewer layers than this is a layer itself: the parts of a feed-forward network, of an attention's way out.
_LEAST_LAYERS = 3


def blocks(network: nn.Module) -> list[nn.Module]:
    """What its lists of modules hold, as deep inside as they are still blocks; no block holds another."""
    held = [part for part in network.modules() if isinstance(part, nn.ModuleList)]
    members = [member for members in held for member in members if _n_layers(member) >= _LEAST_LAYERS]
    known = {id(member) for member in members}
    return [m for m in members if not any(id(part) in known for part in m.modules() if part is not m)]


def _n_layers(module: nn.Module) -> int:
    return sum(1 for part in module.modules() if next(part.parameters(recurse=False), None) is not None)
