"""The calls of the CUDA driver that `cuda` and `fence` need, and nothing else.

`Driver` says what they are, in Python's numbers and bytes, so that a fake can stand in its place; `load` gives the real
one, over cuda-bindings 12.9 or 13, which releases the GIL in every call. Nothing of CUDA is imported before `load`, and
nothing is initialised before `Driver.init`: ``cuInit`` makes every later fork of the process useless to CUDA.

An address, a handle, a context and a stream are the driver's numbers. A stream of 0 is the legacy default stream. Calls
that say nothing else act on the context that is current in the calling thread.

Source of what each call does: the CUDA Driver API reference, 12.9 and 13.0.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any, Final, Protocol

from etha.errors import DriverError, SystemFault, SystemLimit

INVALID_VALUE: Final = 1
OUT_OF_MEMORY: Final = 2
INVALID_CONTEXT: Final = 201
STREAM_CAPTURE_IMPLICIT: Final = 906
"""``CUresult``; the last one: the legacy stream was asked while a stream that it waits for is capturing."""

MEMORY_TYPE: Final = 2
BUFFER_ID: Final = 7
IS_MANAGED: Final = 8
DEVICE_ORDINAL: Final = 9
IS_LEGACY_CAPABLE: Final = 10
ALLOWED_HANDLE_TYPES: Final = 14
MEMPOOL_HANDLE: Final = 17
MEMORY_BLOCK_ID: Final = 20
"""``CUpointer_attribute``."""

MEMORY_TYPE_DEVICE: Final = 2
"""``CU_MEMORYTYPE_DEVICE``."""

HANDLE_TYPE_FD: Final = 1
HANDLE_TYPE_FABRIC: Final = 8
"""``CUmemAllocationHandleType``."""

CAN_USE_64_BIT_STREAM_MEM_OPS: Final = 122
"""``CUdevice_attribute``."""

IPC_HANDLE_BYTES: Final = 64
UUID_BYTES: Final = 16

_LAZY_PEER_ACCESS: Final = 1
_PORTABLE_AND_MAPPED: Final = 3
_CAPTURE_NONE: Final = 0


class Driver(Protocol):
    """What is asked of the driver. Every method may raise `DriverError`, or `SystemLimit` where memory ran out."""

    def init(self) -> None:
        """``cuInit``; idempotent."""

    def device_count(self) -> int:
        """Devices that ``CUDA_VISIBLE_DEVICES`` shows to this process."""

    def device_uuid(self, ordinal: int) -> bytes:
        """The 16 bytes that name the device on this machine; of a MIG instance its own."""

    def device_attribute(self, attribute: int, ordinal: int) -> int:
        """A ``CUdevice_attribute``."""

    def retain_context(self, ordinal: int) -> int:
        """The device's primary context, made if it is not there; counted."""

    def release_context(self, ordinal: int) -> None:
        """Undo one `retain_context`; the last one destroys it."""

    def push_context(self, context: int) -> None:
        """Make it current in this thread, above what was."""

    def pop_context(self) -> None:
        """Undo `push_context`."""

    def synchronize(self) -> None:
        """Wait for all work of the current context. Not allowed while any stream of it is captured."""

    def pointer_attribute(self, attribute: int, address: int) -> int:
        """A ``CUpointer_attribute`` as a number; ``INVALID_VALUE`` for what CUDA does not know."""

    def address_range(self, address: int) -> tuple[int, int]:
        """Base and size of the allocation that holds an address; of virtual memory, of the chunk mapped there."""

    def ipc_get_handle(self, address: int) -> bytes:
        """64 bytes that name the whole allocation to other processes."""

    def ipc_open_handle(self, handle: bytes) -> int:
        """Its base in this process. Opened twice: the same address, counted. Fails in the exporting process."""

    def ipc_close_handle(self, address: int) -> None:
        """Undo one `ipc_open_handle`; the last one unmaps."""

    def retain_allocation(self, address: int) -> int:
        """The handle of the chunk mapped at an address; counted."""

    def release_allocation(self, handle: int) -> None:
        """Undo one `retain_allocation` or `import_fd`; mappings keep the memory."""

    def export_fd(self, handle: int) -> int:
        """A descriptor of a chunk; the caller's to close."""

    def import_fd(self, fd: int) -> int:
        """The handle of a chunk, from its descriptor, which stays the caller's."""

    def reserve(self, size: int) -> int:
        """Reserve addresses. Size in bytes, a multiple of the chunks' granularity."""

    def free_reservation(self, address: int, size: int) -> None:
        """Undo `reserve`, whole."""

    def map(self, address: int, size: int, handle: int) -> None:
        """Map the first ``size`` bytes of a chunk; it cannot be touched before `allow`."""

    def unmap(self, address: int, size: int) -> None:
        """Undo `map`, whole."""

    def allow(self, address: int, size: int, ordinal: int, *, writable: bool) -> None:
        """Give a device access to mapped addresses."""

    def register_host(self, address: int, size: int) -> None:
        """Pin whole host pages and map them for the device."""

    def host_device_address(self, address: int) -> int:
        """The device's address of a registered byte, which may be another than the host's."""

    def unregister_host(self, address: int) -> None:
        """Undo `register_host`, by the host's address."""

    def write_value(self, stream: int, address: int, value: int) -> None:
        """The stream writes 64 bits, after all that was queued before, visible to the whole system."""

    def wait_value(self, stream: int, address: int, value: int) -> None:
        """The stream waits until ``(int64)(*address - value) >= 0``: a cyclic comparison."""

    def is_capturing(self, stream: int) -> bool:
        """Whether the stream is being captured, or is barred by another's capture."""


class CudaBindings:
    """`Driver` over cuda-bindings; the docstrings there hold here. Made by `load`.

    Notes:
        Safe across threads, as the driver is. After a fork, in the child, `init` refuses.
    """

    def __init__(self, driver: Any, library: ctypes.CDLL) -> None:
        """Take over ``cuda.bindings.driver`` and the driver's own library."""
        self._driver = driver
        self._pid = 0
        # 12.x has both, and the plain one gives a MIG instance its parent's UUID; 13 has one, which is what _v2 was.
        self._get_uuid = getattr(driver, "cuDeviceGetUuid_v2", driver.cuDeviceGetUuid)
        # cuda-bindings refuses attributes that it does not know, MEMORY_BLOCK_ID among them. Too large a buffer does
        # no harm: the types of the values are 1 to 8 bytes.
        self._get_attribute = library.cuPointerGetAttribute
        self._get_attribute.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64)
        self._get_attribute.restype = ctypes.c_int

    def _call(self, name: str, *arguments: object) -> Any:
        """Call by name; what it returns beside its status."""
        status, *results = getattr(self._driver, name)(*arguments)
        if int(status) != 0:
            raise self._failure(name, int(status))
        return results[0] if len(results) == 1 else tuple(results)

    def _failure(self, call: str, code: int) -> SystemFault:
        try:
            known, name = self._driver.cuGetErrorName(self._driver.CUresult(code))
            text = name.decode() if int(known) == 0 else "an unknown error"
        except ValueError:  # a code that these bindings do not have
            text = "an unknown error"
        return failure(call, code, text)

    def init(self) -> None:
        pid = os.getpid()
        if self._pid not in (0, pid):
            raise DriverError(
                "CUDA cannot be used in a forked child of a process that has used it.",
                resource="cuInit",
                remedy="Start the process with spawn, or fork before anything uses CUDA.",
            )
        if self._pid == 0:
            self._call("cuInit", 0)
            self._pid = pid

    def device_count(self) -> int:
        return int(self._call("cuDeviceGetCount"))

    def device_uuid(self, ordinal: int) -> bytes:
        status, uuid = self._get_uuid(ordinal)
        if int(status) != 0:
            raise self._failure("cuDeviceGetUuid", int(status))
        return bytes(uuid.bytes)

    def device_attribute(self, attribute: int, ordinal: int) -> int:
        return int(self._call("cuDeviceGetAttribute", self._driver.CUdevice_attribute(attribute), ordinal))

    def retain_context(self, ordinal: int) -> int:
        return int(self._call("cuDevicePrimaryCtxRetain", ordinal))

    def release_context(self, ordinal: int) -> None:
        self._call("cuDevicePrimaryCtxRelease", ordinal)

    def push_context(self, context: int) -> None:
        self._call("cuCtxPushCurrent", context)

    def pop_context(self) -> None:
        self._call("cuCtxPopCurrent")

    def synchronize(self) -> None:
        self._call("cuCtxSynchronize")

    def pointer_attribute(self, attribute: int, address: int) -> int:
        value = (ctypes.c_uint64 * 8)()
        code = self._get_attribute(ctypes.addressof(value), attribute, address)
        if code != 0:
            raise self._failure("cuPointerGetAttribute", code)
        return int(value[0])

    def address_range(self, address: int) -> tuple[int, int]:
        base, size = self._call("cuMemGetAddressRange", address)
        return int(base), int(size)

    def ipc_get_handle(self, address: int) -> bytes:
        handle = self._call("cuIpcGetMemHandle", address)
        # Not by a field: recent cuda-bindings give the handle none.
        return ctypes.string_at(int(handle.getPtr()), IPC_HANDLE_BYTES)

    def ipc_open_handle(self, handle: bytes) -> int:
        if len(handle) != IPC_HANDLE_BYTES:
            raise failure("cuIpcOpenMemHandle", INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE")
        theirs = self._driver.CUipcMemHandle()
        ctypes.memmove(int(theirs.getPtr()), handle, IPC_HANDLE_BYTES)
        return int(self._call("cuIpcOpenMemHandle", theirs, _LAZY_PEER_ACCESS))

    def ipc_close_handle(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", address)

    def retain_allocation(self, address: int) -> int:
        return int(self._call("cuMemRetainAllocationHandle", address))

    def release_allocation(self, handle: int) -> None:
        self._call("cuMemRelease", handle)

    def export_fd(self, handle: int) -> int:
        return int(self._call("cuMemExportToShareableHandle", handle, self._fd_kind(), 0))

    def import_fd(self, fd: int) -> int:
        return int(self._call("cuMemImportFromShareableHandle", fd, self._fd_kind()))

    def _fd_kind(self) -> Any:
        return self._driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def reserve(self, size: int) -> int:
        return int(self._call("cuMemAddressReserve", size, 0, 0, 0))

    def free_reservation(self, address: int, size: int) -> None:
        self._call("cuMemAddressFree", address, size)

    def map(self, address: int, size: int, handle: int) -> None:
        self._call("cuMemMap", address, size, 0, handle, 0)

    def unmap(self, address: int, size: int) -> None:
        self._call("cuMemUnmap", address, size)

    def allow(self, address: int, size: int, ordinal: int, *, writable: bool) -> None:
        names = self._driver
        access = names.CUmemAccessDesc()
        access.location.type = names.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = ordinal
        flags = names.CUmemAccess_flags
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        self._call("cuMemSetAccess", address, size, [access], 1)

    def register_host(self, address: int, size: int) -> None:
        self._call("cuMemHostRegister", address, size, _PORTABLE_AND_MAPPED)

    def host_device_address(self, address: int) -> int:
        return int(self._call("cuMemHostGetDevicePointer", address, 0))

    def unregister_host(self, address: int) -> None:
        self._call("cuMemHostUnregister", address)

    def write_value(self, stream: int, address: int, value: int) -> None:
        flag = self._driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
        self._call("cuStreamWriteValue64", stream, address, value, int(flag))

    def wait_value(self, stream: int, address: int, value: int) -> None:
        flag = self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        self._call("cuStreamWaitValue64", stream, address, value, int(flag))

    def is_capturing(self, stream: int) -> bool:
        status, state = self._driver.cuStreamIsCapturing(stream)
        if int(status) == STREAM_CAPTURE_IMPLICIT:
            return True
        if int(status) != 0:
            raise self._failure("cuStreamIsCapturing", int(status))
        return int(state) != _CAPTURE_NONE


def failure(call: str, code: int, name: str) -> SystemFault:
    """The typed form of a call that failed.

    Args:
        call: as in the driver's reference (``"cuMemMap"``).
        code: its ``CUresult``, not 0.
        name: the code's name.
    """
    if code == OUT_OF_MEMORY:
        return SystemLimit(
            f"{call}: the device, or its address space, is full.",
            resource="device memory",
            remedy="Free device memory (torch.cuda.empty_cache()), or share less.",
        )
    error = DriverError(
        f"{call} failed: {name} ({code}).",
        resource=call,
        remedy="If later calls fail as well, this process's CUDA context is lost: end the process.",
    )
    error.code = code
    return error


@functools.cache
def load() -> Driver:
    """This process's driver; not initialised yet.

    Raises:
        DriverError: there is no CUDA driver, or no cuda-bindings for it; ``resource`` says which.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(
            f"there is no CUDA driver: {error}.", resource="libcuda.so.1", remedy="Use host memory, or install it."
        ) from error
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DriverError(
            f"cuda-bindings cannot be imported: {error}.",
            resource="cuda-bindings",
            remedy="Install etha with the extra cuda12 or cuda13, as the driver is.",
        ) from error
    return CudaBindings(driver, library)
