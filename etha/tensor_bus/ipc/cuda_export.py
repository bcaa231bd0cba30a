"""Sharing device memory: which kind a pointer is, and handles or descriptors for what lies under tensors.

The driver says of each pointer how its memory can be shared, and what cannot be is refused by name, before anything
is exported. One export per allocation: memory of ``cudaMalloc`` goes as a whole, with all that torch put beside the
tensor; virtual memory goes by the chunks that the tensors touch, and neighbours become one run.

This has run on a fake driver only; ``docs/cuda-ipc.md`` says what a GPU has still to answer.
"""

from __future__ import annotations

import enum
import os
from bisect import bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from etha.errors import DriverError, InvalidArgument, InvalidRecord, NotShareable
from etha.tensor_bus.ipc import driver as api
from etha.tensor_bus.ipc.allocations import (
    OWNER_BYTES,
    Chunk,
    CudaAllocation,
    LegacyAllocation,
    VirtualAllocation,
)
from etha.tensor_bus.ipc.cuda import Device, Origin
from etha.tensor_bus.ipc.descriptors import SharedFd, reserve_descriptors
from etha.tensor_bus.ipc.export import Export
from etha.tensor_bus.ipc.manifest import Manifest, Storage, validate
from etha.tensor_bus.ipc.shareable import Refusal
from etha.tensor_bus.ipc.survey import Survey
from etha.tensor_bus.ipc.undo import Undo

if TYPE_CHECKING:
    import torch

_NATIVE: Final = "Allocate it with torch's default allocator; clone() makes such a copy."
# torch asks for fabric handles wherever the device has them, and for none if that variable is 0
# (c10/cuda/CUDACachingAllocator.cpp, ExpandableSegment::map).
_NO_SEGMENTS: Final = "Start the process without expandable_segments in PYTORCH_CUDA_ALLOC_CONF."
_SEGMENTS_WITH_HANDLES: Final = (
    "Start the process without TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC=0, or without expandable_segments in"
    " PYTORCH_CUDA_ALLOC_CONF."
)


class Kind(enum.Enum):
    """How a pointer's memory is shared."""

    LEGACY = "legacy"
    FD = "fd"


def classify(device: Device, address: int) -> Kind | Refusal:
    """Ask the driver how memory can be shared; the device's context is current.

    Args:
        device: the one on which it must lie.
        address: of any byte of it.

    Returns:
        The kind, or why there is none and what to do instead.
    """
    ask = device.driver.pointer_attribute
    try:
        managed = ask(api.IS_MANAGED, address)
    except DriverError as error:
        if error.code != api.INVALID_VALUE:
            raise
        return Refusal("lies in memory that CUDA does not know", "Move it to the device.")
    if managed:
        return Refusal("lies in managed memory, which has no handle", _NATIVE)
    if ask(api.MEMORY_TYPE, address) != api.MEMORY_TYPE_DEVICE:
        return Refusal("lies in host memory", "Move it to the device.")
    if ask(api.DEVICE_ORDINAL, address) != device.ordinal:
        return Refusal("lies on another device than its agent's", "Register it with the agent of its own device.")
    if ask(api.IS_LEGACY_CAPABLE, address):
        return Kind.LEGACY
    if ask(api.MEMPOOL_HANDLE, address):
        return Refusal(
            "lies in a memory pool (cudaMallocAsync), which cannot be shared afterwards",
            "Start the process without backend:cudaMallocAsync in PYTORCH_CUDA_ALLOC_CONF.",
        )
    types = ask(api.ALLOWED_HANDLE_TYPES, address)
    if types & api.HANDLE_TYPE_FD:
        return Kind.FD
    if types & api.HANDLE_TYPE_FABRIC:
        return Refusal("can be shared by fabric handle only, which etha does not do yet", _NO_SEGMENTS)
    return Refusal("lies in virtual memory that was made without a way to share it", _SEGMENTS_WITH_HANDLES)


class CudaExport(Export):
    """`Export` of device memory. Its descriptors are one per chunk, in the order of the allocations.

    Attributes:
        origins: one per allocation: where it lies here, for readers in this process.
    """

    def __init__(
        self,
        manifest: Manifest,
        fds: tuple[SharedFd, ...],
        tensors: Mapping[str, torch.Tensor],
        storages: list[torch.UntypedStorage | None],
        origins: tuple[Origin, ...],
        reopen: Callable[[], tuple[SharedFd, ...]],
    ) -> None:
        super().__init__(manifest, fds, tensors, storages, reopen)
        self.origins = origins


def export(device: Device, owner: bytes, tensors: Mapping[str, object], kind: str = "cuda") -> CudaExport:
    """Describe, pin and export the memory under ``tensors``; nothing is copied, moved or written.

    Neighbours come along: whoever opens memory of ``cudaMalloc`` can read all of the allocation.

    Args:
        device: this process's, and the tensors'.
        owner: 16-byte id of the client.
        tensors: by name, each on the device; one without elements may lie anywhere on it.
        kind: the tensors' device type.

    Raises:
        InvalidArgument: not a mapping, a name that is none, or an owner of another length.
        NotShareable: ``resource`` names the tensor; the text says why, and what to do. Nothing is left open.
        SystemLimit: more descriptors are needed than the hard limit allows, or device memory ran out.
        DriverError: the driver refuses.
    """

    if len(owner) != OWNER_BYTES:
        raise InvalidArgument(f"A client's id has {OWNER_BYTES} bytes, not {len(owner)}.", resource=owner.hex())
    survey = _Survey()
    survey.add_all(tensors, kind)
    fds: list[SharedFd] = []
    try:
        with device.current():
            ranges = _Ranges(device)
            for place in survey.places:
                ranges.cover(place)
            runs = ranges.runs()
            manifest = _export(device, owner, survey, runs, fds)
    except BaseException:
        _close_all(fds)
        raise
    addresses = [run[0].base for run in runs]
    kept: list[list[torch.UntypedStorage]] = [[] for _ in addresses]
    for row, storage in zip(manifest.storages, survey.kept, strict=True):
        if storage is not None:
            kept[row.allocation].append(storage)
    origins = tuple(Origin(address, keeper) for address, keeper in zip(addresses, kept, strict=True))
    for allocation, origin in zip(manifest.allocations, origins, strict=True):
        device.add_origin(allocation, origin)
    chunks = [found.base for run in runs for found in run if not found.legacy]
    reopen = partial(_reopen, device, chunks)
    return CudaExport(manifest, tuple(fds), survey.tensors, survey.kept, origins, reopen)


class _Place(NamedTuple):
    """A storage that has bytes, and the first tensor in it."""

    name: str
    address: int
    nbytes: int


class _Survey(Survey["_Place | None"]):
    """The tables of a manifest, storages still by address.

    Attributes:
        places: where the storages that have bytes lie, each once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[_Place] = []

    def no_bytes(self) -> None:
        """Nowhere."""

    def locate(self, name: str, storage: torch.UntypedStorage) -> _Place:
        """The address; what lies there is the driver's to say."""
        place = _Place(name, storage.data_ptr(), storage.nbytes())
        self.places.append(place)
        return place


class _Range(NamedTuple):
    """An allocation of ``cudaMalloc``, or one chunk of virtual memory."""

    base: int
    end: int
    legacy: bool


class _Ranges:
    """What lies under the storages, each asked for once, however many storages it holds."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.found: list[_Range] = []

    def cover(self, place: _Place) -> None:
        """Find all that lies under a storage, or refuse it by its tensor's name."""
        at, end = place.address, place.address + place.nbytes
        while at < end:
            found = self._known(at) or self._ask(place.name, at)
            if found.legacy and (at != place.address or found.end < end):
                raise Refusal("reaches over the end of its allocation", _NATIVE).error(place.name)
            at = found.end

    def _known(self, address: int) -> _Range | None:
        index = bisect_right(self.found, address, key=lambda each: each.base) - 1
        return self.found[index] if index >= 0 and address < self.found[index].end else None

    def _ask(self, name: str, address: int) -> _Range:
        kind = classify(self._device, address)
        if isinstance(kind, Refusal):
            raise kind.error(name)
        base, size = self._device.driver.address_range(address)
        if not base <= address < base + size:
            raise Refusal("lies in memory that the driver describes wrongly", _NATIVE).error(name)
        found = _Range(base, base + size, kind is Kind.LEGACY)
        insort(self.found, found)
        return found

    def runs(self) -> list[list[_Range]]:
        """By address: legacy allocations alone, chunks together with their neighbours."""
        runs: list[list[_Range]] = []
        for each in self.found:
            last = runs[-1][-1] if runs else None
            if last is not None and not last.legacy and not each.legacy and last.end == each.base:
                runs[-1].append(each)
            else:
                runs.append([each])
        return runs


def _export(device: Device, owner: bytes, survey: _Survey, runs: list[list[_Range]], fds: list[SharedFd]) -> Manifest:
    """Make handles and descriptors; ``fds`` has what was opened also if one fails."""
    chunks = sum(len(run) for run in runs if not run[0].legacy)
    reserve_descriptors(chunks, chunks)
    allocations = [
        _legacy(device, owner, run[0]) if run[0].legacy else _virtual(device, owner, run, fds) for run in runs
    ]
    bases = [run[0].base for run in runs]
    storages = []
    for place in survey.rows:
        if place is None:
            storages.append(Storage(allocation=-1, offset=0, nbytes=0))
        else:
            index = bisect_right(bases, place.address) - 1
            storages.append(Storage(index, place.address - bases[index], place.nbytes))
    manifest = Manifest(tuple(allocations), tuple(storages), tuple(survey.specs), survey.names)
    try:
        validate(manifest)
    except InvalidRecord as error:  # our own manifest: the tensors' fault, not a peer's
        raise NotShareable(error.message, resource=error.resource, remedy=_NATIVE) from error
    return manifest


def _legacy(device: Device, owner: bytes, found: _Range) -> CudaAllocation:
    driver = device.driver
    buffer = driver.pointer_attribute(api.BUFFER_ID, found.base)
    handle = driver.ipc_get_handle(found.base)
    return LegacyAllocation(device.uuid, owner, buffer, handle, found.end - found.base)


def _virtual(device: Device, owner: bytes, run: list[_Range], fds: list[SharedFd]) -> CudaAllocation:
    chunks = []
    for found in run:
        block = device.driver.pointer_attribute(api.MEMORY_BLOCK_ID, found.base)
        chunks.append(Chunk(block, found.end - found.base))
        _descriptor(device, found.base, fds)
    return VirtualAllocation(device.uuid, owner, tuple(chunks))


def _descriptor(device: Device, address: int, fds: list[SharedFd]) -> None:
    """Add a descriptor of the chunk that is mapped there."""
    driver = device.driver
    undo = Undo()
    handle = driver.retain_allocation(address)
    undo.push(partial(driver.release_allocation, handle))
    try:
        fds.append(SharedFd(driver.export_fd(handle), owned=True))
    finally:
        device.settle(undo)
    os.set_inheritable(fds[-1].fileno(), False)


def _reopen(device: Device, chunks: Sequence[int]) -> tuple[SharedFd, ...]:
    """Descriptors of the chunks at these addresses, as they were exported before."""
    fds: list[SharedFd] = []
    try:
        with device.current():
            for address in chunks:
                _descriptor(device, address, fds)
    except BaseException:
        _close_all(fds)
        raise
    return tuple(fds)


def _close_all(fds: Sequence[SharedFd]) -> None:
    for fd in fds:
        fd.close()
