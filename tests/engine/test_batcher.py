"""Who steps together: decided from counts and seconds alone."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from sdfleet.engine.batcher import Batcher, Candidate


def candidates(n: int, *, key: str = "a", n_rows: int = 2, first_id: int = 0) -> list[Candidate]:
    return [Candidate(id=first_id + i, key=key, n_rows=n_rows, due=i) for i in range(n)]


def settle(batcher: Batcher, waiting: list[Candidate], seconds: Callable[[int], float], turns: int = 60) -> int:
    """Rows per call once the batcher has learnt a device that takes `seconds(n_rows)` for a call."""
    for _ in range(turns):
        decision = batcher.choose(waiting)
        batcher.observe(decision.key, decision.n_rows, seconds(decision.n_rows))
    return batcher.choose(waiting).n_rows


def test_grows_while_a_row_gets_cheaper() -> None:
    assert settle(Batcher(), candidates(20), lambda n_rows: 0.020 + 0.001 * n_rows) >= 32


def test_stays_at_one_picture_where_a_batch_gains_nothing() -> None:
    assert settle(Batcher(), candidates(20), lambda n_rows: 3.0 * n_rows) == 2


def test_stops_at_the_knee() -> None:
    """Free up to 8 rows, then every further row costs its full time."""
    assert settle(Batcher(), candidates(20), lambda n_rows: 0.1 * max(1.0, n_rows / 8)) == 8


def test_a_few_slow_calls_do_not_stop_the_growth() -> None:
    """Another program takes the device for the first three calls at every new size."""
    n_seen: dict[int, int] = {}

    def seconds(n_rows: int) -> float:
        n_seen[n_rows] = n_seen.get(n_rows, 0) + 1
        return (0.020 + 0.001 * n_rows) * (5 if n_seen[n_rows] <= 3 else 1)

    assert settle(Batcher(), candidates(20), seconds) >= 32


def test_a_given_limit_is_kept_whatever_is_measured() -> None:
    assert settle(Batcher(max_rows=6), candidates(20), lambda _n_rows: 0.02) == 6


def test_memory_bounds_the_rows() -> None:
    batcher = Batcher(max_rows=16)
    decision = batcher.choose(candidates(20), {"a": 4})
    assert (decision.n_rows, decision.reason) == (4, "memory for 4 rows")


def test_one_guided_picture_always_fits() -> None:
    assert Batcher(max_rows=1).choose(candidates(3)).ids == (0,)


def test_a_picture_of_another_job_goes_before_the_second_of_a_big_one() -> None:
    big = [Candidate(id=i, key="a", n_rows=2, due=1 + i * 20) for i in range(60)]
    single = Candidate(id=99, key="a", n_rows=2, due=2)
    assert Batcher(max_rows=4).choose([*big, single]).ids == (0, 99)


def test_two_kinds_of_picture_share_the_device_evenly() -> None:
    batcher = Batcher(max_rows=8)
    spent_s = {"slow": 0.0, "fast": 0.0}
    both = candidates(4, key="slow") + candidates(4, key="fast", first_id=10)
    for _ in range(300):
        decision = batcher.choose(both)
        cost_s = 0.5 if decision.key == "slow" else 0.05
        spent_s[str(decision.key)] += cost_s
        batcher.observe(decision.key, decision.n_rows, cost_s)
    assert abs(spent_s["slow"] - spent_s["fast"]) <= 0.5


def test_a_key_that_was_away_does_not_take_the_device_to_catch_up() -> None:
    batcher = Batcher(max_rows=8)
    for _ in range(100):
        batcher.observe("old", batcher.choose(candidates(1, key="old")).n_rows, 1.0)
    both = candidates(1, key="old") + candidates(1, key="new", first_id=10)
    turns = []
    for _ in range(6):
        decision = batcher.choose(both)
        turns.append(decision.key)
        batcher.observe(decision.key, decision.n_rows, 1.0)
    assert turns.count("old") == 3


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from((1, 2)), st.integers(0, 9)), min_size=1, max_size=30),
    st.integers(1, 64),
)
def test_every_batch_is_of_one_key_within_the_limit_and_everyone_gets_a_turn(
    kinds: list[tuple[str, int, int]], max_rows: int
) -> None:
    batcher = Batcher(max_rows=max_rows)
    waiting = {i: Candidate(id=i, key=key, n_rows=rows, due=due) for i, (key, rows, due) in enumerate(kinds)}
    for _ in range(len(kinds)):
        if not waiting:
            break
        decision = batcher.choose(list(waiting.values()))
        assert len({waiting[i].key for i in decision.ids}) == 1
        assert sum(waiting[i].n_rows for i in decision.ids) == decision.n_rows
        assert decision.n_rows <= max(max_rows, waiting[decision.ids[0]].n_rows)
        batcher.observe(decision.key, decision.n_rows, 0.1)
        for done in decision.ids:
            del waiting[done]
    assert not waiting


def test_a_key_whose_speed_has_changed_is_learnt_anew_and_no_other() -> None:
    batcher = Batcher()
    for key in ("a", "b"):
        settle(batcher, candidates(20, key=key), lambda n_rows: 3.0 * n_rows)
    batcher.forget(lambda key: key == "a")

    assert settle(batcher, candidates(20, key="b"), lambda n_rows: 3.0 * n_rows) == 2
    assert settle(batcher, candidates(20, key="a"), lambda n_rows: 0.020 + 0.001 * n_rows) >= 32


def test_the_next_size_to_learn_from_doubles_until_the_limit_is_known() -> None:
    batcher, sizes = Batcher(), []
    while (n_rows := batcher.next_size("a")) is not None:
        sizes.append(n_rows)
        batcher.learn("a", n_rows, 0.1 * max(1.0, n_rows / 8))
    assert list(dict.fromkeys(sizes)) == [2, 4, 8, 16]
    assert batcher.limit("a") == 8
    assert batcher.choose(candidates(20)).n_rows == 8


def test_where_every_size_gains_learning_ends_at_the_largest() -> None:
    batcher, sizes = Batcher(), []
    while (n_rows := batcher.next_size("a")) is not None:
        sizes.append(n_rows)
        batcher.learn("a", n_rows, 0.02)
    assert max(sizes) == batcher.limit("a") == 64


def test_a_given_limit_leaves_nothing_to_learn() -> None:
    assert Batcher(max_rows=6).next_size("a") is None


def test_calls_that_served_nobody_do_not_count_when_keys_take_turns() -> None:
    batcher = Batcher()
    both = candidates(1, key="a") + candidates(1, key="b", first_id=1)
    batcher.observe("a", 2, 0.1)
    batcher.observe("b", 2, 0.2)
    batcher.learn("a", 2, 60.0)
    assert batcher.choose(both).key == "a"


def test_the_first_seven_slow_calls_at_a_size_do_not_settle_it() -> None:
    """What 32 rows of the built-in model took when they were new, against 32 ms for 16 rows."""
    slow_ms = iter([149, 118, 69, 67, 66, 65, 64])
    batcher = Batcher()

    def seconds(n_rows: int) -> float:
        if n_rows == 32:
            return next(slow_ms, 43) / 1000
        return {2: 0.013, 4: 0.015, 8: 0.020, 16: 0.032}.get(n_rows, 0.0013 * n_rows)

    assert settle(batcher, candidates(20), seconds, turns=40) >= 32
