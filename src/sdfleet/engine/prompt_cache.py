"""Prompts already encoded, kept while there is room: the same negative prompt comes with every request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from sdfleet.engine.conditioning import Conditioning, Room


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptKey:
    """Everything that decides the numbers of an encoded prompt.

    checkpoint: the weights. encoder: the join and its parts, like "sd3 without t5".
    text: the prompt as it was written, weights and all. is_zero_when_empty: see conditioning.sdxl_conditioning.
    adapters: LoRAs on the text encoders, and embeddings whose names may be in the text.
    """

    checkpoint: str
    encoder: str
    text: str
    room: Room
    is_zero_when_empty: bool = False
    adapters: tuple[object, ...] = ()


class PromptCache:
    """The encoded prompts used last, up to `max_bytes` of tensors. For one thread: the engine's.

    Tensors are held as given: not copied, not moved, and never to be written into by who is lent them.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self.n_hits = 0
        self.n_misses = 0
        self._kept: OrderedDict[PromptKey, Conditioning] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: PromptKey) -> bool:
        """Whether the prompt is here; neither a hit nor a use."""
        return key in self._kept

    def conditioning(self, key: PromptKey, encode: Callable[[], Conditioning]) -> Conditioning:
        """What is kept for `key`, or what `encode` gives, which is then kept. Errors of `encode` pass through."""
        kept = self._kept.get(key)
        if kept is not None:
            self.n_hits += 1
            self._kept.move_to_end(key)
            return kept
        self.n_misses += 1
        fresh = encode()
        self._keep(key, fresh)
        return fresh

    def forget(self, checkpoint: str) -> None:
        """Drop every prompt of a checkpoint that leaves the device."""
        for key in [key for key in self._kept if key.checkpoint == checkpoint]:
            self.held_bytes -= _bytes_of(self._kept.pop(key))

    def clear(self) -> None:
        """Drop everything: a rung of the memory ladder. The counters stay."""
        self._kept.clear()
        self.held_bytes = 0

    def _keep(self, key: PromptKey, conditioning: Conditioning) -> None:
        n_bytes = _bytes_of(conditioning)
        if n_bytes > self.max_bytes:
            # It would push everybody else out and still not fit.
            return
        self._kept[key] = conditioning
        self.held_bytes += n_bytes
        while self.held_bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.held_bytes -= _bytes_of(oldest)


def _bytes_of(conditioning: Conditioning) -> int:
    """Memory that stays alive with it: the storage behind a view, not the view."""
    tensors = [conditioning.states] if conditioning.pooled is None else [conditioning.states, conditioning.pooled]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
