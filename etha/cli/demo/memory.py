"""What the kernel says about memory: the box's, a process's, and what lies under an address."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from etha.cli.demo.events import Placement
from etha.tensor_bus.ipc import maps


class Backing(NamedTuple):
    """The byte of a file that lies under an address: the same byte, the same memory."""

    device: int
    inode: int
    offset: int


class Layout:
    """What a process had mapped when this was made; nothing, if it was gone."""

    def __init__(self, pid: int) -> None:
        try:
            regions = maps.read(pid)
        except (FileNotFoundError, ProcessLookupError):
            regions = []
        self._table = maps.RegionTable(regions)

    def backing_of(self, placement: Placement) -> Backing | None:
        """What lies under a tensor's first byte; None unless one file, mapped shared, lies under all of it."""
        region = self._table.find(placement.address, placement.nbytes)
        if region is None:
            return None
        return Backing(region.device, region.inode, region.offset + placement.address - region.start)


def box_shared_bytes() -> int:
    """Shared memory of the whole box: ``Shmem`` in /proc/meminfo, tmpfs included."""
    return field_bytes(Path("/proc/meminfo").read_text(), "Shmem")


def process_shared_bytes(pid: int) -> int:
    """The process's share of the shared memory that it maps: ``Pss_Shmem`` in its smaps_rollup.

    A page that n processes map counts 1/n in each, so that the sum over all who map it is its size.
    """
    return field_bytes(_text(Path(f"/proc/{pid}/smaps_rollup")), "Pss_Shmem")


def field_bytes(text: str, name: str) -> int:
    """The field ``name`` of a /proc file that counts in kB; 0 if it has no such line."""
    found = re.search(rf"^{re.escape(name)}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def tmpfs_bytes(directory: Path) -> int:
    """What the files in ``directory`` take of the box's shared memory: 0 unless it is on a tmpfs."""
    number = directory.stat().st_dev
    device = f" {os.major(number)}:{os.minor(number)} "
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    if not any(device in line and " - tmpfs " in line for line in mounts):
        return 0
    total = 0
    for file in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_blocks * 512
    return total


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
