"""One expected reply: who waits for it, and what of it has come."""

from __future__ import annotations

import threading

from etha.tensor_bus import packets, wire


class Pending:
    """One expected reply.

    Attributes:
        key: the request's number, or the command's sequence negated.
        asked: the request's packet, to be sent again to a successor of the agent; empty for a command.
        mail: the reply's packets, and with them its descriptors.
        lost: descriptors could not be taken.
    """

    __slots__ = ("_reply", "asked", "key", "lost", "mail", "waiting", "wake")

    def __init__(self, key: int, asked: bytes = b"") -> None:
        self.key = key
        self.asked = asked
        self.mail = wire.Mail()
        self.lost = False
        self.waiting = False
        self.wake = threading.Event()
        self._reply: packets.FromAgent | None = None

    @property
    def reply(self) -> packets.FromAgent | None:
        """The reply, once it has come: its last packet."""
        if self._reply is None and self.mail:
            packet = packets.FROM_AGENT.decode(self.mail[-1][0])
            if not isinstance(packet, packets.Descriptors):
                self._reply = packet
        return self._reply
