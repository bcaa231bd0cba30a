"""The order of a client's work and others': which point of it has been reached, and what comes after which.

A client marks points of its work by numbers that grow (`Order.mark`); another's work is put behind such a point
(`Order.follow`). On the host a call's work is done when the call returns, so there is nothing to mark and nothing to
wait for: `HOST_ORDER`. On a device the work is what streams have been given: `StreamOrder`, over `fence`. No host waits
for a device here, but in `wait_until_reached`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from etha.tensor_bus.ipc.fence import Fences

_FENCES_KEPT: Final = 4
"""Of agents before this one, for clients that have been idle since."""

_FIRST_LOOK: Final = 20e-6
_LONGEST_PAUSE: Final = 1e-3


class Order(Protocol):
    """How one client's work is ordered."""

    def stream(self) -> int:
        """What this thread's work is given to now."""

    def require_open(self) -> None:
        """Raise `StreamCapturing` where this thread's work is being captured: nothing can be marked or followed."""

    def mark(self, *streams: int) -> int:
        """Mark the point behind all that ``streams``, and then this thread's own, have been given; 0 if it is reached
        already."""

    def follow(self, slot: int, number: int, *, fenced: bool = True) -> None:
        """What this thread does from now on comes after the point ``number`` of the client with that slot; not
        ``fenced``: one that was marked under an agent before this one."""

    def reached(self, number: int) -> bool:
        """Whether a point of this client's own has been reached."""

    def abandoned(self, slot: int) -> bool:
        """Whether the client with that slot has died, so that its points may never have been reached."""


class HostOrder:
    """Work that is done when its call returns."""

    def stream(self) -> int:
        """There is but one."""
        return 0

    def require_open(self) -> None:
        """It always is."""

    def mark(self, *streams: int) -> int:
        """Reached already."""
        return 0

    def follow(self, slot: int, number: int, *, fenced: bool = True) -> None:
        """Everything that was told of is done."""

    def reached(self, number: int) -> bool:
        """It is."""
        return True

    def abandoned(self, slot: int) -> bool:
        """What it told of was done before it told."""
        return False


HOST_ORDER: Final = HostOrder()


class StreamOrder:
    """The work of a device's streams, as one client gives it.

    Attributes:
        fences: of the agent that serves now; replaced by its successor's.
        slot: the client's.
        newest: the last point that was marked; 0 for none.
    """

    def __init__(self, fences: Fences, slot: int, stream: Callable[[], int]) -> None:
        """Take over.

        Args:
            fences: mapped and registered.
            slot: the client's own, whichever agent serves.
            stream: the driver's number of this thread's current stream.
        """
        self.fences = fences
        self.slot = slot
        self.stream = stream
        self.newest = 0
        self._before: list[Fences] = []
        self._lock = threading.Lock()

    def require_open(self) -> None:
        """See `Fences.require_open`."""
        self.fences.require_open(self.stream())

    def replace(self, make: Callable[[], Fences]) -> Fences:
        """Go on in a successor's fences. Returns those before, in which other clients' points are looked for on.

        Raises:
            StreamCapturing: a stream on which a point was marked is being captured. Nothing has changed.
            DriverError: the driver refuses. Nothing has changed.
        """
        with self._lock:
            for stream in (self.stream(), *self.fences.streams()):
                self.fences.require_open(stream)
            fences = make()
            try:
                fences.carry_on(self.fences)
            except BaseException:
                fences.close()
                raise
            self.fences, before = fences, self.fences
            self._before.insert(0, before)
            while len(self._before) > _FENCES_KEPT:
                self._before.pop().close()
        return before

    def close(self) -> None:
        """Nothing is marked or followed any more."""
        with self._lock:
            for fences in (self.fences, *self._before):
                fences.close()
            self._before.clear()

    def mark(self, *streams: int) -> int:
        """See `Fences.signal`: each stream's number waits for the one before."""
        with self._lock:
            current = self.stream()
            for stream in dict.fromkeys(streams):
                if stream != current:
                    self.fences.signal(stream, self.slot)
            self.newest = self.fences.signal(current, self.slot)
            return self.newest

    def follow(self, slot: int, number: int, *, fenced: bool = True) -> None:
        """See `Fences.wait`. A client that has not come back to this agent marked its points in the fences of the last
        that it talked with: those in which its slot stands highest."""
        with self._lock:
            here = self.fences if fenced else max(self._before, key=lambda each: each.value(slot), default=self.fences)
            here.wait(self.stream(), slot, number)

    def reached(self, number: int) -> bool:
        """As the host sees it now."""
        return self.fences.reached(self.slot, number)

    def abandoned(self, slot: int) -> bool:
        """See `Fences.released`."""
        return self.fences.released(slot)


def wait_until_reached(order: Order, number: int, deadline: float, now: Callable[[], float]) -> bool:
    """Look, with pauses that grow to a millisecond, until a point of one's own is reached; False at the deadline."""
    pause = _FIRST_LOOK
    while not order.reached(number):
        if now() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return True
