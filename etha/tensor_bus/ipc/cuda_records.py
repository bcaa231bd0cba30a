"""The records of device memory, and the check of them. Not frozen: what a GPU alone can answer is open.

Two kinds of allocation stand beside `HostAllocation`, in a manifest of their own. They are no part of the bus's schema,
and no agent accepts them yet; ``docs/cuda-ipc.md`` says which question each depends on. When those are answered, they
join the union `manifest.Allocation`, and this module's manifest goes.

Pure, as `manifest` is: it imports neither torch nor anything that does I/O.
"""

from __future__ import annotations

from typing import Final

import msgspec

from etha.errors import InvalidRecord
from etha.tensor_bus.ipc import manifest
from etha.tensor_bus.ipc.manifest import MAX_INT64, HostAllocation, Manifest, Storage, TensorSpec

UUID_BYTES: Final = 16
OWNER_BYTES: Final = 16
HANDLE_BYTES: Final = 64

MAX_CHUNKS: Final = 2**16
"""Chunks of one allocation: 128 GiB of the smallest that CUDA makes."""

_MAX_UINT64: Final = 2**64 - 1


class LegacyAllocation(msgspec.Struct, frozen=True, array_like=True, tag="cuda-legacy"):
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


class Chunk(msgspec.Struct, frozen=True, array_like=True):
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


class CudaManifest(msgspec.Struct, frozen=True, array_like=True):
    """What `Manifest` is for host memory; the fields mean the same."""

    allocations: tuple[CudaAllocation, ...]
    storages: tuple[Storage, ...]
    tensors: tuple[TensorSpec, ...]
    names: dict[str, int]

    @property
    def descriptors(self) -> int:
        """How many descriptors belong to it: one per chunk, in the order of the allocations."""
        return sum(descriptors(allocation) for allocation in self.allocations)


def descriptors(allocation: CudaAllocation) -> int:
    """How many descriptors an allocation needs."""
    return len(allocation.chunks) if isinstance(allocation, VirtualAllocation) else 0


def validate(record: CudaManifest) -> None:
    """Refuse a manifest of which any number could lead outside its allocations. Pure; see `manifest.validate`.

    Whether the driver gives as much memory as is claimed is checked where it is opened.

    Raises:
        InvalidRecord: ``resource`` is the tensor's name where one is known, else the row.
    """
    if len(record.allocations) > manifest.MAX_ENTRIES:
        raise InvalidRecord(f"{len(record.allocations)} allocations are too many.", resource="allocations")
    seen: set[tuple[object, ...]] = set()
    for index, allocation in enumerate(record.allocations):
        fault = _fault(allocation)
        if fault is not None:
            raise InvalidRecord(f"allocations[{index}] {fault}.", resource=f"allocations[{index}]")
        identity = _identity(allocation)
        if identity in seen:
            raise InvalidRecord(
                f"allocations[{index}] repeats an earlier allocation.", resource=f"allocations[{index}]"
            )
        seen.add(identity)
    # The bounds are the same whatever lies in them, so they are checked where they are for host memory.
    sizes = tuple(HostAllocation(0, index, each.size) for index, each in enumerate(record.allocations))
    manifest.validate(Manifest(sizes, record.storages, record.tensors, record.names))


def _identity(allocation: CudaAllocation) -> tuple[object, ...]:
    if isinstance(allocation, LegacyAllocation):
        return (allocation.owner, allocation.buffer)
    return (allocation.owner, *(chunk.block for chunk in allocation.chunks))


def _fault(allocation: CudaAllocation) -> str | None:
    if len(allocation.device) != UUID_BYTES:
        return f"names its device by {len(allocation.device)} bytes"
    if len(allocation.owner) != OWNER_BYTES:
        return f"names its owner by {len(allocation.owner)} bytes"
    if isinstance(allocation, LegacyAllocation):
        if len(allocation.handle) != HANDLE_BYTES:
            return f"has a handle of {len(allocation.handle)} bytes"
        if not 0 <= allocation.buffer <= _MAX_UINT64:
            return f"has the number {allocation.buffer}"
    else:
        if not 0 < len(allocation.chunks) <= MAX_CHUNKS:
            return f"has {len(allocation.chunks)} chunks"
        for chunk in allocation.chunks:
            if not (0 <= chunk.block <= _MAX_UINT64 and 0 < chunk.size <= MAX_INT64):
                return f"has a chunk {chunk.block} of {chunk.size} bytes"
    if not 0 < allocation.size <= MAX_INT64:
        return f"has a size of {allocation.size} bytes"
    return None
