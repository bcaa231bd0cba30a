"""What a process has mapped, as /proc/PID/maps tells it: shared file mappings only.

Source: proc_pid_maps(5). A line is ``start-end perms offset major:minor inode path``, with `` (deleted)`` after the
path of a file that has no name any more.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

_DELETED: Final = b" (deleted)"


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


def parse(lines: Iterable[bytes]) -> list[Region]:
    """Read the lines of a maps file; private and anonymous mappings are left out, the order is kept.

    Neighbours of one file that continue each other become one region: ``madvise`` and ``mprotect`` on a part
    split a mapping in the kernel's table without changing what lies where.
    """
    regions: list[Region] = []
    for line in lines:
        fields = line.split(None, 5)
        if len(fields) < 6 or fields[1][3:4] != b"s":
            continue
        start, _, end = fields[0].partition(b"-")
        major, _, minor = fields[3].partition(b":")
        path = fields[5].rstrip(b"\n")
        deleted = path.endswith(_DELETED)
        region = Region(
            int(start, 16),
            int(end, 16),
            int(fields[2], 16),
            os.makedev(int(major, 16), int(minor, 16)),
            int(fields[4]),
            os.fsdecode(path.removesuffix(_DELETED) if deleted else path),
            deleted,
        )
        previous = regions[-1] if regions else None
        if (
            previous is not None
            and (previous.end, previous.device, previous.inode) == (region.start, region.device, region.inode)
            and previous.offset + (previous.end - previous.start) == region.offset
        ):
            regions[-1] = previous._replace(end=region.end)
        else:
            regions.append(region)
    return regions


def read(pid: int | None = None) -> list[Region]:
    """The shared file mappings of a process, in the order of their addresses.

    Args:
        pid: the process; None for this one.

    Raises:
        OSError: the process is gone, hidden, or the kernel forbids the look (see `peer.observe`).
    """
    return parse(Path(f"/proc/{'self' if pid is None else pid}/maps").read_bytes().splitlines())


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
