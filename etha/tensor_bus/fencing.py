"""The agent's fences: a slot for every client of a device, and the death of one told to the streams that wait for it.

An agent of the host has none: there nothing is ordered by streams. Used by the agent's control loop only.
"""

from __future__ import annotations

from etha.errors import InvalidRecord
from etha.tensor_bus.ipc.fence import FenceTable


class Fencing:
    """An agent's slots; of the host's agent, none."""

    def __init__(self, *, device: bool) -> None:
        """Make the table, if the agent serves a device.

        Raises:
            SystemLimit: no descriptor, mapping or memory is left.
        """
        self._table = FenceTable() if device else None

    @property
    def needed(self) -> bool:
        """Whether this agent's clients order their work by fences."""
        return self._table is not None

    def fds(self) -> list[int]:
        """What goes with a welcome; the table's."""
        return [] if self._table is None else [self._table.fileno()]

    def take(self) -> int:
        """A slot for a new client; 0 where there are none.

        Raises:
            SystemLimit: all have been given out.
        """
        return 0 if self._table is None else self._table.take()

    def keep(self, slot: int) -> None:
        """A predecessor's client has this slot."""
        if self._table is not None:
            self._table.keep(slot)

    def adopt(self, fds: list[int]) -> None:
        """Files of predecessors, in which streams of a client that has come back may wait; neither kept nor closed.

        Raises:
            InvalidRecord: they are none.
            SystemLimit: no mapping is left.
        """
        if self._table is None:
            raise InvalidRecord("fences came where there are none.", resource="fences")
        for fd in fds:
            self._table.adopt(fd)

    def release(self, slot: int) -> None:
        """The client with this slot is gone: nobody waits for it any more."""
        if self._table is not None:
            self._table.release(slot)

    def reached(self, slot: int, fence: int) -> bool:
        """Whether the client with this slot has reached that point of its work, as far as any of the files shows."""
        return self._table is None or self._table.reached(slot, fence)

    def close(self) -> None:
        """Unmap; idempotent. Workers keep their mappings."""
        if self._table is not None:
            self._table.close()
