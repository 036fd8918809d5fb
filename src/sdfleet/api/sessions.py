"""What stands for a key in a browser: a cookie that no script can read, under the server's own signature.

Nothing is kept on the server: a key that is revoked, or an SD_API_KEY that is changed, ends every session that stands
on it. Where such a cookie is what lets a caller in, a change also needs a header that no form of another site can send.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from http.cookies import CookieError, SimpleCookie

from sdfleet.storage.signing import is_signed, sign

SESSION_S = 12 * 3600
# Forms and images of other sites cannot send it, and a script of theirs would have to ask first.
PROOF = "x-requested-by"


class Sessions:
    """Makes and reads what the cookies hold: `<until>.<subject>.<signature>`. clock: seconds since 1970."""

    def __init__(self, signing_key: bytes, *, clock: Callable[[], float] = time.time) -> None:
        self._signing_key = signing_key
        self._clock = clock

    def issue(self, subject: str) -> str:
        """A token for who has just shown their key.

        >>> sessions = Sessions(b"k" * 32, clock=lambda: 1000.0)
        >>> sessions.subject(sessions.issue("key-1")), sessions.subject("99999.key-1.forged")
        ('key-1', None)
        """
        until = str(int(self._clock()) + SESSION_S)
        return f"{until}.{subject}.{sign(self._signing_key, 'session', until, subject)}"

    def subject(self, token: str) -> str | None:
        """Who a token was issued to; None if it is not ours, or over."""
        until, _, rest = token.partition(".")
        subject, _, signature = rest.rpartition(".")
        if not (until.isascii() and until.isdigit() and len(until) <= 12):
            return None
        if not is_signed(self._signing_key, signature, "session", until, subject):
            return None
        return subject if int(until) > self._clock() else None

    def print_of(self, secret: str) -> str:
        """What stands for a key that is in no table: another one for every key, and of no use without the server's."""
        return sign(self._signing_key, "session of", secret)[:32]


def cookie_name(headers: Mapping[str, str]) -> str:
    """The name of our cookie: a browser gives it to every port of a machine, and each may have a server of its own.

    >>> cookie_name({"host": "localhost:7860"}), cookie_name({"host": "pictures.example"})
    ('sdfleet_session_7860', 'sdfleet_session')
    """
    _, colon, port = headers.get("host", "").rpartition(":")
    return f"sdfleet_session_{port}" if colon and port.isascii() and port.isdigit() else "sdfleet_session"


def token_of(headers: Mapping[str, str]) -> str | None:
    """The token in the Cookie header, if there is one."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(cookie_name(headers))
    except CookieError:
        return None
    return None if found is None else found.value
