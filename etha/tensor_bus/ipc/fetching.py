"""Descriptors of an owner's publications, taken from it while it is idle.

An agent that has just started has none, and an owner that computes for ten minutes sends none. Where the kernel lets
us look into the owner, its descriptors show which of them is the memory that was recorded, and pidfd_getfd(2) takes a
copy; that needs the right to *attach* by ptrace(2)'s rules, so Yama may forbid it unless the owner has named us. Memory
that has a name (torch's ``file_system`` strategy) is opened by it.

Nothing is taken on trust: a descriptor counts only if it is the file that the manifest names, and as long.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from etha.errors import EthaError
from etha.tensor_bus.ipc import libc, maps
from etha.tensor_bus.ipc.allocations import HostAllocation
from etha.tensor_bus.ipc.backend import HOST
from etha.tensor_bus.ipc.process import open_files

if TYPE_CHECKING:
    from etha.tensor_bus.ipc.allocations import Allocation
    from etha.tensor_bus.ipc.manifest import Manifest
    from etha.tensor_bus.ipc.peer import Peer

T = TypeVar("T")

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def fetch_descriptors(peer: Peer, manifests: Sequence[Manifest]) -> list[list[int]]:
    """Per manifest a descriptor per piece, -1 where none could be had; they are the caller's. Of a device's memory none
    can be had: a descriptor does not show what it is of.

    Takes as long as the peer has mappings and descriptors, however many manifests there are: not for a control loop.

    Args:
        peer: the owner of all; its pidfd is open.
        manifests: have passed `validate`. Several may have the same allocation: each gets a descriptor of its own.
    """
    found = [[-1] * len(manifest.pieces) for manifest in manifests]
    places: defaultdict[tuple[int, int], list[tuple[list[int], int, HostAllocation]]] = defaultdict(list)
    for fds, manifest in zip(found, manifests, strict=True):
        for row, piece in enumerate(manifest.pieces):
            if isinstance(piece, HostAllocation):
                places[piece.device, piece.inode].append((fds, row, piece))
    if not places:
        return found
    for number, identity in _look(lambda: open_files(peer.pid)):
        for fds, row, allocation in places.get(identity, ()):
            if fds[row] < 0:
                fds[row] = _checked(_copy(peer, number), allocation)
    for region in _look(lambda: maps.read(peer.pid)):
        for fds, row, allocation in places.get((region.device, region.inode), ()):
            if fds[row] < 0 and not region.deleted:
                fds[row] = _checked(_open(region.path), allocation)
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
