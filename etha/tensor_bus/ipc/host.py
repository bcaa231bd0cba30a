"""Host memory: torch's shared-memory storages, by descriptor.

Torch shares host memory in two ways (``torch.multiprocessing.set_sharing_strategy``), and both end in a file of tmpfs
that is mapped under the storage:

* ``file_descriptor``: the file has no name any more, torch keeps a descriptor, bytes start at the mapping's first;
* ``file_system``: the file keeps its name in /dev/shm, torch keeps no descriptor, bytes start behind torch's counter.

The kernel says which (/proc/self/maps), not torch: asking a storage of the second way for a descriptor
(``_share_fd_cpu_``) would copy and move it (torch ``csrc/StorageSharing.cpp``).

This module imports torch only when it is given tensors.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from etha.errors import InvalidRecord, NotShareable, StaleHandle, SystemLimit
from etha.tensor_bus.ipc import libc, maps
from etha.tensor_bus.ipc.allocations import HostAllocation
from etha.tensor_bus.ipc.descriptors import SharedFd, reserve_descriptors
from etha.tensor_bus.ipc.export import Export
from etha.tensor_bus.ipc.manifest import Manifest, Storage, validate
from etha.tensor_bus.ipc.shareable import Refusal
from etha.tensor_bus.ipc.survey import Survey

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

__all__ = ["Export", "HostMapping", "SharedFd", "check_descriptor", "export", "open_allocation"]

_SHM_DIRECTORY: Final = "/dev/shm/"
"""Where shm_open(3) of glibc, and so torch, puts its files."""

_NO_DESCRIPTOR: Final = -1

_SHARE_REMEDY: Final = (
    "Move it there before NumPy views or an optimizer are built on it: module.share_memory() or tensor.share_memory_()."
)
_CLONE_REMEDY: Final = "Register clone().share_memory_()."


@dataclass(eq=False)
class HostMapping:
    """One allocation in this process's address space; not unmapped until `close`, whatever is collected.

    Attributes:
        allocation: what is mapped.
        address: of its first byte; 0 once closed.
        size: bytes mapped, as the allocation claims.
    """

    allocation: HostAllocation
    address: int
    size: int

    def close(self) -> None:
        """Unmap; idempotent. The caller answers for it that no view is left.

        Raises:
            SystemLimit: the kernel could not unmap; nothing has changed.
        """
        if self.address:
            libc.unmap(self.address, self.size)
            self.address = 0


def export(tensors: Mapping[str, object]) -> Export:
    """Describe and pin the memory under ``tensors``; nothing is copied, moved or written.

    One tensor object under several names stays one. Tensors over one storage stay over one, storages in one file
    are one allocation. A tensor without elements needs no memory and may lie anywhere.

    Args:
        tensors: by name; each in torch shared memory on the CPU.

    Returns:
        The export. Its descriptors are open until `Export.close_fds`.

    Raises:
        InvalidArgument: not a mapping, or a name that is no string, empty, or too long.
        NotShareable: ``resource`` names the tensor; the text says why, and what to do. Nothing is left open.
        SystemLimit: more descriptors are needed than the hard limit allows.
    """
    with maps.OwnRegions() as regions:
        survey = _Survey(regions)
        survey.add_all(tensors, "cpu")
    reserve_descriptors(sum(not source.region.deleted for source in survey.sources), len(survey.sources))
    fds = _open_all(survey.sources)
    try:
        allocations = tuple(source.allocation for source in survey.sources)
        manifest = Manifest(
            allocations=allocations,
            storages=tuple(survey.rows),
            tensors=tuple(survey.specs),
            names=survey.names,
        )
        _check_own(manifest)
        sources = survey.sources
        return Export(manifest, fds, survey.tensors, survey.kept, lambda: _reopen_all(sources, allocations))
    except BaseException:
        _close_all(fds)
        raise


def check_descriptor(fd: int, allocation: HostAllocation) -> None:
    """Refuse a descriptor that is not the file its claim names, or is shorter than claimed.

    Args:
        fd: received from the owner; neither kept nor closed.
        allocation: from a manifest that has passed `validate`.

    Raises:
        StaleHandle: another file than claimed.
        InvalidRecord: no regular file, or shorter than claimed: a load behind its end would be a SIGBUS.
    """
    found = os.fstat(fd)
    if (
        stat.S_ISREG(found.st_mode)
        and found.st_ino == allocation.inode
        and found.st_dev == allocation.device
        and found.st_size >= allocation.size
    ):
        return
    resource = f"{allocation.device}:{allocation.inode}"
    if not stat.S_ISREG(found.st_mode):
        raise InvalidRecord("A descriptor for shared memory is no regular file.", resource=resource)
    if (found.st_dev, found.st_ino) != (allocation.device, allocation.inode):
        raise StaleHandle(
            f"A descriptor leads to file {found.st_dev}:{found.st_ino}, not to {resource} as claimed.",
            resource=resource,
            remedy="Subscribe again; the owner has registered other memory since.",
        )
    raise InvalidRecord(
        f"Shared memory of {found.st_size} bytes is shorter than claimed ({allocation.size}).",
        resource=resource,
    )


def open_allocation(fd: int, allocation: HostAllocation, *, writable: bool = False) -> HostMapping:
    """Map an allocation, after its descriptor has been checked; forked children do not get the mapping.

    Args:
        fd: neither kept nor closed; the mapping outlives it.
        allocation: from a manifest that has passed `validate`.
        writable: False makes a write end this process with SIGSEGV.

    Raises:
        StaleHandle: the descriptor leads to another file than claimed.
        InvalidRecord: the file is shorter than claimed, or the descriptor does not permit the mapping.
        SystemLimit: no mapping or no address space is left.
    """
    check_descriptor(fd, allocation)
    try:
        address = libc.map_shared(fd, allocation.size, writable=writable)
    except SystemLimit:
        raise
    except OSError as error:
        raise InvalidRecord(
            f"Shared memory {allocation.device}:{allocation.inode} cannot be mapped: {error.strerror}."
        ) from error
    return HostMapping(allocation, address, allocation.size)


class _Source:
    """The file behind one allocation, and how to get a descriptor of it.

    Attributes:
        name: of the first tensor in it.
        region: where it is mapped.
        allocation: set by `open`.
    """

    def __init__(self, name: str, region: maps.Region, storage: torch.UntypedStorage) -> None:
        self.name = name
        self.region = region
        self._storage = storage
        self.allocation = HostAllocation(region.device, region.inode, 0)

    def open(self) -> SharedFd:
        """A descriptor of exactly the mapped file, whose size is asked on the way."""
        fd = self._borrow() if self.region.deleted else self._by_name()
        found = os.fstat(fd.fileno())
        if (found.st_dev, found.st_ino) != (self.region.device, self.region.inode):
            fd.close()
            raise self._refuse(f"lies in a file that is no longer {self.region.path}", _CLONE_REMEDY)
        self.allocation = HostAllocation(found.st_dev, found.st_ino, found.st_size)
        return fd

    def _borrow(self) -> SharedFd:
        # Only a mapping of torch's own that begins with the storage is of the kind that keeps its descriptor: any
        # other storage would be copied and moved by the question.
        if not (self._storage.is_shared() and self._storage.data_ptr() == self.region.start):
            raise self._refuse("lies in shared memory whose name is gone", _CLONE_REMEDY)
        number, _ = self._storage._share_fd_cpu_()
        if number == _NO_DESCRIPTOR:
            raise self._refuse("lies in shared memory of which torch kept no descriptor", _CLONE_REMEDY)
        return SharedFd(number, owned=False, keeper=self._storage)

    def _by_name(self) -> SharedFd:
        # O_NONBLOCK: should the name lead to a FIFO by now, open() must not wait for its other end.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            return SharedFd(os.open(self.region.path, flags), owned=True)
        except OSError as error:
            limit = libc.system_limit(error, f"opening {self.region.path}")
            if limit is not None:
                raise limit from error
            raise self._refuse(
                f"lies in {self.region.path}, which cannot be opened ({error.strerror})", _CLONE_REMEDY
            ) from error

    def _refuse(self, reason: str, remedy: str) -> NotShareable:
        return Refusal(reason, remedy).error(self.name)


class _Survey(Survey[Storage]):
    """The tables of a manifest over torch's shared storages.

    Attributes:
        sources: the files behind the storages, each once.
    """

    def __init__(self, regions: maps.OwnRegions) -> None:
        super().__init__()
        self.sources: list[_Source] = []
        self._regions = regions
        self._source_of: dict[tuple[int, int], int] = {}

    def no_bytes(self) -> Storage:
        """A storage of no allocation."""
        return Storage(allocation=-1, offset=0, nbytes=0)

    def locate(self, name: str, storage: torch.UntypedStorage) -> Storage:
        """The file of tmpfs that is mapped under the storage."""
        address, nbytes = storage.data_ptr(), storage.nbytes()
        region = self._regions.find(address, nbytes)
        if region is None:
            raise Refusal("is not in shared memory", _SHARE_REMEDY).error(name)
        if not (region.deleted or region.path.startswith(_SHM_DIRECTORY)):
            raise Refusal(f"lies in the file {region.path}, not in shared memory", _CLONE_REMEDY).error(name)
        identity = (region.device, region.inode)
        source = self._source_of.get(identity)
        if source is None:
            source = self._source_of[identity] = len(self.sources)
            self.sources.append(_Source(name, region, storage))
        return Storage(source, region.offset + address - region.start, nbytes)


def _check_own(manifest: Manifest) -> None:
    """Hold our own manifest to the rule for others': what fails here is the tensors' fault, not a peer's."""
    try:
        validate(manifest)
    except InvalidRecord as error:
        raise NotShareable(
            f"{error.message} Its storage was shrunk, or its file truncated.",
            resource=error.resource,
            remedy=_CLONE_REMEDY,
        ) from error


def _open_all(sources: Iterable[_Source]) -> tuple[SharedFd, ...]:
    fds: list[SharedFd] = []
    try:
        for source in sources:
            fds.append(source.open())  # noqa: PERF401 - what was opened must be known if one fails
    except BaseException:
        _close_all(fds)
        raise
    return tuple(fds)


def _reopen_all(sources: Iterable[_Source], allocations: tuple[HostAllocation, ...]) -> tuple[SharedFd, ...]:
    fds = _open_all(sources)
    try:
        for fd, allocation in zip(fds, allocations, strict=True):
            check_descriptor(fd.fileno(), allocation)
    except BaseException:
        _close_all(fds)
        raise
    return fds


def _close_all(fds: Iterable[SharedFd]) -> None:
    for fd in fds:
        fd.close()
