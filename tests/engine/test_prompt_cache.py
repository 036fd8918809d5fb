from __future__ import annotations

import torch

from sdfleet.engine.conditioning import Conditioning, Room
from sdfleet.engine.prompt_cache import PromptCache, PromptKey

ROW_BYTES = 4 * 10


def key(text: str, *, checkpoint: str = "a", n_chunks: int = 1) -> PromptKey:
    return PromptKey(checkpoint=checkpoint, encoder="sd", text=text, room=Room(n_chunks=n_chunks))


def rows(n_rows: int = 1) -> Conditioning:
    return Conditioning(states=torch.zeros(n_rows, 10), pooled=None, tokens=())


def fill(cache: PromptCache, *texts: str) -> None:
    for text in texts:
        cache.conditioning(key(text), rows)


def test_second_request_gets_the_very_same_tensors() -> None:
    cache = PromptCache(ROW_BYTES)
    first = cache.conditioning(key("cat"), rows)
    assert cache.conditioning(key("cat"), rows) is first
    assert (cache.n_hits, cache.n_misses) == (1, 1)


def test_other_room_or_checkpoint_is_another_entry() -> None:
    cache = PromptCache(10 * ROW_BYTES)
    fill(cache, "cat")
    assert key("cat", n_chunks=2) not in cache
    assert key("cat", checkpoint="b") not in cache


def test_least_recently_used_leaves_first() -> None:
    cache = PromptCache(2 * ROW_BYTES)
    fill(cache, "old", "young", "old", "new")
    assert [text for text in ("old", "young", "new") if key(text) in cache] == ["old", "new"]


def test_never_holds_more_than_its_bytes() -> None:
    cache = PromptCache(5 * ROW_BYTES)
    for i in range(20):
        cache.conditioning(key(str(i)), lambda i=i: rows(i % 4 + 1))  # type: ignore[misc]
        assert cache.held_bytes <= cache.max_bytes
    assert len(cache) >= 1


def test_entry_larger_than_the_cache_pushes_nobody_out() -> None:
    cache = PromptCache(2 * ROW_BYTES)
    fill(cache, "cat")
    cache.conditioning(key("huge"), lambda: rows(3))
    assert key("cat") in cache
    assert key("huge") not in cache


def test_a_view_counts_with_the_memory_it_keeps_alive() -> None:
    cache = PromptCache(1000 * ROW_BYTES)
    whole = torch.zeros(100, 10)
    cache.conditioning(key("view"), lambda: Conditioning(states=whole[:1], pooled=whole[0], tokens=()))
    assert cache.held_bytes == 100 * ROW_BYTES


def test_forgetting_a_checkpoint_leaves_the_others() -> None:
    cache = PromptCache(10 * ROW_BYTES)
    fill(cache, "cat")
    cache.conditioning(key("cat", checkpoint="b"), rows)
    cache.forget("a")
    assert key("cat") not in cache
    assert key("cat", checkpoint="b") in cache
    assert cache.held_bytes == ROW_BYTES


def test_clearing_gives_all_bytes_back() -> None:
    cache = PromptCache(10 * ROW_BYTES)
    fill(cache, "cat", "dog")
    cache.clear()
    assert (len(cache), cache.held_bytes) == (0, 0)
