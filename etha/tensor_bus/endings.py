"""What a client has done with and has not told its agent of yet: imports of which tensors are still kept, and leases
that were collected.

A tensor that somebody keeps keeps its memory mapped, so the end of an import, or of its memory alone, is told only when
the last of them is gone. Both kinds of end may come from a finaliser, where neither a lock may be taken nor a device be
asked: they are only noted there, and settled by the next call of etha. A thread that is interrupted in that leaves it
to the next call; what is told twice is no error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from etha.tensor_bus import packets
from etha.tensor_bus.connection import Connection
from etha.tensor_bus.ipc.mapping import TABLE, ImportedMemory


class _Ended(NamedTuple):
    """An import, or only its memory (``subscribed``), that is over; the agent hears it once no tensor of it is left."""

    number: int
    memory: ImportedMemory | None
    subscribed: bool


class Endings:
    """One client's. Safe across threads."""

    def __init__(self, connection: Connection) -> None:
        """Nothing is over yet."""
        self._connection = connection
        self._dropped: deque[_Ended] = deque()
        self._closing: dict[int, _Ended] = {}
        self._leases: deque[tuple[int, int]] = deque()

    def __bool__(self) -> bool:
        """Whether tensors of an import that is over are still kept."""
        return bool(self._closing)

    def __contains__(self, number: int) -> bool:
        """Whether tensors of this import, which is over, are still kept."""
        return number in self._closing

    def import_over(self, number: int, memory: ImportedMemory | None, *, subscribed: bool = False) -> None:
        """Note that an import is over, or that only its memory is. May be called by a finaliser.

        Args:
            number: of the import.
            memory: what was mapped; None if that was noted before, or there was nothing.
            subscribed: the subscription itself goes on.
        """
        self._dropped.append(_Ended(number, memory, subscribed))

    def lease_dropped(self, number: int, stream: int) -> None:
        """Note that a lease was collected: it is given back behind what its stream has been given by the next call. On
        the host it is given back now. May be called by a finaliser."""
        if self._connection.device.ordered:
            self._leases.append((number, stream))
        else:
            self._connection.tell(packets.Release(number))

    def settle(self, release: Callable[[int, int], None]) -> None:
        """Unmap what nobody views, and tell the agent what is over.

        Args:
            release: gives a claim back, by its number, behind a point of this client's work. It is the client's own,
                and not kept: a client that is dropped must go at once, and not with the next collection.
        """
        if not (self._leases or self._dropped or self._closing):
            TABLE.reap()
            self._connection.device.settle()
            return
        if self._leases:
            self._give_leases_back(release)
        for ended in list(self._dropped):
            before = self._closing.get(ended.number)
            memory = ended.memory if ended.memory is not None or before is None else before.memory
            self._closing[ended.number] = ended._replace(memory=memory)
            if memory is not None:
                memory.close()
            try:
                self._dropped.remove(ended)
            except ValueError:
                continue  # another thread did the same
        TABLE.reap()
        if not self._connection.device.settle():
            return
        for number, ended in list(self._closing.items()):
            if ended.memory is None or not ended.memory.live:
                if ended.subscribed:
                    self._connection.tell(packets.Unmapped(number))
                else:
                    release(number, 0)
                known = self._closing.pop(number, None)
                if known is not None and known is not ended:
                    self._closing.setdefault(number, known)  # another thread has ended more than this

    def _give_leases_back(self, release: Callable[[int, int], None]) -> None:
        for dropped in list(self._leases):
            number, stream = dropped
            release(number, self._connection.device.order.mark(stream))
            try:
                self._leases.remove(dropped)
            except ValueError:
                continue  # another thread did the same
