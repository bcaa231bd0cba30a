"""What the agent holds of one publication: descriptors as they arrive, then mappings. Data and its handling, no rules.

The control loop fills it; a thread beside the loop opens and closes it, once each. The agent maps what it holds and
never touches the bytes: an owner that shrinks its memory cannot end it with SIGBUS.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from etha.tensor_bus import wire
from etha.tensor_bus.ipc.backend import Backend
from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.ipc.mapping import TABLE, Mapping, by_allocation


@dataclass
class Held:
    """What the agent has of one publication.

    Attributes:
        manifest: what it should be.
        client, sequence: whose registration it is; descriptors bear the sequence.
        fds: by piece of the manifest; -1 while it has not arrived.
        mappings: once opened.
        opening: all has arrived.
        gated: it is not to be opened before its owner is back.
        follows: the generation whose memory this is to become; its descriptors are this one's too.
        moves: the same, once a rebinding waits for it.
    """

    manifest: Manifest
    client: bytes
    sequence: int
    fds: list[int]
    mappings: list[Mapping] = field(default_factory=list)
    opening: bool = False
    gated: bool = False
    follows: int = 0
    moves: int = 0

    @property
    def missing(self) -> int:
        """Descriptors that have not arrived."""
        return 0 if self.opening else self.fds.count(-1)

    def take(self, first: int, fds: list[int]) -> bool:
        """Put descriptors in their place, and close those that are there already; False where that is no place."""
        places = range(first, first + len(fds))
        if not fds or first < 0 or places.stop > len(self.fds):
            return False
        for place, fd in zip(places, fds, strict=True):
            if self.fds[place] < 0 and not self.opening:
                self.fds[place] = fd
            else:  # sent twice: by a worker that came back, or fetched meanwhile
                os.close(fd)
        return True

    def copy_from(self, before: Held) -> None:
        """Take copies of the descriptors that are still missing and that ``before`` has.

        Raises:
            OSError: this process may open no more.
        """
        known = {each: fd for each, fd in zip(before.manifest.pieces, before.fds, strict=False) if fd >= 0}
        for place, piece in enumerate(self.manifest.pieces):
            if self.fds[place] < 0 and piece in known:
                self.fds[place] = fcntl.fcntl(known[piece], fcntl.F_DUPFD_CLOEXEC, 0)

    def open(self, backend: Callable[[], Backend]) -> None:
        """Map all of it, or nothing.

        Raises:
            EthaError: see `etha.tensor_bus.ipc.mapping.MappingTable.open`.
        """
        try:
            for allocation, fds in by_allocation(self.manifest, self.fds):
                self.mappings.append(TABLE.open(allocation, fds, backend()))
        except BaseException:
            self._unmap()
            raise

    def close(self, backend: Callable[[], Backend] | None = None) -> None:
        """Unmap what is mapped, and close the descriptors.

        Args:
            backend: of what was mapped, to be asked to unmap it; None if nothing was.

        Raises:
            DriverError: the device keeps what it does not give back; it is asked again with the next that is closed.
        """
        mapped = bool(self.mappings)
        self._unmap()
        wire.close_all(fd for fd in self.fds if fd >= 0)
        if mapped and backend is not None:
            backend().settle()

    def _unmap(self) -> None:
        while self.mappings:
            TABLE.release(self.mappings.pop())
        TABLE.reap()
