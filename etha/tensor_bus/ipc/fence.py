"""The order of streams across processes: 64-bit slots in shared host memory, written and awaited by the device.

Each writer and each reader has a slot. A process's stream writes the next number into its own slot behind the work that
it queued, and another's stream waits until the slot has reached that number. So every read is ordered after the write
that it reads and every write after the reads that it follows, and no host waits for a device. Numbers only grow.

The agent makes the slots (`FenceTable`): one sealed memory file, which nobody can shrink under another's feet. When a
process dies, the agent stores `RELEASED` in its slots, and nobody waits for the dead any more. Each worker maps and
registers the file (`Fences`).

A successor of the agent makes a file of its own, in which every client keeps its slot and goes on with its numbers
(`Fences.carry_on`), so a number that was told before the agent died still means the same point of its client's work.
What was queued before waits on the old file; the successor is handed that too (`FenceTable.adopt`), and releases the
dead there as well.

A device without 64-bit stream memory operations is refused by name. The fallback that the design has for it
(interprocess events, awaited by the host beside the connection) is not built: ``docs/cuda-ipc.md``, question 1.
This has run on a fake driver only.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
from functools import partial
from typing import Final

from etha.errors import DriverError, InvalidArgument, InvalidRecord, StreamCapturing, SystemLimit
from etha.tensor_bus.ipc import libc
from etha.tensor_bus.ipc.cuda import Device
from etha.tensor_bus.ipc.driver import CAN_USE_64_BIT_STREAM_MEM_OPS
from etha.tensor_bus.ipc.undo import Undo

RELEASED: Final = 2**62
"""Passes every wait. Not the largest number: the device compares ``(int64)(*slot - value) >= 0``, a cyclic order in
which 2**64 - 1 comes before 0."""

SLOTS: Final = 1 << 16
"""Of an agent: clients that it can ever have."""

SLOT_BYTES: Final = 64
"""A slot's own cache line: a device that writes one disturbs no host that reads its neighbour."""

_MAX_TABLES: Final = 16
"""Files that an agent has mapped: its own, and those of so many predecessors less one."""

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class FenceTable:
    """All slots of an agent. Its process needs no device for it.

    Notes:
        Not safe across threads: the agent's control loop alone uses it.
    """

    def __init__(self, slots: int = SLOTS) -> None:
        """Make the file.

        Args:
            slots: how many can ever be given out, > 0; rounded up to whole pages.

        Raises:
            SystemLimit: no descriptor, mapping or memory is left.
        """
        size = -(-slots * SLOT_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        self._next = 0
        self._kept: set[int] = set()
        self._released: set[int] = set()
        self._slots = size // SLOT_BYTES
        self._maps: dict[tuple[int, int], tuple[int, int]] = {}
        try:
            self._fd = os.memfd_create("etha-fences", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise libc.system_limit(error, "making the fences' memory") or error from error
        try:
            os.ftruncate(self._fd, size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map(self._fd, size)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """The file, to be sent to workers; it stays the table's."""
        return self._fd

    def take(self) -> int:
        """Give out a slot; never one that was given out before, so no late write reaches a stranger.

        Raises:
            SystemLimit: all have been given out.
        """
        while self._next in self._kept:
            self._next += 1
        if self._next >= self._slots:
            raise SystemLimit(
                f"all {self._slots} fence slots have been given out.",
                resource="fence slots",
                remedy="Restart the agent: workers keep their memory, and the slots of those that are gone are free.",
            )
        self._next += 1
        return self._next - 1

    def keep(self, slot: int) -> None:
        """A client of a predecessor's has this slot. To be called before any `take`."""
        self._kept.add(slot)

    def adopt(self, fd: int) -> None:
        """A worker hands over the file of a predecessor's, in which streams may still wait; neither kept nor closed.

        Raises:
            InvalidRecord: it is no such file, or the last of more of them than there can have been predecessors.
            SystemLimit: no mapping is left.
        """
        size = _checked_size(fd)
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) in self._maps:
            return
        if len(self._maps) >= _MAX_TABLES or size > self._slots * SLOT_BYTES:
            raise InvalidRecord("These fences are of none of the agents that were here.", resource="fences")
        address = self._map(fd, size)
        for slot in self._released:
            _word(address, slot, size // SLOT_BYTES).value = RELEASED

    def release(self, slot: int) -> None:
        """Let go whoever waits for this slot, now and for ever. For a process that is dead, no other."""
        if not 0 <= slot < self._slots or not self._maps:
            raise InvalidArgument(f"{slot} is none of {self._slots if self._maps else 0} slots.", resource=str(slot))
        self._released.add(slot)
        for address, size in self._maps.values():
            if slot < size // SLOT_BYTES:
                _word(address, slot, size // SLOT_BYTES).value = RELEASED

    def reached(self, slot: int, value: int) -> bool:
        """Whether a slot has reached a value, in whichever agent's file."""
        return any(
            slot < size // SLOT_BYTES and _word(address, slot, size // SLOT_BYTES).value >= value
            for address, size in self._maps.values()
        )

    def close(self) -> None:
        """Unmap and close; idempotent. Workers keep their mappings."""
        while self._maps:
            libc.unmap(*self._maps.popitem()[1])
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _map(self, fd: int, size: int) -> int:
        found = os.fstat(fd)
        address = libc.map_shared(fd, size, writable=True)
        self._maps[found.st_dev, found.st_ino] = (address, size)
        return address


class Fences:
    """An agent's slots in a worker, reached by its host and by its device.

    Notes:
        Safe across threads. Not to be used in a forked child.
    """

    def __init__(self, device: Device, fd: int) -> None:
        """Map and register the agent's file.

        Args:
            device: this worker's.
            fd: from the agent; neither kept nor closed.

        Raises:
            InvalidRecord: no file of slots, or one that could be shrunk.
            DriverError: the device cannot do this, or the driver refuses. Nothing stays mapped.
            SystemLimit: no mapping or no memory to pin is left.
        """
        if not device.driver.device_attribute(CAN_USE_64_BIT_STREAM_MEM_OPS, device.ordinal):
            raise DriverError(
                "The device has no 64-bit stream memory operations, by which etha orders streams.",
                resource="64-bit stream memory operations",
                remedy="Use another device, or share host memory.",
            )
        size = _checked_size(fd)
        self._device = device
        self._slots = size // SLOT_BYTES
        self._lock = threading.Lock()
        self._last: dict[int, tuple[int, int]] = {}
        self._undo = Undo()
        self._open = True
        self._host = libc.map_shared(fd, size, writable=True)
        self._undo.push(partial(libc.unmap, self._host, size))
        try:
            with device.current() as driver:
                driver.register_host(self._host, size)
                self._undo.push(partial(driver.unregister_host, self._host))
                self._at = driver.host_device_address(self._host)
        except BaseException:
            device.abandon(self._undo)
            raise

    def signal(self, stream: int, slot: int) -> int:
        """Queue the next number for this process's own slot, behind all that the stream has been given so far.

        A stream other than the last one first waits for that one's number, so that the numbers of a slot grow
        whichever streams write them.

        Args:
            stream: the driver's number; 0 for the legacy default stream.
            slot: this process's.

        Returns:
            The number, >= 1, by which others wait for this point.

        Raises:
            StreamCapturing: the stream is being captured. Nothing was queued.
            DriverError: the driver refuses. The slot's number is as before.
        """
        self._check(stream, slot)
        address = self._at + slot * SLOT_BYTES
        with self._lock, self._device.current() as driver:
            last, where = self._last.get(slot, (0, stream))
            if where != stream:
                driver.wait_value(stream, address, last)
            driver.write_value(stream, address, last + 1)
            self._last[slot] = (last + 1, stream)
        return last + 1

    def wait(self, stream: int, slot: int, value: int) -> None:
        """Queue a wait: what the stream is given from now on runs after ``slot`` has reached ``value``.

        Returns at once. The wait ends also when the slot's process is dead: then `released` says so.

        Args:
            stream: the driver's number; 0 for the legacy default stream.
            slot: the other process's.
            value: what its `signal` returned; 0 waits for nothing.

        Raises:
            InvalidArgument: a slot or a value that cannot be.
            StreamCapturing: the stream is being captured. Nothing was queued.
            DriverError: the driver refuses.
        """
        self._check(stream, slot)
        if not 0 <= value < RELEASED:
            raise InvalidArgument(f"{value} is no value of a fence.", resource=str(value))
        if value:
            with self._device.current() as driver:
                driver.wait_value(stream, self._at + slot * SLOT_BYTES, value)

    def reached(self, slot: int, value: int) -> bool:
        """Whether a slot has reached a value, as the host sees it now."""
        return int(_word(self._host, slot, self._slots).value) >= value

    def released(self, slot: int) -> bool:
        """Whether the agent has let go those who wait for this slot, its process being dead."""
        return self.reached(slot, RELEASED)

    def streams(self) -> list[int]:
        """The streams that were given the newest numbers."""
        return [stream for _, stream in list(self._last.values())]

    def carry_on(self, before: Fences) -> None:
        """Go on with the numbers of a predecessor's file, behind all that was queued for that. Before any `signal`.

        Raises:
            DriverError: the driver refuses; it may be called again.
        """
        with self._lock, self._device.current():
            for slot, (number, stream) in list(before._last.items()):
                self._device.driver.write_value(stream, self._at + slot * SLOT_BYTES, number)
                self._last[slot] = (number, stream)

    def close(self) -> None:
        """Unregister and unmap at the next `Device.drain`, when no stream needs it any more; idempotent."""
        if self._open:
            self._open = False
            self._device.retire(self._undo)

    def _check(self, stream: int, slot: int) -> None:
        if not self._open:
            raise InvalidArgument("The fences were closed.", resource="fences")
        if not 0 <= slot < self._slots:
            raise InvalidArgument(f"{slot} is none of {self._slots} slots.", resource=str(slot))
        self.require_open(stream)

    def require_open(self, stream: int) -> None:
        """Raise `StreamCapturing` while the stream is being captured."""
        if self._device.driver.is_capturing(stream):
            raise StreamCapturing(
                "The stream is being captured into a CUDA graph.",
                resource=str(stream),
                remedy="Take and release leases, and publish, outside of the capture.",
            )


def _word(address: int, slot: int, slots: int) -> ctypes.c_uint64:
    if not address or not 0 <= slot < slots:
        raise InvalidArgument(f"{slot} is none of {slots if address else 0} slots.", resource=str(slot))
    return ctypes.c_uint64.from_address(address + slot * SLOT_BYTES)


def _checked_size(fd: int) -> int:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # no memory file
        seals = 0
    size = os.fstat(fd).st_size
    if seals & _SEALS != _SEALS or not size or size % mmap.PAGESIZE:
        raise InvalidRecord("The fences' memory is no sealed file of whole pages.", resource="fences")
    return size
