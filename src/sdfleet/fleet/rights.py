"""What each kind of connection may say and hear at the router's broker, and where it is answered.

Whoever connects has a key of one kind: the router's, a node's, a join code's, that of a machine that asks, a guest's.
"""

from __future__ import annotations

from sdfleet.fleet.broker import User
from sdfleet.fleet.keys import NKey
from sdfleet.fleet.subjects import inbox_of


def router_user(key: str) -> User:
    """The router may say and hear everything but the server's own affairs. key: public, as for the others."""
    return User(nkey=key, denied=("$SYS.>",))


def node_user(key: str, node: str) -> User:
    """A node speaks for itself and hears what is said to it."""
    return User(nkey=key, publish=(f"fleet.up.{node}.>",), subscribe=(f"fleet.n.{node}.>", f"{inbox_of(node)}.>"))


def code_user(key: str, code_id: str) -> User:
    """Who has a join code may use it."""
    return User(nkey=key, publish=(f"fleet.join.{code_id}",), subscribe=(f"{code_inbox(code_id)}.>",))


def asking_user(key: str) -> User:
    """A machine that asks may ask on, once the router knows its key."""
    return User(nkey=key, publish=(f"fleet.asking.{key}",), subscribe=(f"{asking_inbox(key)}.>",))


def guest_user() -> User:
    """A guest may ask to join, and hears nothing at all."""
    return User(nkey=guest_key().public, publish=("fleet.ask.*",), subscribe=())


def guest_key() -> NKey:
    """The key of whoever has none: everybody knows it, and it opens almost nothing."""
    return NKey.derived(b"sdfleet", "key of a guest")


def code_inbox(code_id: str) -> str:
    """Where a machine that joins with a code is answered."""
    return f"_INBOX_join_{code_id}"


def asking_inbox(key: str) -> str:
    """Where a machine that asks is answered."""
    return f"_INBOX_ask_{key}"
