"""A network whose blocks are brought to the device one by one, for a checkpoint of which not even one network fits.

What lies outside of the blocks stays on the device. Before a block runs its weights come, after it they go; until then
the block's parameters are on torch's meta device, where a tensor has a shape and no numbers. The numbers are those that
would otherwise lie on the device, in the same layout, so the picture is the same to the byte.

Where they come from:
- on a CPU and on Metal from the safetensors file, which is mapped: what is held at one time is a block, not the
  network;
- on a card from pinned host memory, where the whole network waits. The block that came next the last time is sent on a
  stream of its own while this one computes. Proved on a CPU only, where copies are done when they are asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdfleet.engine.events import WeightFormat
from sdfleet.engine.quantised import keep_in, rounded
from sdfleet.engine.repeated import blocks

# Of these many blocks the device holds weights at one time: the one that runs and the one that comes next.
N_HELD = 2

Read = Callable[[Sequence[str]], Mapping[str, Tensor]]


@dataclass(slots=True)
class _Block:
    """tensors: the owner and own name of each weight by its name in the network. empty: what stands there meanwhile."""

    tensors: dict[str, tuple[nn.Module, str]]
    empty: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class _Coming:
    """Weights on their way; arrived: None where they are there already."""

    tensors: Mapping[str, Tensor]
    arrived: torch.cuda.Event | None


class ByLayer:
    """Brings the blocks of one network, from `read`; the network itself stays what it is and is called as ever.

    read: the weights of these names, of one block, where the network is kept meanwhile. Asked again and again.
    ahead: whether to send a block while the one before it computes.
    """

    # The most that blocks take while the network is called.
    n_bytes_coming: int

    def __init__(self, network: nn.Module, read: Read, *, device: torch.device, ahead: bool) -> None:
        self._read = read
        self._device = device
        self._ahead = ahead
        self._stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        self._computed: deque[torch.cuda.Event] = deque()
        self._network = network
        self._blocks = [_Block(tensors) for tensors in tensors_of_blocks(network)]
        self._coming: dict[int, _Coming] = {}
        self.n_bytes_coming = n_bytes_of_largest(network)
        # Which block came after which in the last call; registered order is not that of a UNet.
        self._after = {index: index + 1 for index in range(len(self._blocks) - 1)}
        self._last: int | None = None
        self._hooks: list[RemovableHandle] = []
        for index, block in enumerate(blocks(network)):
            self._empty(index)
            self._hooks.append(block.register_forward_pre_hook(self._before(index)))
            # Also after a fault: the next call finds everything as it was.
            self._hooks.append(block.register_forward_hook(self._behind(index), always_call=True))

    def to(self, device: torch.device) -> None:
        """Move what lies outside of the blocks."""
        self._coming.clear()
        for module in self._network.modules():
            for held in (module._parameters, module._buffers):  # noqa: SLF001 - nn.Module.to refuses what is on meta
                for tensor in held.values():
                    if tensor is not None and not tensor.is_meta:
                        tensor.data = tensor.data.to(device)

    def release(self) -> None:
        """Let go of the network, which is of no use any more; each knows the other, so neither leaves by itself."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._blocks, self._coming = [], [], {}

    def _before(self, index: int) -> Callable[[nn.Module, Any], None]:
        def bring(_block: nn.Module, _args: Any) -> None:
            coming = self._coming.pop(index, None) or self._sent(index)
            if coming.arrived is not None:
                current = torch.cuda.current_stream(self._device)
                current.wait_event(coming.arrived)
                for tensor in coming.tensors.values():
                    tensor.record_stream(current)
            for name, (owner, own_name) in self._blocks[index].tensors.items():
                _put(owner, own_name, coming.tensors[name])
            if self._last is not None:
                self._after[self._last] = index
            self._last = index
            if self._ahead and (following := self._after.get(index)) is not None and following not in self._coming:
                self._coming = {following: self._sent(following)}

        return bring

    def _behind(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def take_away(_block: nn.Module, _args: Any, _answer: Any) -> None:
            self._empty(index)
            if self._stream is not None:
                computed = torch.cuda.Event()
                computed.record(torch.cuda.current_stream(self._device))
                self._computed.append(computed)

        return take_away

    def _empty(self, index: int) -> None:
        block = self._blocks[index]
        for name, (owner, own_name) in block.tensors.items():
            if name not in block.empty:
                tensor = _found(owner, own_name)
                block.empty[name] = torch.empty_like(tensor, device="meta")
            _put(owner, own_name, block.empty[name])

    def _sent(self, index: int) -> _Coming:
        weights = self._read(list(self._blocks[index].tensors))
        if self._stream is None:
            return _Coming({name: tensor.to(self._device) for name, tensor in weights.items()}, None)
        # The host may be far ahead of the card: without this it would have every block sent before one has run.
        while len(self._computed) >= N_HELD:
            self._computed.popleft().synchronize()
        with torch.cuda.stream(self._stream):
            sent = {name: tensor.to(self._device, non_blocking=True) for name, tensor in weights.items()}
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return _Coming(sent, arrived)


def tensors_of_blocks(network: nn.Module) -> list[dict[str, tuple[nn.Module, str]]]:
    """For each block its weights by their names in the network: the module that has one, and its name there."""
    paths = {id(module): path for path, module in network.named_modules()}
    found = []
    for block in blocks(network):
        tensors = {}
        for module in block.modules():
            held = [*module._parameters, *module._buffers]  # noqa: SLF001 - owners are needed, not the tensors
            for own_name in held:
                if _found(module, own_name, or_none=True) is not None:
                    tensors[f"{paths[id(module)]}.{own_name}"] = (module, own_name)
        found.append(tensors)
    return found


def n_bytes_held(network: nn.Module) -> int:
    """Bytes on the device at most, of a network (which may be on the meta device) that is brought block by block."""
    whole = sum(_n_bytes(tensor) for tensor in network.state_dict().values())
    return whole - sum(_bytes_by_block(network)) + n_bytes_of_largest(network)


def n_bytes_of_largest(network: nn.Module) -> int:
    """Bytes of the largest blocks, as many as are held at one time."""
    return sum(sorted(_bytes_by_block(network))[-N_HELD:])


def _bytes_by_block(network: nn.Module) -> list[int]:
    return [
        sum(_n_bytes(_found(owner, own_name)) for owner, own_name in tensors.values())
        for tensors in tensors_of_blocks(network)
    ]


def _fill_outside(network: nn.Module, read: Read) -> None:
    """Give a network that was born on the meta device the weights that lie outside of its blocks."""
    inside = {name for tensors in tensors_of_blocks(network) for name in tensors}
    saved = network.state_dict().keys()
    for path, module in network.named_modules():
        for own_name in [*module._parameters, *module._buffers]:  # noqa: SLF001 - owners are needed, not the tensors
            name = f"{path}.{own_name}" if path else own_name
            tensor = _found(module, own_name, or_none=True)
            if tensor is not None and tensor.is_meta and name in saved and name not in inside:
                _put(module, own_name, read([name])[name])


def from_host(network: nn.Module, *, device: torch.device) -> ByLayer:
    """Bring the blocks of a network that is in the host's memory now, and stays there, pinned if it can be."""
    kept = {
        name: _pinned(_found(owner, own_name)) if device.type == "cuda" else _found(owner, own_name).detach()
        for tensors in tensors_of_blocks(network)
        for name, (owner, own_name) in tensors.items()
    }
    bringer = ByLayer(network, lambda names: {name: kept[name] for name in names}, device=device, ahead=True)
    bringer.to(device)
    return bringer


def from_file(
    network: nn.Module, read: Read, *, device: torch.device, kept_in: WeightFormat | None, is_arranged: bool
) -> ByLayer:
    """Bring the blocks of a network that is on the meta device, of which only `read` has the numbers.

    kept_in: what its weights would be kept in if it were whole. is_arranged: whether `prepacked.arrange` would have
    laid it out. Both so that the picture is the one of the whole network.
    """

    def read_ready(names: Sequence[str]) -> Mapping[str, Tensor]:
        weights = read(names)
        if kept_in is not None:
            # A block is there for a moment only, so it is not kept small, but it says what it would say.
            weights = {name: rounded(kept_in, name, tensor) for name, tensor in weights.items()}
        return {name: _channels_last(tensor) for name, tensor in weights.items()} if is_arranged else weights

    _fill_outside(network, read)
    if kept_in is not None:
        keep_in(kept_in, network)
    if is_arranged:
        for tensor in network.parameters():
            tensor.data = tensor.data if tensor.is_meta else _channels_last(tensor.data)
    bringer = ByLayer(network, read_ready, device=device, ahead=False)
    bringer.to(device)
    return bringer


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _pinned(tensor: Tensor) -> Tensor:
    try:
        return tensor.detach().pin_memory()
    except RuntimeError:
        # The system pins only so much; the copy is slower and right all the same.
        return tensor.detach()


def _n_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _found(owner: nn.Module, own_name: str, *, or_none: bool = False) -> Any:
    tensor: Any = owner._parameters.get(own_name)  # noqa: SLF001 - past `weight` properties and hooks
    if tensor is None:
        tensor = owner._buffers.get(own_name)  # noqa: SLF001 - as above
    assert or_none or tensor is not None
    return tensor


def _put(owner: nn.Module, own_name: str, tensor: Tensor) -> None:
    if own_name in owner._parameters:  # noqa: SLF001 - as above
        owner._parameters[own_name] = nn.Parameter(tensor, requires_grad=False)  # noqa: SLF001 - as above
    else:
        owner._buffers[own_name] = tensor  # noqa: SLF001 - as above
