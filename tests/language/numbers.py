"""What /metrics says, before and after."""

from __future__ import annotations

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from tests.api.serving import Running

Numbers = dict[tuple[str, frozenset[tuple[str, str]]], float]


def told(here: Running) -> Numbers:
    """Every number of /metrics by its name and labels."""
    text = httpx2.get(f"{here.url}/metrics", timeout=60).text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def grown(here: Running, before: Numbers, name: str, **labels: str) -> float:
    """By how much a number has grown."""
    key = name, frozenset(labels.items())
    return told(here).get(key, 0.0) - before.get(key, 0.0)
