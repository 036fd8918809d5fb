"""A yes to one download: what `fetch` asks for before the first byte.

Only few places may make one, and tests/catalog/test_consent.py holds them to it: the command line after its question
or `--yes`, the API after a call that confirms the plan, the setting `pull_without_asking`, and a node whose router had
such a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Giver = Literal["command line", "api", "setting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Consent:
    """Somebody said yes to this plan; for another, with other files or another licence, it is none."""

    plan_id: str
    given_by: Giver
