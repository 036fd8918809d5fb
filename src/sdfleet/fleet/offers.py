"""What one device would cost a job, and what the device looks like with it.

Devices that draw one job at a time are the simple case: begin when the last one ends. Where several share steps, a job
may join now and slow its neighbours, take the next place that is free, or wait until it has the device to itself;
whichever costs least by the curve the node has measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sdfleet.fleet.board import Seat, View
from sdfleet.fleet.cost import Share, ends_s
from sdfleet.fleet.decisions import Candidate
from sdfleet.fleet.demand import Peers
from sdfleet.fleet.state import WaitingJob

# For the others' sake a job begins where it is done later than where it would be done first, but it never takes more
# than this many times as long for it, from its acceptance on.
MOST_SLOWED = 3.0


class Offer(NamedTuple):
    """What one device would cost a job; see `Candidate`. A tuple, because hundreds are made for one decision.

    joins: it would begin now.
    """

    cost_s: float
    wait_s: float
    load_s: float
    draw_s: float
    price_s: float
    neighbours_s: float
    joins: bool

    @property
    def finish_s(self) -> float:
        """Until its last picture is drawn."""
        return self.wait_s + self.load_s + self.draw_s


def cheapest(offers: Sequence[tuple[Seat, Offer]], *, waited_s: float) -> tuple[Seat, Offer] | None:
    """The best of these, but none that makes the job too slow for the others' sake; None of none.

    waited_s: how long the job has waited already.
    """
    best = min(offers, key=_cost_s, default=None)
    if best is None or not _begins_warm(best[1]):
        return best
    fastest_s = min(offer.finish_s for _, offer in offers if not offer.load_s)
    most_s = MOST_SLOWED * (waited_s + fastest_s) - waited_s
    if best[1].finish_s <= most_s:
        return best
    return min((one for one in offers if not _begins_warm(one[1]) or one[1].finish_s <= most_s), key=_cost_s)


def _cost_s(one: tuple[Seat, Offer]) -> float:
    return one[1].cost_s


def _begins_warm(offer: Offer) -> bool:
    return offer.joins and not offer.load_s


def offer_of(seat: Seat, job: WaitingJob, *, now_s: float, peers: Peers) -> Offer:
    """The cheapest way in which the device would draw the job. peers: who waits beside it."""
    view = seat.plan or seat.now
    alone_s = job.picture_units * seat.unit_s(job.model)
    load_s = load_price_s = 0.0
    if job.model not in view.warm:
        load_s = seat.load_s(job.model)
        load_price_s = peers.loading_s(load_s, view.warm, speed=seat.speed)
    wait_s = max(0.0, view.all_s - now_s)
    capacity = seat.device.capacity
    draw_s = alone_s if job.n_pictures == 1 else alone_s * seat.curve(job.model).stretch(job.n_pictures)
    is_idle = view.n_taken == 0
    price_s = 0.0 if is_idle and not load_s else load_price_s + peers.drawing_s(draw_s, speed=seat.speed)
    best = Offer(wait_s + load_s + draw_s + price_s, wait_s, load_s, draw_s, price_s, 0.0, is_idle)
    if capacity == 1 or is_idle:
        return best
    if seat.has_room(view, job.n_pictures):
        joined = _joined(seat, view, job, now_s=now_s, load_s=load_s, peers=peers)
        # Where both cost the same it begins: a neighbour that should have ended and has not may take long yet.
        return best if joined is None or joined.cost_s > best.cost_s else joined
    # The next place that is free, among as many neighbours as there may be.
    open_s = max(view.open_s - now_s, 0.0)
    n = max(capacity, job.n_pictures)
    full_s = alone_s * seat.curve(job.model).stretch(n)
    price_s = load_price_s + peers.drawing_s(full_s * job.n_pictures / n, speed=seat.speed)
    cost_s = open_s + load_s + full_s + price_s
    return best if cost_s >= best.cost_s else Offer(cost_s, open_s, load_s, full_s, price_s, 0.0, joins=False)


def _joined(seat: Seat, view: View, job: WaitingJob, *, now_s: float, load_s: float, peers: Peers) -> Offer | None:
    """Among those that draw now; None if its model does not fit beside theirs."""
    if (load_s or job.work_bytes) and seat.evictions(view, job, is_idle=False) is None:
        return None
    shares = view.shares_at(now_s)
    before_s = ends_s(shares)
    *others, own_s = ends_s([*shares, seat.share_of(job)])
    neighbours_s = max(0.0, sum(others) - sum(before_s))
    # What it takes of the device is by how much later all is done: little where steps are shared, its whole drawing
    # where two kinds take turns.
    price_s = peers.drawing_s(max(own_s, *others) - max(before_s), speed=seat.speed)
    if load_s:
        price_s += peers.loading_s(load_s, view.warm, speed=seat.speed)
    return Offer(own_s + load_s + neighbours_s + price_s, 0.0, load_s, own_s, price_s, neighbours_s, joins=True)


def offer_now(seat: Seat, job: WaitingJob, *, now_s: float, peers: Peers) -> Offer | None:
    """What it would cost to begin at once, whatever is planned there; None if there is no room or no memory."""
    if not seat.has_room(seat.now, job.n_pictures):
        return None
    plan, seat.plan = seat.plan, None
    try:
        if seat.now.n_taken == 0:
            return offer_of(seat, job, now_s=now_s, peers=peers)
        load_s = 0.0 if job.model in seat.now.warm else seat.load_s(job.model)
        return _joined(seat, seat.now, job, now_s=now_s, load_s=load_s, peers=peers)
    finally:
        seat.plan = plan


def with_job(seat: Seat, job: WaitingJob, offer: Offer, *, now_s: float) -> View:
    """The device once it has the job too, as the offer says."""
    view = (seat.plan or seat.now).copy()
    capacity = seat.device.capacity
    _keep_in_memory(seat, view, job, is_idle=view.n_taken == 0 or not offer.joins)
    if capacity == 1:
        view.all_s = view.open_s = now_s + offer.finish_s
        view.n_taken = job.n_pictures
    elif offer.joins:
        shares: list[Share] = [*view.shares_at(now_s), seat.share_of(job, load_s=offer.load_s)]
        view.set_shares(shares, as_of_s=now_s, capacity=capacity)
    else:
        # A full device in the long run: what the job takes of it, not how long the job itself is drawn.
        n = max(capacity, job.n_pictures)
        alone_s = job.picture_units * seat.unit_s(job.model)
        taken_s = offer.load_s + alone_s * seat.curve(job.model).stretch(n) * job.n_pictures / n
        view.all_s = max(view.all_s, now_s) + taken_s
        view.open_s = max(view.open_s, now_s) + taken_s
    return view


def candidate_of(seat: Seat, offer: Offer) -> Candidate:
    """The offer, for people."""
    device = seat.device
    return Candidate(
        device_id=device.device_id,
        node_id=device.node_id,
        name=device.name,
        wait_s=offer.wait_s,
        load_s=offer.load_s,
        draw_s=offer.draw_s,
        price_s=offer.price_s,
        neighbours_s=offer.neighbours_s,
    )


def _keep_in_memory(seat: Seat, view: View, job: WaitingJob, *, is_idle: bool) -> None:
    for model in seat.evictions(view, job, is_idle=is_idle) or ():
        view.free_bytes += view.warm.pop(model)
    n_bytes = view.warm.pop(job.model, None)
    if n_bytes is None:
        n_bytes = seat.device.on_disk[job.model]
        view.free_bytes -= n_bytes
    view.warm[job.model] = n_bytes  # the last used stands last
