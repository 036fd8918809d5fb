"""Finds the entry for a message that somebody pastes: ours, or one of torch, diffusers, huggingface_hub or the system.

A message is looked for by its words because it comes without its class; the program itself never does so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sdfleet.doctor.entry import Entry
from sdfleet.doctor.table import ENTRIES

MOST_CHARS = 100_000
# A traceback ends with what happened; above stands how it came there, with file names that look like words.
_LAST_LINES = ((1, 8.0), (3, 4.0))
_STOP_WORDS = frozenset({"error", "with", "from", "that", "this", "cannot", "could", "file"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """An entry, and the piece of the text that it was found by. is_sure: a sign fits, not only some words."""

    entry: Entry
    by: str
    is_sure: bool


def explain(text: str, *, most: int = 3) -> tuple[Explanation, ...]:
    """The entries that fit the text, the best first; empty where none does.

    >>> [found.entry.id for found in explain("AssertionError: Torch not compiled with CUDA enabled")]
    ['torch-without-cuda']
    """
    text = text[-MOST_CHARS:]
    lines = [line for line in text.splitlines() if line.strip()]
    parts = [("\n".join(lines[-n:]), weight) for n, weight in _LAST_LINES] + [(text, 1.0)]
    scored: list[tuple[float, int, Explanation]] = []
    for at, entry in enumerate(ENTRIES):
        score, by = _score(entry, parts)
        if score:
            scored.append((-score, at, Explanation(entry=entry, by=" ".join(by.split())[:120], is_sure=True)))
    if not scored:
        scored = _by_words(text)
    return tuple(found for _, _, found in sorted(scored, key=lambda one: one[:2])[:most])


def _score(entry: Entry, parts: Sequence[tuple[str, float]]) -> tuple[float, str]:
    """How well signs fit: by the characters they take in, and where; with the piece that fits best."""
    best, by = 0.0, ""
    literal = (*(rf"\b{re.escape(code)}\b" for code in entry.codes), *map(re.escape, entry.symptoms))
    for sign in (*entry.signs, *literal):
        for where, weight in parts:
            found = re.search(sign, where, re.IGNORECASE | re.DOTALL | re.MULTILINE)
            if found is not None and found.group():
                score = weight * len(found.group())
                if score > best:
                    best, by = score, found.group()
                break
    return best, by


def _by_words(text: str) -> list[tuple[float, int, Explanation]]:
    words = _words(text)
    found = []
    for at, entry in enumerate(ENTRIES):
        shared = words & _words(" ".join((entry.title, *entry.symptoms)))
        if len(shared) >= 2:
            by = ", ".join(sorted(shared))
            found.append((-float(len(shared)), at, Explanation(entry=entry, by=by, is_sure=False)))
    return found


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"[a-z0-9_]{4,}", text.lower()) if word not in _STOP_WORDS}
