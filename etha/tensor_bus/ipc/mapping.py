"""The process's table of opened allocations: each mapped once, counted, and unmapped only when nobody looks.

A reference is held by whoever opened an allocation and by every buffer that a tensor views. Buffers die whenever
Python pleases, also inside the collector and at interpreter exit, where neither a lock may be taken nor memory be
unmapped (another object of the same dying cycle may still read it). So a buffer's end is only noted, in a deque;
`MappingTable.reap`, called at the next etha call, does what follows from it. What is never reaped, the kernel unmaps
with the process.

A forked child has none of the mappings (``MADV_DONTFORK``), so its table forgets them without unmapping: by then
something else may lie at those addresses.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from etha.errors import InvalidArgument, InvalidRecord, LeaseReleased
from etha.tensor_bus.ipc.allocations import Allocation, pieces
from etha.tensor_bus.ipc.backend import HOST, Backend, Opened
from etha.tensor_bus.ipc.manifest import Manifest, validate


class Mapping:
    """One allocation, mapped into this process. Made by `MappingTable.open` only; compared by identity.

    Attributes:
        allocation: what is mapped.
    """

    __slots__ = ("_opened", "allocation", "references")

    def __init__(self, allocation: Allocation, opened: Opened) -> None:
        self.allocation = allocation
        self._opened = opened
        self.references = 0

    @property
    def address(self) -> int:
        """Address of the first byte; 0 once unmapped."""
        return self._opened.address

    @property
    def size(self) -> int:
        """Bytes mapped."""
        return self._opened.size

    def close(self) -> None:
        """Unmap. For the table alone, when the last reference is gone."""
        self._opened.close()


class Tally:
    """How many buffers of one user are alive, or dead and not reaped yet. Changed under the table's lock."""

    __slots__ = ("buffers",)

    def __init__(self) -> None:
        self.buffers = 0


class MappingTable:
    """Opened allocations by what they claim to be: file and size.

    The size is part of the key, so that a file which grew between two registrations is mapped anew instead of being
    viewed behind its mapping's end.

    Notes:
        Safe across threads: one lock guards the table, and nothing waits under it but the kernel's own work.
        A fork by Python waits for the lock too, so a child never inherits a mapping that is not marked yet.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._mappings: dict[Allocation, Mapping] = {}
        self._dead: deque[tuple[Mapping, Tally | None]] = deque()

    def open(self, allocation: Allocation, fds: Sequence[int], backend: Backend = HOST) -> Mapping:
        """Take a reference to an allocation, mapping it if this process has not yet.

        The descriptors are checked either way: who sends a wrong one is refused, whoever came before.

        Args:
            allocation: from a manifest that has passed `validate`.
            fds: those of its pieces, in order; neither kept nor closed.
            backend: of its kind.

        Raises:
            StaleHandle: a descriptor leads to another file than claimed.
            InvalidRecord: the memory is shorter than claimed, or cannot be mapped.
            SystemLimit: no mapping, no address space or no device memory is left.
            DriverError: the device's driver refuses.
        """
        with self._lock:
            mapping = self._mappings.get(allocation)
            if mapping is None:
                mapping = Mapping(allocation, backend.open_allocation(allocation, fds))
                self._mappings[allocation] = mapping
            else:
                backend.check_descriptors(allocation, fds)
            mapping.references += 1
            return mapping

    def release(self, mapping: Mapping) -> None:
        """Give back a reference taken by `open`; the last one unmaps. After a fork, in the child: nothing."""
        with self._lock:
            mapping.references -= 1
            self._unmap_unused(mapping)

    def buffer(
        self, mapping: Mapping, offset: int, nbytes: int, tally: Tally | None = None
    ) -> ctypes.Array[ctypes.c_ubyte]:
        """Make an object for ``torch.frombuffer`` that keeps ``mapping`` open while it lives.

        Python takes it for writable; what the pages permit decides.

        Args:
            mapping: open, with a reference held by the caller.
            offset: bytes from the mapping's first, >= 0.
            nbytes: length, > 0.
            tally: counts the buffer until it is dead and reaped.

        Raises:
            InvalidRecord: the range is not inside the mapping.
        """
        if offset < 0 or nbytes <= 0 or offset + nbytes > mapping.size:
            raise InvalidRecord(f"Bytes {offset} to {offset + nbytes} lie outside a mapping of {mapping.size}.")
        with self._lock:
            if self._mappings.get(mapping.allocation) is not mapping:
                raise InvalidRecord("The mapping was closed, or belongs to the parent process.")
            array = (ctypes.c_ubyte * nbytes).from_address(mapping.address + offset)
            # The deque of this process, not whatever self._dead will be after a fork.
            finalizer = weakref.finalize(array, self._dead.append, (mapping, tally))
            finalizer.atexit = False
            mapping.references += 1
            if tally is not None:
                tally.buffers += 1
            return array

    def release_after(self, owner: object, mappings: tuple[Mapping, ...]) -> weakref.finalize[..., object]:
        """Release references at the `reap` after ``owner`` was collected; detach it to release them oneself."""
        finalizer = weakref.finalize(owner, self._dead.extend, tuple((mapping, None) for mapping in mappings))
        finalizer.atexit = False
        return finalizer

    def reap(self) -> int:
        """Settle what has died since the last call, and unmap what has no references left.

        Returns:
            Allocations unmapped.
        """
        # The common case, at every etha call: nothing died, and no lock is worth taking to find that out.
        if not self._dead:
            return 0
        unmapped = 0
        with self._lock:
            while self._dead:
                # No call from here to where both are counted: Python looks for signals after calls, and an interrupt
                # in between would keep the owner waiting for a buffer that is dead.
                mapping, tally = self._dead[0]
                del self._dead[0]
                if tally is not None:
                    tally.buffers -= 1
                mapping.references -= 1
                unmapped += self._unmap_unused(mapping)
        return unmapped

    def _unmap_unused(self, mapping: Mapping) -> bool:
        if mapping.references > 0 or self._mappings.get(mapping.allocation) is not mapping:
            return False
        # Unmapped before it is forgotten: should the kernel refuse, the next release tries again.
        mapping.close()
        del self._mappings[mapping.allocation]
        return True

    def __len__(self) -> int:
        """Allocations mapped now."""
        return len(self._mappings)

    def before_fork(self) -> None:
        """Hold the lock across a fork, in the thread that forks."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Let go of the lock that `before_fork` took."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Forget every mapping without unmapping: the child has none of them."""
        self._forget()


class ImportedMemory:
    """One publication's memory in a reader: a reference to each allocation, and a count of who still looks.

    Closing it does not end the views that were made of it. The owner may have the memory back only when both are
    gone, which is what `live` says. An import that is dropped without `close` is closed by the next `reap`.

    Attributes:
        manifest: as validated.
    """

    def __init__(self, manifest: Manifest, mappings: Iterable[Mapping], table: MappingTable | None = None) -> None:
        """Take over one reference per allocation.

        Args:
            manifest: has passed `validate`.
            mappings: one per allocation, in their order, from ``table.open``; the references are this object's now.
            table: where they were opened; None for `TABLE`.

        Raises:
            InvalidArgument: the mappings are not those of the manifest. The references stay the caller's.
        """
        self.manifest = manifest
        self._table = TABLE if table is None else table
        self._mappings = tuple(mappings)
        if tuple(mapping.allocation for mapping in self._mappings) != manifest.allocations:
            raise InvalidArgument("The mappings are not one for each allocation of the manifest.", resource="mappings")
        self._tally = Tally()
        self._pid = os.getpid()
        self._finalizer = self._table.release_after(self, self._mappings)

    @property
    def live(self) -> bool:
        """Whether the memory is in use: not closed, or a view not dead and reaped. In a forked child always False."""
        return self._pid == os.getpid() and (self._finalizer.alive or self._tally.buffers > 0)

    def buffer(self, storage: int) -> ctypes.Array[ctypes.c_ubyte]:
        """A new buffer over exactly the bytes of ``manifest.storages[storage]``, which must have some.

        Raises:
            LeaseReleased: the import was closed.
            InvalidRecord: in a forked child, which has nothing of it mapped.
        """
        row = self.manifest.storages[storage]
        if not self._finalizer.alive:
            raise LeaseReleased("The import was closed; no view of it can be made.", remedy="Subscribe again.")
        return self._table.buffer(self._mappings[row.allocation], row.offset, row.nbytes, self._tally)

    def close(self) -> None:
        """Give back the references; idempotent. Views stay valid, and keep what they view mapped."""
        if self._finalizer.detach() is not None:
            for mapping in self._mappings:
                self._table.release(mapping)


def import_memory(
    manifest: Manifest, fds: Sequence[int], table: MappingTable | None = None, backend: Backend = HOST
) -> ImportedMemory:
    """Validate a manifest and map all of its allocations, or none.

    Args:
        manifest: from another process.
        fds: one per piece, in their order; neither kept nor closed.
        table: where to open them; None for `TABLE`.
        backend: of their kind.

    Raises:
        InvalidRecord: the manifest is none, memory is shorter than claimed, or descriptors are missing.
        StaleHandle, SystemLimit, DriverError: see `MappingTable.open`.
    """
    validate(manifest)
    if len(fds) != len(manifest.pieces):
        raise InvalidRecord(f"{len(fds)} descriptors came for {len(manifest.pieces)} pieces of memory.", resource="fds")
    place = TABLE if table is None else table
    opened: list[Mapping] = []
    try:
        for allocation, some in by_allocation(manifest, fds):
            opened.append(place.open(allocation, some, backend))
        return ImportedMemory(manifest, opened, place)
    except BaseException:
        for mapping in opened:
            place.release(mapping)
        raise


def by_allocation(manifest: Manifest, fds: Sequence[int]) -> Iterator[tuple[Allocation, Sequence[int]]]:
    """Each allocation with its own of the descriptors, of which there is one per piece."""
    first = 0
    for allocation in manifest.allocations:
        last = first + len(pieces(allocation))
        yield allocation, fds[first:last]
        first = last


TABLE: Final = MappingTable()
"""This process's table."""

os.register_at_fork(
    before=TABLE.before_fork,
    after_in_parent=TABLE.after_fork_in_parent,
    after_in_child=TABLE.after_fork_in_child,
)
