"""How the router speaks to its nodes: each message signed with that node's own secret, and nothing kept for later."""

from __future__ import annotations

import logging

from sdfleet.errors import StoreUnavailable
from sdfleet.fleet.members import Members
from sdfleet.fleet.packing import pack
from sdfleet.fleet.signing import SIGNATURE, sign
from sdfleet.fleet.subjects import down
from sdfleet.fleet.transport import Bus

log = logging.getLogger(__name__)


class Voice:
    """See the file's first line."""

    def __init__(self, bus: Bus, members: Members) -> None:
        self._bus = bus
        self._members = members

    async def tell(self, node: str, what: str, message: object, *, reply: str = "") -> None:
        """Say something to a node. reply: in the node's own space, where it is to answer.

        What cannot be said is lost, as everything on the bus may be: whoever needs an answer says it again.
        """
        member = self._members.get(node)
        if member is None:
            return
        subject, payload = down(node, what), pack(message)
        headers = {SIGNATURE: sign(member.settled.secret, subject, payload)}
        try:
            await self._bus.publish(subject, payload, headers=headers, reply=reply)
        except StoreUnavailable as exc:
            log.info("a node could not be told", extra={"node": node, "what": what, "why": str(exc)})
