"""torch.compile for a denoiser's blocks, and batches of few sizes, so that who joins or leaves never compiles anew.

    1. a checkpoint's first pictures are drawn as it is
    2. when the engine is idle, its blocks are told to compile themselves, and the last call is repeated with 1, 2, 4, 8
       ... rows, one size a turn; from then on every batch is filled up to the next of these sizes
    3. a size, a picture size or a prompt length not met before compiles when it comes

Blocks, not the whole network: forty equal transformer blocks compile once. Unmeasured on a card. On a CPU it gained
nothing and took 37 s and more a shape (decision 0007), so there it is off unless it is asked for.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sdfleet.engine.components import ComponentName, Components
from sdfleet.engine.devices import Device, out_of_memory_as_ours
from sdfleet.engine.events import EngineOptions
from sdfleet.engine.repeated import blocks
from sdfleet.errors import OutOfMemory

log = logging.getLogger(__name__)

_BACKEND = "inductor"
# Rows tried beforehand: one picture, and guided batches up to sixteen.
_MOST_TRIED_ROWS = 32
# One block's code is compiled anew for every width of its network (four in a UNet, with and without a shortcut), every
# number of rows and every size. torch stops at 8 and goes on uncompiled without a word.
_MOST_COMPILED = 512


def filled_up(n_rows: int) -> int:
    """The number of rows that a batch is filled up to: the next power of two.

    >>> [filled_up(n) for n in (1, 2, 3, 5, 8, 9, 33)]
    [1, 2, 4, 8, 8, 16, 64]
    """
    return 1 << (n_rows - 1).bit_length()


@dataclass(slots=True)
class _Network:
    """A checkpoint's denoiser. `module`: the one that was watched; another one begins anew."""

    components: Components
    name: ComponentName
    module: weakref.ref[nn.Module]
    last_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    is_compiled: bool = False
    trying: Iterator[None] | None = None
    is_settled: bool = False
    unwatch: list[Any] = field(default_factory=list)


class Compiling:
    """Decides for every checkpoint of one engine."""

    def __init__(self, device: Device, options: EngineOptions) -> None:
        self._device = device
        self._is_on = options.compile == "on" or (options.compile == "auto" and device.kind == "cuda")
        self._at_once = options.compile == "on"
        self._most_rows = min(options.max_rows or _MOST_TRIED_ROWS, _MOST_TRIED_ROWS)
        self._known: dict[str, _Network] = {}
        self._refused: dict[str, str] = {}

    def watch(self, components: Components, name: ComponentName) -> None:
        """A checkpoint is whole in memory: note its calls, or compile it at once where that was asked for."""
        checkpoint = str(components.folder)
        if not self._is_on or checkpoint in self._refused:
            return
        module = components.use(name)
        known = self._known.get(checkpoint)
        if not isinstance(module, nn.Module) or (known is not None and known.module() is module):
            return
        network = self._known[checkpoint] = _Network(components, name, weakref.ref(module))
        if self._at_once:
            self._compile(network, module)
            network.is_settled = True
            return

        def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            network.last_call = (args, kwargs)

        network.unwatch = [module.register_forward_pre_hook(note, with_kwargs=True)]

    def fills_up(self, components: Components) -> bool:
        """Whether batches of this checkpoint are filled up to one of a few sizes."""
        network = self._known.get(str(components.folder))
        return network is not None and network.is_compiled and network.module() is not None

    def begin_step(self, components: Components) -> None:
        """A network call follows; what CUDA graphs answered before may be overwritten."""
        if self._device.kind == "cuda" and self.fills_up(components):
            torch.compiler.cudagraph_mark_step_begin()

    def has_chore(self, checkpoints: Collection[str]) -> bool:
        """Whether one of these checkpoints has a size to be compiled for."""
        return self._chore(checkpoints) is not None

    def do_chore(self, checkpoints: Collection[str]) -> str | None:
        """Compile for one number of rows, which takes seconds to a minute; the checkpoint, when its speed changed."""
        network = self._chore(checkpoints)
        if network is None:
            return None
        try:
            if network.trying is None:
                network.trying = self._warmed_up(network)
            with out_of_memory_as_ours():
                next(network.trying)
        except StopIteration:
            self._settle(network)
            return str(network.components.folder)
        except OutOfMemory:
            # As many rows as fit are compiled; a batch of more meets the ladder as it would have anyway.
            self._device.release_cached()
            self._settle(network)
            return str(network.components.folder)
        except RuntimeError as exc:  # what torch's compiler raises, for a missing C compiler too
            self._give_up(network, exc)
            return str(network.components.folder)
        return None

    def let_go(self, checkpoint: str) -> None:
        """The checkpoint leaves the memory."""
        self._known.pop(checkpoint, None)

    def facts(self) -> dict[str, object]:
        """By checkpoint: how many blocks were compiled; empty where compiling is off."""
        told: dict[str, object] = {checkpoint: {"refused": why} for checkpoint, why in self._refused.items()}
        for checkpoint, network in self._known.items():
            if network.is_compiled and (module := network.module()) is not None:
                told[checkpoint] = {"blocks": len(blocks(module)), "is_ready": network.is_settled}
        return told

    def _chore(self, checkpoints: Collection[str]) -> _Network | None:
        known = [self._known[checkpoint] for checkpoint in checkpoints if checkpoint in self._known]
        waiting = (n for n in known if not n.is_settled and n.last_call is not None and n.module() is not None)
        return next(waiting, None)

    def _warmed_up(self, network: _Network) -> Iterator[None]:
        module = network.module()
        assert module is not None
        assert network.last_call is not None
        args, kwargs = network.last_call
        self._compile(network, module)
        n_rows = 1
        while n_rows <= self._most_rows:
            with torch.inference_mode():
                self.begin_step(network.components)
                module(*_with_rows(args, n_rows), **_with_rows(kwargs, n_rows))
            n_rows *= 2
            yield

    def _compile(self, network: _Network, module: nn.Module) -> None:
        # Here, because it takes most of a second and few engines compile.
        from torch._dynamo import config as limits

        limits.recompile_limit = max(limits.recompile_limit, _MOST_COMPILED)
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * _MOST_COMPILED)
        # CUDA graphs want sizes that stay; elsewhere the sizes of a batch are as few.
        how = {"mode": "reduce-overhead"} if self._device.kind == "cuda" else {}
        compiled = blocks(module)
        for block in compiled:
            block.compile(backend=_BACKEND, dynamic=False, **how)
        network.is_compiled = True
        log.info("blocks will be compiled", extra={"checkpoint": str(network.components.folder), "n": len(compiled)})

    def _give_up(self, network: _Network, exc: RuntimeError) -> None:
        checkpoint = str(network.components.folder)
        why = " ".join(str(exc).strip().splitlines()[:2])[:200] or type(exc).__name__
        log.warning("a denoiser cannot be compiled and runs as it is", extra={"checkpoint": checkpoint, "why": why})
        self._settle(network)
        self._refused[checkpoint] = why
        del self._known[checkpoint]
        # Its blocks would try again in every call: it is read anew when the next picture comes.
        network.components.serve(network.name, None)

    @staticmethod
    def _settle(network: _Network) -> None:
        network.is_settled = True
        network.trying = network.last_call = None
        for handle in network.unwatch:
            handle.remove()
        network.unwatch = []


def _with_rows(value: Any, n_rows: int) -> Any:
    """A call's arguments with their rows repeated, or left out, until there are n."""
    if isinstance(value, Tensor) and value.dim():
        return value[torch.arange(n_rows, device=value.device) % len(value)]
    if isinstance(value, Mapping):
        return {name: _with_rows(part, n_rows) for name, part in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [value[n % len(value)] for n in range(n_rows)]  # Z-Image takes its rows one by one
    return tuple(_with_rows(part, n_rows) for part in value) if isinstance(value, tuple) else value
