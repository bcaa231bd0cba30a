"""Descriptors of a publication's memory, taken from its owner while that is idle.

An agent that has just started has none, and an owner that computes for ten minutes sends none. Where the kernel lets
us look into the owner, its descriptors show which of them is the memory that was recorded, and pidfd_getfd(2) takes a
copy; that needs the right to *attach* by ptrace(2)'s rules, so Yama may forbid it unless the owner has named us. Memory
that has a name (torch's ``file_system`` strategy) is opened by it.

Nothing is taken on trust: a descriptor counts only if it is the file that the manifest names, and as long.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from etha.errors import EthaError
from etha.tensor_bus.ipc import libc, maps
from etha.tensor_bus.ipc.backend import HOST
from etha.tensor_bus.ipc.manifest import rows_by_file
from etha.tensor_bus.ipc.process import open_files

if TYPE_CHECKING:
    from etha.tensor_bus.ipc.allocations import Allocation
    from etha.tensor_bus.ipc.manifest import Manifest
    from etha.tensor_bus.ipc.peer import Peer

T = TypeVar("T")

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def fetch_descriptors(peer: Peer, manifest: Manifest) -> list[int]:
    """A descriptor per piece, -1 where none could be had; they are the caller's. Of a device's memory none can be had:
    a descriptor does not show what it is of.

    Takes as long as the peer has mappings and descriptors: not for a control loop.

    Args:
        peer: the owner; its pidfd is open.
        manifest: has passed `validate`.
    """
    rows = rows_by_file(manifest)
    found = [-1] * len(manifest.pieces)
    if not rows:
        return found
    for number, identity in _look(lambda: open_files(peer.pid)):
        row = rows.get(identity)
        if row is not None and found[row] < 0:
            found[row] = _checked(_copy(peer, number), manifest.allocations[row])
    for region in _look(lambda: maps.read(peer.pid)):
        row = rows.get((region.device, region.inode))
        if row is not None and found[row] < 0 and not region.deleted:
            found[row] = _checked(_open(region.path), manifest.allocations[row])
    return found


def _look(look: Callable[[], list[T]]) -> list[T]:
    try:
        return look()
    except OSError:
        return []  # gone, hidden or forbidden: it will send them itself


def _copy(peer: Peer, number: int) -> int:
    try:
        return libc.pidfd_getfd(peer.fileno(), number)
    except (OSError, ValueError):
        return -1


def _open(path: str) -> int:
    try:
        return os.open(path, _FLAGS)
    except OSError:
        return -1


def _checked(fd: int, allocation: Allocation) -> int:
    """The descriptor, if it is what the allocation says; else it is closed, and -1."""
    if fd < 0:
        return -1
    try:
        HOST.check_descriptors(allocation, [fd])
    except EthaError:
        os.close(fd)
        return -1
    return fd
