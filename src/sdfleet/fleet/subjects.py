"""Where a fleet's messages are said: a node's own subjects, which the broker keeps apart from every other's."""

from __future__ import annotations

import re

from sdfleet.fleet.packing import BrokenMessage

_NODE = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


def down(node: str, what: str) -> str:
    """The subject for something said to a node."""
    return f"fleet.n.{_checked(node)}.{what}"


def up(node: str, what: str) -> str:
    """The subject for something that a node says."""
    return f"fleet.up.{_checked(node)}.{what}"


def node_of(subject: str) -> str:
    """Whose subject this is; the broker lets only that node write to it. Raises BrokenMessage."""
    parts = subject.split(".")
    if len(parts) < 4 or parts[0] != "fleet" or parts[1] not in {"up", "n"} or not is_node_id(parts[2]):
        raise BrokenMessage(f"{subject[:80]!r} is no subject of the fleet")
    return parts[2]


def inbox_of(node: str) -> str:
    """The only subjects on which a node is answered."""
    return f"_INBOX_{_checked(node)}"


def is_node_id(text: str) -> bool:
    """Whether this may name a node: small letters, digits and dashes, at most 32.

    >>> is_node_id("mac-studio"), is_node_id("a.b"), is_node_id("*")
    (True, False, False)
    """
    return _NODE.fullmatch(text) is not None


def _checked(node: str) -> str:
    if not is_node_id(node):
        raise BrokenMessage(f"{node[:80]!r} names no node")
    return node
