"""What is shared as a whole: the records of the three kinds of allocation, their descriptors, and the check of each.

Host memory is a file, one descriptor. Memory of ``cudaMalloc`` is a handle, no descriptor. Virtual memory of a device
is a run of chunks, a descriptor each. What a descriptor is of is a *piece*: it says which descriptors of two manifests
are of the same memory.

The records of device memory are not frozen: ``docs/cuda-ipc.md`` says which open question each depends on.

Pure, as `manifest` is: it imports neither torch nor anything that does I/O. Rows that hold numbers and strings only are
made without the collector's knowledge (``gc=False``), for there may be tens of thousands.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

import msgspec

MAX_INT64: Final = 2**63 - 1
"""No size, offset, stride or product of them may pass it: torch and the kernel compute in int64."""

UUID_BYTES: Final = 16
OWNER_BYTES: Final = 16
HANDLE_BYTES: Final = 64

MAX_CHUNKS: Final = 2**16
"""Chunks of one allocation: 128 GiB of the smallest that CUDA makes."""

_MAX_UINT64: Final = 2**64 - 1


class HostAllocation(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="host"):
    """Host memory behind a descriptor (tmpfs or memfd).

    Attributes:
        device: ``st_dev`` of the descriptor.
        inode: ``st_ino`` of the descriptor; with ``device`` the allocation's identity.
        size: bytes of the file, > 0.
    """

    device: int
    inode: int
    size: int


class LegacyAllocation(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="cuda-legacy"):
    """Memory of ``cudaMalloc``, shared as a whole by a handle.

    Attributes:
        device: 16-byte UUID of the device.
        owner: 16-byte id of the client that owns it.
        buffer: the driver's number of the allocation in the owner's process, never used twice there: what tells this
            allocation from another that has the same address later.
        handle: 64 bytes for ``cuIpcOpenMemHandle``.
        size: bytes, > 0, as the owner's driver gives it.
    """

    device: bytes
    owner: bytes
    buffer: int
    handle: bytes
    size: int


class Chunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One physical allocation of virtual memory; it crosses as a descriptor.

    Attributes:
        block: the driver's number of it in the owner's process (``MEMORY_BLOCK_ID``); with the owner its identity.
        size: bytes mapped, > 0.
    """

    block: int
    size: int


class VirtualAllocation(msgspec.Struct, frozen=True, array_like=True, tag="cuda-fd"):
    """A run of chunks that are neighbours in the owner's addresses, and so in the reader's.

    Attributes:
        device: 16-byte UUID of the device.
        owner: 16-byte id of the client that owns it.
        chunks: in the order of their addresses; one descriptor each, in this order.
    """

    device: bytes
    owner: bytes
    chunks: tuple[Chunk, ...]

    @property
    def size(self) -> int:
        """Bytes of all chunks."""
        return sum(chunk.size for chunk in self.chunks)


CudaAllocation = LegacyAllocation | VirtualAllocation
"""Any kind of device memory."""

Allocation = HostAllocation | LegacyAllocation | VirtualAllocation
"""Any kind of allocation."""


def pieces(allocation: Allocation) -> tuple[Hashable, ...]:
    """What each of its descriptors is of, in order; equal only for the same memory."""
    if isinstance(allocation, HostAllocation):
        return (allocation,)
    if isinstance(allocation, VirtualAllocation):
        return tuple((allocation.owner, chunk.block, chunk.size) for chunk in allocation.chunks)
    return ()


def identity(allocation: Allocation) -> Hashable:
    """What no two allocations of one manifest may have in common."""
    if isinstance(allocation, HostAllocation):
        return (allocation.device, allocation.inode)
    if isinstance(allocation, LegacyAllocation):
        return (allocation.owner, allocation.buffer)
    return (allocation.owner, *(chunk.block for chunk in allocation.chunks))


def fault(allocation: Allocation) -> str | None:
    """Say what is wrong with one allocation by itself (``"has a size of 0 bytes"``), or None."""
    if isinstance(allocation, HostAllocation):
        wrong = _host_fault(allocation)
    elif len(allocation.device) != UUID_BYTES:
        wrong = f"names its device by {len(allocation.device)} bytes"
    elif len(allocation.owner) != OWNER_BYTES:
        wrong = f"names its owner by {len(allocation.owner)} bytes"
    elif isinstance(allocation, LegacyAllocation):
        wrong = _legacy_fault(allocation)
    else:
        wrong = _virtual_fault(allocation)
    if wrong is None and not 0 < allocation.size <= MAX_INT64:
        return f"has a size of {allocation.size} bytes"
    return wrong


def _host_fault(allocation: HostAllocation) -> str | None:
    possible = 0 <= allocation.device <= _MAX_UINT64 and 0 <= allocation.inode <= _MAX_UINT64
    return None if possible else "names no possible file"


def _legacy_fault(allocation: LegacyAllocation) -> str | None:
    if len(allocation.handle) != HANDLE_BYTES:
        return f"has a handle of {len(allocation.handle)} bytes"
    return None if 0 <= allocation.buffer <= _MAX_UINT64 else f"has the number {allocation.buffer}"


def _virtual_fault(allocation: VirtualAllocation) -> str | None:
    if not 0 < len(allocation.chunks) <= MAX_CHUNKS:
        return f"has {len(allocation.chunks)} chunks"
    for chunk in allocation.chunks:
        if not (0 <= chunk.block <= _MAX_UINT64 and 0 < chunk.size <= MAX_INT64):
            return f"has a chunk {chunk.block} of {chunk.size} bytes"
    return None
