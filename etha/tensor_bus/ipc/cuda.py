"""Device memory of other processes: a device by its UUID, opening what they exported, and closing it when that is safe.

Opening maps at once. Closing does not unmap: kernels that read the memory may still be queued. It hands the mapping to
its `Device`, and `Device.drain`, called at an etha call outside of graph capture, waits once for the context and then
unmaps all that was handed over. What the driver refuses to undo stays, and is tried again. Nothing is unmapped in a
finaliser, nor at interpreter exit: then the kernel does it.

Memory that this very process exported is aliased, not opened: the driver refuses to open it, and an alias is what its
owner wants. Neither an alias nor legacy memory can be kept from being written; memory by fd is mapped read-only.

This has run on a fake driver only; ``docs/cuda-ipc.md`` says what a GPU has still to answer.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from etha.errors import InvalidArgument, InvalidRecord, StaleHandle, SystemFault
from etha.tensor_bus.ipc.allocations import (
    Allocation,
    CudaAllocation,
    LegacyAllocation,
    VirtualAllocation,
    pieces,
)
from etha.tensor_bus.ipc.driver import INVALID_CONTEXT, Driver
from etha.tensor_bus.ipc.undo import Undo

if TYPE_CHECKING:
    from etha.tensor_bus.ipc.backend import Opened


def visible_devices(driver: Driver) -> list[bytes]:
    """UUIDs of the devices that this process may use, by ordinal. Initialises the driver; makes no context."""
    driver.init()
    return [driver.device_uuid(ordinal) for ordinal in range(driver.device_count())]


class Origin:
    """Where an allocation lies in the process that exported it; alive as long as that export, or an alias of it.

    Attributes:
        address: of its first byte.
        keeper: the storages in it: while they live, torch gives their memory to nobody else.
    """

    __slots__ = ("__weakref__", "address", "keeper")

    def __init__(self, address: int, keeper: object) -> None:
        self.address = address
        self.keeper = keeper


class Device:
    """One device, its primary context held, and what waits to be unmapped there.

    Attributes:
        driver: the driver.
        uuid: 16 bytes.
        ordinal: the driver's number of it in this process.

    Notes:
        Safe across threads. In a forked child it does nothing: CUDA is of no use there.
    """

    def __init__(self, driver: Driver, uuid: bytes) -> None:
        """Find the device and hold its context, which is made if this process has none.

        Args:
            driver: initialised by this, if it is not yet.
            uuid: of this process's own device. No other may be given: that would make a context there.

        Raises:
            InvalidArgument: ``CUDA_VISIBLE_DEVICES`` does not show it to this process.
            DriverError: the driver refuses.
        """
        devices = visible_devices(driver)
        if uuid not in devices:
            raise InvalidArgument(
                f"The device {uuid.hex()} is none of the {len(devices)} that this process may use.",
                resource=uuid.hex(),
                remedy="Add it to CUDA_VISIBLE_DEVICES, or use the agent of a device that is there.",
            )
        self.driver = driver
        self.uuid = uuid
        self.ordinal = devices.index(uuid)
        self._pid = os.getpid()
        self._retired: deque[Undo] = deque()
        self._unsettled: set[Undo] = set()
        self._origins: dict[Allocation, weakref.WeakSet[Origin]] = {}
        self._context = driver.retain_context(self.ordinal)
        self._held = True

    @contextmanager
    def current(self) -> Iterator[Driver]:
        """Its context is current in this thread."""
        self.driver.push_context(self._context)
        try:
            yield self.driver
        finally:
            self.driver.pop_context()

    # -- what was exported here -----------------------------------------------------------------------------------

    def add_origin(self, allocation: Allocation, origin: Origin) -> None:
        """This process has exported an allocation; whoever opens it here gets an alias while ``origin`` lives."""
        self._origins = {known: alive for known, alive in self._origins.items() if alive}
        self._origins.setdefault(allocation, weakref.WeakSet()).add(origin)

    def origin(self, allocation: Allocation) -> Origin | None:
        """Where an allocation lies if this process exported it."""
        return next(iter(self._origins.get(allocation, ())), None)

    # -- what is to be undone -------------------------------------------------------------------------------------

    def abandon(self, undo: Undo) -> None:
        """Undo now what nobody has used yet; what fails is left to `drain`."""
        try:
            with self.current():
                undo.run()
        except SystemFault:
            self.retire(undo)

    def settle(self, undo: Undo) -> None:
        """`abandon`, its context being current already."""
        try:
            undo.run()
        except SystemFault:
            self.retire(undo)

    def retire(self, undo: Undo) -> None:
        """Undo at the next `drain`."""
        self._unsettled.add(undo)
        self._retired.append(undo)

    @property
    def retired(self) -> int:
        """Mappings that were closed and are not unmapped yet. The owner must not have its memory back before."""
        return len(self._unsettled) if self._pid == os.getpid() else 0

    def drain(self, stream: int = 0) -> int:
        """Unmap what was closed, after all work of the context. Waits for the device, unless nothing was closed.

        Args:
            stream: the caller's; while it is being captured nothing is done, as waiting would spoil the capture.

        Returns:
            How much was undone.

        Raises:
            DriverError: of the first that could not be undone, after all were tried; it is tried again next time.
        """
        if not self._retired or self._pid != os.getpid() or self.driver.is_capturing(stream):
            return 0
        batch: list[Undo] = []
        # Taken one by one: another thread may be draining too, and what comes meanwhile has not been waited for.
        for _ in range(len(self._retired)):
            try:
                batch.append(self._retired.popleft())
            except IndexError:
                break
        if not batch:
            return 0
        done, first = 0, None
        try:
            with self.current() as driver:
                driver.synchronize()
                while batch:
                    try:
                        batch[-1].run()
                        self._unsettled.discard(batch[-1])
                        done += 1
                    except SystemFault as error:
                        first = first or error
                        self._retired.append(batch[-1])
                    batch.pop()
        finally:
            self._retired.extend(batch)
        if first is not None:
            raise first
        return done

    def close(self) -> None:
        """Unmap what was closed and let go of the context; idempotent.

        Raises:
            DriverError: the driver refuses; what is left is left, and the call may be repeated.
        """
        if self._held and self._pid == os.getpid():
            self.drain()
            self.driver.release_context(self.ordinal)
            self._held = False


class CudaMapping:
    """One allocation in this process's device addresses.

    Attributes:
        allocation: what is mapped.
        address: of its first byte; 0 once closed.
        size: bytes, as the allocation claims.
    """

    def __init__(self, device: Device, allocation: CudaAllocation, address: int, undo: Undo) -> None:
        self.allocation = allocation
        self.address = address
        self.size = allocation.size
        self._device = device
        self._undo = undo

    def close(self) -> None:
        """Have it unmapped at the next `Device.drain`; idempotent. The caller answers for it that no view is left."""
        if self.address:
            self.address = 0
            self._device.retire(self._undo)


class Alias:
    """An allocation of this very process, under its own address; keeps its storages alive.

    Attributes:
        allocation: what is aliased.
        address: of its first byte; 0 once closed.
        size: bytes, as the allocation claims.
    """

    def __init__(self, allocation: CudaAllocation, origin: Origin) -> None:
        self.allocation = allocation
        self.address = origin.address
        self.size = allocation.size
        self._origin: Origin | None = origin

    def close(self) -> None:
        """Forget it; idempotent."""
        self.address = 0
        self._origin = None


def open_allocation(device: Device, allocation: CudaAllocation, fds: Sequence[int]) -> Opened:
    """Map an allocation, or alias it if this process exported it.

    Args:
        device: this process's, and the allocation's.
        allocation: from a manifest that has passed `manifest.validate`.
        fds: one per chunk of virtual memory, in order; none for legacy memory. Neither kept nor closed.

    Returns:
        The mapping. Its size has been compared with the driver's own.

    Raises:
        InvalidArgument: it lies on another device: mapping it would make a context there.
        InvalidRecord: descriptors are missing, or the driver knows fewer bytes than are claimed.
        StaleHandle: this process exported it once, and does not any more.
        DriverError: the driver refuses it. Nothing stays open.
        SystemLimit: no device memory or address space is left.
    """
    if allocation.device != device.uuid:
        raise InvalidArgument(
            f"The memory lies on the device {allocation.device.hex()}, and this process uses {device.uuid.hex()}.",
            resource=allocation.device.hex(),
            remedy="Read it from a process on its own device.",
        )
    chunks = len(pieces(allocation))
    if len(fds) != chunks:
        raise InvalidRecord(f"{len(fds)} descriptors came for {chunks} chunks.", resource="fds")
    origin = device.origin(allocation)
    if origin is not None:
        return Alias(allocation, origin)
    undo = Undo()
    try:
        with device.current() as driver:
            if isinstance(allocation, LegacyAllocation):
                address = _open_legacy(driver, allocation, undo)
            else:
                address = _open_chunks(driver, device.ordinal, allocation, fds, undo)
    except BaseException:
        device.abandon(undo)
        raise
    return CudaMapping(device, allocation, address, undo)


def _open_legacy(driver: Driver, allocation: LegacyAllocation, undo: Undo) -> int:
    try:
        address = driver.ipc_open_handle(allocation.handle)
    except SystemFault as error:
        if getattr(error, "code", 0) == INVALID_CONTEXT:
            raise StaleHandle(
                "The handle is of this very process, which does not share that memory any more.",
                resource=allocation.owner.hex(),
                remedy="Subscribe again; the owner has registered other memory since.",
            ) from error
        raise
    undo.push(partial(driver.ipc_close_handle, address))
    base, size = driver.address_range(address)
    # Larger is no fault: an importer's driver may count in larger pages.
    if base != address or size < allocation.size:
        raise InvalidRecord(
            f"Device memory of {size - (address - base)} bytes is shorter than claimed ({allocation.size}).",
            resource=allocation.owner.hex(),
        )
    return address


def _open_chunks(driver: Driver, ordinal: int, allocation: VirtualAllocation, fds: Sequence[int], undo: Undo) -> int:
    size = allocation.size
    base = driver.reserve(size)
    undo.push(partial(driver.free_reservation, base, size))
    address = base
    for chunk, fd in zip(allocation.chunks, fds, strict=True):
        handle = driver.import_fd(fd)
        undo.push(partial(driver.release_allocation, handle))
        # The driver's own check of the size: more than the chunk has cannot be mapped.
        driver.map(address, chunk.size, handle)
        undo.push(partial(driver.unmap, address, chunk.size))
        address += chunk.size
    driver.allow(base, size, ordinal, writable=False)
    return base
