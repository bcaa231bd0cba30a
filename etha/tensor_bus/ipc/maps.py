"""What a process has mapped, as /proc/PID/maps tells it: shared file mappings only.

Source: proc_pid_maps(5). A line is ``start-end perms offset major:minor inode path``, with `` (deleted)`` after the
path of a file that has no name any more. Since Linux 6.11 the same file answers for one address (``PROCMAP_QUERY`` of
``linux/fs.h``).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple

from etha.tensor_bus.ipc.libc import system_limit

_DELETED: Final = b" (deleted)"
_NAMES: Final = (sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


class Region(NamedTuple):
    """One run of shared mappings of one file, neighbouring in memory and in the file.

    Attributes:
        start: first address.
        end: address behind the last byte.
        offset: the file's byte at ``start``.
        device: ``st_dev`` of the file.
        inode: ``st_ino`` of the file.
        path: the name under which it was opened, without the mark of deletion.
        deleted: whether that name is gone.
    """

    start: int
    end: int
    offset: int
    device: int
    inode: int
    path: str
    deleted: bool


def parse(text: bytes) -> list[Region]:
    """Read a maps file; private and anonymous mappings are left out, the order is kept.

    Neighbours of one file that continue each other become one region: ``madvise`` and ``mprotect`` on a part
    split a mapping in the kernel's table without changing what lies where.
    """
    regions: list[Region] = []
    previous: Region | None = None
    for line in _candidates(text):
        fields = line.split(None, 5)
        if len(fields) < 6 or fields[1][3:4] != b"s":
            continue
        bounds, _, offset, numbers, inode, path = fields
        first, _, last = bounds.partition(b"-")
        major, _, minor = numbers.partition(b":")
        deleted = path.endswith(_DELETED)
        region = Region(
            int(first, 16),
            int(last, 16),
            int(offset, 16),
            os.makedev(int(major, 16), int(minor, 16)),
            int(inode),
            (path.removesuffix(_DELETED) if deleted else path).decode(*_NAMES),
            deleted,
        )
        if (
            previous is not None
            and previous.end == region.start
            and (previous.device, previous.inode) == (region.device, region.inode)
            and previous.offset + (previous.end - previous.start) == region.offset
        ):
            region = regions[-1] = previous._replace(end=region.end)
        else:
            regions.append(region)
        previous = region
    return regions


def _candidates(text: bytes) -> Iterator[bytes]:
    """The lines with an ``s`` before a blank, as the permissions of a shared mapping end. A process with torch has some
    400 others; splitting them all took three times as long."""
    found = text.find(b"s ")
    while found >= 0:
        end = text.find(b"\n", found)
        end = len(text) if end < 0 else end
        yield text[text.rfind(b"\n", 0, found) + 1 : end]
        found = text.find(b"s ", end)


def read(pid: int | None = None) -> list[Region]:
    """The shared file mappings of a process, in the order of their addresses.

    Args:
        pid: the process; None for this one.

    Raises:
        OSError: the process is gone, hidden, or the kernel forbids the look (see `peer.observe`).
    """
    return parse(Path(f"/proc/{'self' if pid is None else pid}/maps").read_bytes())


class RegionTable:
    """Finds the region that holds a byte range; built once, asked for every storage."""

    def __init__(self, regions: list[Region]) -> None:
        self._regions = regions
        self._starts = [region.start for region in regions]

    def find(self, address: int, nbytes: int) -> Region | None:
        """The region that holds all of ``[address, address + nbytes)``, or None."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        region = self._regions[index]
        return region if address + nbytes <= region.end else None


_QUERY: Final = struct.Struct("=9Q4I2Q")
"""``struct procmap_query``: size, flags, address; then start, end, flags, page size, offset, inode, device, name."""

_PROCMAP_QUERY: Final = 0xC0686611
"""``_IOWR('f', 17, struct procmap_query)``."""

_WANTED: Final = 0x08 | 0x20
"""Shared, and of a file; another mapping at the address is none (``ENOENT``)."""

_NAME_BYTES: Final = 4096 + 16


class OwnRegions:
    """Finds regions of this process by address, as `RegionTable` does, without reading the whole table where it can.

    A process with torch has hundreds of mappings, and reading them takes the kernel half a millisecond; one question
    takes 2 µs. The whole is read, once, on an older kernel, and for what one mapping alone does not answer: a range
    that ``madvise`` or ``mprotect`` has split, or one that does not begin with its file. A context manager; for one
    thread.
    """

    def __init__(self) -> None:
        """Open the file.

        Raises:
            SystemLimit: no descriptor is left.
            OSError: /proc is hidden.
        """
        self._fds: list[int] = []
        try:
            # Opened and put on record in one call, so that an interrupt finds either nothing or both.
            self._fds.extend(map(os.open, ("/proc/self/maps",), (os.O_RDONLY | os.O_CLOEXEC,)))
        except OSError as error:
            raise system_limit(error, "looking at one's own mappings") or error from error
        self._answers = True
        self._table: RegionTable | None = None
        self._query = bytearray(_QUERY.size)
        self._name = ctypes.create_string_buffer(_NAME_BYTES)

    def find(self, address: int, nbytes: int) -> Region | None:
        """The region that holds all of ``[address, address + nbytes)``, or None."""
        region = self._ask(address) if self._answers else None
        if region is not None and region.offset == 0 and address + nbytes <= region.end:
            return region
        if self._table is None:
            self._table = RegionTable(read())
        return self._table.find(address, nbytes)

    def _ask(self, address: int) -> Region | None:
        _QUERY.pack_into(
            self._query, 0, _QUERY.size, _WANTED, address, *(0,) * 8, _NAME_BYTES, 0, ctypes.addressof(self._name), 0
        )
        try:
            fcntl.ioctl(self._fds[0], _PROCMAP_QUERY, self._query)
        except OSError as error:
            self._answers = error.errno == errno.ENOENT  # anything else is a kernel that does not know the question
            return None
        _, _, _, start, end, _, _, offset, inode, major, minor, _, _, _, _ = _QUERY.unpack(self._query)
        path = self._name.value
        deleted = path.endswith(_DELETED)
        path = path.removesuffix(_DELETED) if deleted else path
        return Region(start, end, offset, os.makedev(major, minor), inode, path.decode(*_NAMES), deleted)

    def __enter__(self) -> OwnRegions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        while self._fds:
            fd = self._fds[-1]
            del self._fds[-1]
            os.close(fd)

    def __del__(self) -> None:
        self._close()
