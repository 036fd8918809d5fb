"""Which node answers a request for text, embeddings or speech: the one that is predicted to have done so first.

A turn is what an answer of this model took lately. Ahead of it may be other answers, the loading of a cold model, and
pictures that the device draws; a cold model that fits in no free memory would push something out, which costs others.

>>> from dataclasses import replace
>>> warm = Candidate(node="mini", is_warm=True, slots=1, n_running=0, n_bytes=4 << 30, turn_s=8.0)
>>> cold = Candidate(node="tower", is_warm=False, slots=4, n_running=0, n_bytes=4 << 30, turn_s=2.0)
>>> choose([warm, cold]).node, choose([replace(warm, n_running=1), cold]).node
('tower', 'tower')
>>> choose([replace(warm, turn_s=2.0), cold]).node
'mini'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What a server of one model takes at once when it does not say; Ollama's and llama.cpp's defaults are 1 to 4.
USUAL_SLOTS = 4
# Reading weights from a disk that is neither new nor old, until they have been loaded once.
LOAD_BYTES_PER_S = 2 * 2**30
USUAL_BYTES = 4 * 2**30
# A turn that nobody has measured yet.
USUAL_TURN_S = 3.0
# Beside pictures that are drawn, a device does either at about half its speed.
BESIDE_PICTURES = 2.0
# What is pushed out of memory must come back later, for whoever used it.
PUSHES_OUT = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A node that has the model. slots: answers at once, 0 where unknown. n_running: given to it by this router.

    n_bytes: of the model. free_bytes: of the device, None where unknown. turn_s: seconds of an answer, 0: not measured.
    """

    node: str
    is_warm: bool
    slots: int
    n_running: int
    n_bytes: int = 0
    free_bytes: int | None = None
    is_drawing: bool = False
    turn_s: float = 0.0


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """The one with the least `cost_s`; of equals the one with fewer answers under way, then by name."""
    return min(candidates, key=lambda one: (cost_s(one), one.n_running, one.node), default=None)


def cost_s(one: Candidate) -> float:
    """Seconds until this node would have answered, and what loading there costs others."""
    slots = one.slots or USUAL_SLOTS
    turn_s = (one.turn_s or USUAL_TURN_S) * (BESIDE_PICTURES if one.is_drawing else 1.0)
    n_ahead = max(0, one.n_running + 1 - slots)
    # Answers that are given together share the device: each makes the others a little slower.
    shared = 1.0 + 0.5 * min(one.n_running, slots) / slots
    load_s = 0.0
    if not one.is_warm:
        n_bytes = one.n_bytes or USUAL_BYTES
        load_s = n_bytes / LOAD_BYTES_PER_S
        if one.free_bytes is not None and n_bytes > one.free_bytes:
            load_s *= 1.0 + PUSHES_OUT
    return n_ahead / slots * turn_s + load_s + turn_s * shared
