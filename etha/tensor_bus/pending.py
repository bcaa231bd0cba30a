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

    __slots__ = ("_reply", "_wake", "asked", "key", "lost", "mail", "waiting")

    def __init__(self, key: int, asked: bytes = b"") -> None:
        self.key = key
        self.asked = asked
        self.mail = wire.Mail()
        self.lost = False
        self.waiting = False
        self._wake: threading.Event | None = None
        self._reply: packets.FromAgent | None = None

    @property
    def reply(self) -> packets.FromAgent | None:
        """The reply, once it has come: its last packet."""
        if self._reply is None and self.mail:
            packet = packets.FROM_AGENT.decode(self.mail[-1][0])
            self.heard(packet)
        return self._reply

    def heard(self, packet: packets.FromAgent) -> None:
        """What the last packet of the mail says, to whom it has decoded already."""
        if not isinstance(packet, packets.Descriptors):
            self._reply = packet

    def listen(self) -> None:
        """Be woken from now on. Only whoever waits for another thread needs that: most threads receive for themselves,
        and an event costs six calls to make."""
        if self._wake is None:
            self._wake = threading.Event()
        else:
            self._wake.clear()

    def sleep(self, seconds: float) -> None:
        """Wait for `wake`, from the last `listen` on."""
        if self._wake is not None:
            self._wake.wait(seconds)

    def wake(self) -> None:
        """Something has happened that who waits must see."""
        if self._wake is not None:
            self._wake.set()
