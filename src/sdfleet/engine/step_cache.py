"""Which network calls of a picture are left out, and what is put in their place: opt-in, and it changes the picture.

Between neighbouring steps the network's answer hardly turns, so a call that is left out is answered from the last two
that were made. (TaylorSeer, arXiv:2503.06923, does so with features inside a transformer; with the answer itself no
network has to be opened up, and every family and sampler can do it.) Carried on, of x = alpha * x0 + sigma * noise:

    sampler without noise of its own     the noise that the network saw, in a straight line over
                                         sigma / (alpha + sigma), which is the place on a flow model's way
    sampler that adds noise              x0 as it was: the noise seen before has been mixed with other noise since

A call left out is a row that does not take part, so some rows of a batch may compute while others guess. Which ones a
picture computes is known before its first step: neither neighbours nor rounding can change it.

>>> sorted(left_out("light", 12))
[4, 6, 8]
>>> [20 - len(left_out(mode, 20)) for mode in ("off", "light", "strong")], len(left_out("strong", 4))
([20, 14, 12], 0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from sdfleet.domain import StepCache
from sdfleet.engine.sampler_rules import Evaluation

# Of so many calls in the middle one is made.
_ONE_OF = {"light": 2, "strong": 3}
# The first calls decide on what is where, the last ones on edges; they are always made. With a quarter instead of a
# third, `strong` was 45.5 instead of 49.2 dB away from the full picture for one call less of twenty (docs/modes.md).
_FIRST_SHARE, _LEAST_FIRST, _LAST = 1 / 3, 3, 2
_SAME_PLACE = 1e-9


def left_out(mode: StepCache, n_evaluations: int) -> frozenset[int]:
    """Positions of the calls that are not made, of a picture with so many; never the first three or the last two."""
    if mode == "off":
        return frozenset()
    first = max(_LEAST_FIRST, math.ceil(_FIRST_SHARE * n_evaluations))
    middle = range(first, n_evaluations - _LAST)
    return frozenset(position for n, position in enumerate(middle, start=1) if n % _ONE_OF[mode])


def told_of(mode: StepCache, *, n_evaluations: int, n_calls: int) -> str:
    """What the mode does to a picture of so many evaluations, of which so many are calls of the network."""
    if n_calls == n_evaluations:
        return f"step_cache {mode!r}: {n_evaluations} network calls are too few to leave any out"
    return (
        f"step_cache {mode!r}: {n_evaluations - n_calls} of {n_evaluations} network calls were guessed: the picture "
        "differs from the full one"
    )


@dataclass(slots=True, kw_only=True)
class Forecast:
    """The last answers of one picture's network calls, and what follows from them for a call that is left out.

    left_out: positions, from `left_out`. draws_noise: whether the sampler adds noise on the way.
    known: of the last two calls the place, the noise seen and the denoised latents, [1, c, h, w] float32.
    """

    left_out: frozenset[int]
    draws_noise: bool
    known: list[tuple[float, Tensor, Tensor]] = field(default_factory=list, repr=False)

    def learn(self, evaluation: Evaluation, latents: Tensor, denoised: Tensor) -> None:
        """Note the answer of a call that was made; both tensors are [1, c, h, w]."""
        if evaluation.sigma <= 0:
            return
        here = _place(evaluation)
        noise = (latents - evaluation.alpha * denoised) / evaluation.sigma
        # The second call of a second-order step is made where the next step's first one will be: the newer one counts.
        earlier = [known for known in self.known if abs(known[0] - here) > _SAME_PLACE]
        self.known = [*earlier[-1:], (here, noise, denoised)]

    def denoised(self, evaluation: Evaluation, latents: Tensor) -> Tensor:
        """[1, c, h, w]: what the network would have believed the clean latents to be. Needs a call to go by."""
        place, noise, denoised = self.known[-1]
        if self.draws_noise or evaluation.alpha <= 0:
            return denoised
        if len(self.known) == 2:
            before, earlier, _ = self.known[0]
            noise = noise + (_place(evaluation) - place) / (place - before) * (noise - earlier)
        return (latents - evaluation.sigma * noise) / evaluation.alpha


def _place(evaluation: Evaluation) -> float:
    return evaluation.sigma / (evaluation.alpha + evaluation.sigma)
