"""A CUDA driver that is none: device memory is memory files, so that real processes share it; rules as documented.

What it obeys, because the code under test must live with it:

* nothing works before ``cuInit``, nor in a forked child; most calls need a current context;
* a legacy handle names the whole allocation, fails in the exporting process, gives the same address when it is opened
  twice and must be closed twice; once its exporter is dead it opens nothing (the real driver's answer is open);
* virtual memory comes in chunks, each with handles that are counted; what is mapped stays although its handle goes;
* a page that was allowed for reading only ends whoever writes it;
* registered host memory has another address on the device, and stream operations take no other;
* a stream is a queue that another thread works off; its waits compare cyclically;
* a context that is captured cannot be synchronised.

Device memory is mapped where its address says, so a CPU tensor over it is what a CUDA tensor would be.

The k-th call, counted over all calls, can be made to fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import mmap
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fake_streams import Stream

from etha.tensor_bus.ipc import driver as api
from etha.tensor_bus.ipc.driver import failure

GRANULARITY = 1 << 16
"""Of chunks. The real one is 2 MiB; nothing may assume it."""

DEVICE_OFFSET = 1 << 45
"""From a registered page's host address to its device address."""

NOT_INITIALIZED, NOT_FOUND, ALREADY_REGISTERED, NOT_REGISTERED = 3, 500, 712, 713
CAPTURE_UNSUPPORTED, UNKNOWN, INVALID_HANDLE = 900, 999, 400

_HANDLE = struct.Struct("<QQQQ")
_MAGIC = 0xE74A

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0


def _map(address: int | None, size: int, protection: int, fd: int) -> int:
    flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    made = _LIBC.mmap(address, size, protection, flags | (_MAP_FIXED if address else 0), fd, 0)
    if made == ctypes.c_void_p(-1).value:
        raise failure("cuMemMap", api.OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY")
    return int(made)


@dataclass(eq=False)
class Block:
    """A physical allocation: a memory file, freed with its last handle and mapping."""

    fd: int
    size: int
    number: int
    attributes: dict[int, int]
    references: int = 1

    def release(self) -> None:
        self.references -= 1
        if self.references == 0:
            os.close(self.fd)


@dataclass
class Mapped:
    """Addresses behind which a block lies."""

    size: int
    block: Block
    opened: int = 0
    handle: bytes = b""


@dataclass
class Tables:
    """What a process has of the driver."""

    mapped: dict[int, Mapped] = field(default_factory=dict)
    handles: dict[int, Block] = field(default_factory=dict)
    reserved: dict[int, int] = field(default_factory=dict)
    registered: dict[int, int] = field(default_factory=dict)
    contexts: dict[int, int] = field(default_factory=dict)


def call(name: str, *, context: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Count a call of the driver, fail where it is to fail, and check what nearly every call needs."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(self: FakeDriver, *args: Any, **kwargs: Any) -> Any:
            with self.lock:
                self.calls.append(name)
                if self.fail_at == len(self.calls):
                    raise failure(name, self.fail_with, "CUDA_ERROR_UNKNOWN")
                if name != "cuInit" and self._pid != os.getpid():
                    raise failure(name, NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED")
                if context and not self.stack:
                    raise failure(name, api.INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT")
                return function(self, *args, **kwargs)

        return counted

    return wrap


class FakeDriver:
    """`etha.tensor_bus.ipc.driver.Driver`, and what a test needs beside it.

    Attributes:
        calls: names of all calls so far.
        fail_at: which of them fails, counted from 1; 0 for none.
    """

    def __init__(self, uuids: tuple[bytes, ...] = (b"the first device", b"the other device"), fail_at: int = 0) -> None:
        self.uuids = uuids
        self.fail_at = fail_at
        self.fail_with = UNKNOWN
        self.calls: list[str] = []
        self.lock = threading.RLock()
        self.tables = Tables()
        self.has_stream_memory_operations = True
        self._pid = 0
        self._local = threading.local()
        self._numbers = itertools.count(0x1000)
        self._blocks = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self._capturing: set[int] = set()

    # -- for tests ------------------------------------------------------------------------------------------------

    @property
    def stack(self) -> list[int]:
        """Contexts of this thread."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def left_open(self) -> dict[str, int]:
        """How much of each kind there is; equal before and after, nothing was left."""
        tables = self.tables
        return {
            "mapped": len(tables.mapped),
            "opened": sum(each.opened for each in tables.mapped.values()),
            "handles": len(tables.handles),
            "reserved": len(tables.reserved),
            "registered": len(tables.registered),
            "contexts": sum(tables.contexts.values()),
            "current": len(self.stack),
            "descriptors": len(os.listdir("/proc/self/fd")),
        }

    def _block(self, size: int, **attributes: int) -> Block:
        fd = os.memfd_create("fake-cuda", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        known = {
            api.MEMORY_TYPE: api.MEMORY_TYPE_DEVICE,
            api.IS_MANAGED: 0,
            api.DEVICE_ORDINAL: 0,
            api.IS_LEGACY_CAPABLE: 0,
            api.ALLOWED_HANDLE_TYPES: 0,
            api.MEMPOOL_HANDLE: 0,
        }
        known.update({getattr(api, name): value for name, value in attributes.items()})
        return Block(fd, size, next(self._blocks), known)

    def allocate(self, size: int, **attributes: int) -> int:
        """As ``cuMemAlloc``; with attributes by name (``IS_MANAGED=1``) as another kind of memory."""
        block = self._block(size, **(attributes or {"IS_LEGACY_CAPABLE": 1}))
        address = _map(None, size, mmap.PROT_READ | mmap.PROT_WRITE, block.fd)
        self.tables.mapped[address] = Mapped(size, block)
        return address

    def allocate_chunks(self, *sizes: int, **attributes: int) -> int:
        """Virtual memory over one chunk a size, as torch's expandable segments; an fd each unless told otherwise."""
        address = base = _map(None, sum(sizes), _PROT_NONE, -1)
        for size in sizes:
            block = self._block(size, **{"ALLOWED_HANDLE_TYPES": api.HANDLE_TYPE_FD, **attributes})
            _map(address, size, mmap.PROT_READ | mmap.PROT_WRITE, block.fd)
            self.tables.mapped[address] = Mapped(size, block)
            address += size
        return base

    def free(self, address: int, count: int = 1) -> None:
        """Undo `allocate`, or `allocate_chunks` of so many."""
        for _ in range(count):
            mapped = self.tables.mapped.pop(address)
            _LIBC.munmap(address, mapped.size)
            mapped.block.release()
            address += mapped.size

    def create_stream(self) -> int:
        number = next(self._numbers)
        self._streams[number] = Stream()
        return number

    def launch(self, stream: int, kernel: Callable[[], object]) -> None:
        """Queue a kernel: a function that the stream's thread calls."""
        self._stream(stream).put(kernel)

    def drain(self, stream: int, timeout: float = 60.0) -> bool:
        """Wait for a stream; whether it was done in time."""
        return self._stream(stream).drain(timeout)

    def idle(self, stream: int) -> bool:
        return self._stream(stream).drain(0)

    @contextlib.contextmanager
    def capture(self, stream: int) -> Iterator[None]:
        """The stream is being captured."""
        self._capturing.add(stream)
        try:
            yield
        finally:
            self._capturing.discard(stream)

    def shut(self) -> None:
        """End the streams' threads, whatever they wait for."""
        for stream in self._streams.values():
            stream.end()
        self._streams.clear()

    def _stream(self, number: int) -> Stream:
        if number == 0:
            return self._streams.setdefault(0, Stream())
        return self._streams[number]

    def _find(self, address: int, name: str, code: int = api.INVALID_VALUE) -> tuple[int, Mapped]:
        for base, mapped in self.tables.mapped.items():
            if base <= address < base + mapped.size:
                return base, mapped
        raise failure(name, code, "CUDA_ERROR_INVALID_VALUE")

    # -- devices and contexts -------------------------------------------------------------------------------------

    @call("cuInit", context=False)
    def init(self) -> None:
        self._pid = self._pid or os.getpid()

    @call("cuDeviceGetCount", context=False)
    def device_count(self) -> int:
        return len(self.uuids)

    @call("cuDeviceGetUuid", context=False)
    def device_uuid(self, ordinal: int) -> bytes:
        return self.uuids[ordinal]

    @call("cuDeviceGetAttribute", context=False)
    def device_attribute(self, attribute: int, ordinal: int) -> int:
        return int(attribute == api.CAN_USE_64_BIT_STREAM_MEM_OPS and self.has_stream_memory_operations)

    @call("cuDevicePrimaryCtxRetain", context=False)
    def retain_context(self, ordinal: int) -> int:
        self.tables.contexts[ordinal] = self.tables.contexts.get(ordinal, 0) + 1
        return 0xC000 + ordinal

    @call("cuDevicePrimaryCtxRelease", context=False)
    def release_context(self, ordinal: int) -> None:
        if not self.tables.contexts.get(ordinal):
            raise failure("cuDevicePrimaryCtxRelease", api.INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT")
        self.tables.contexts[ordinal] -= 1

    @call("cuCtxPushCurrent", context=False)
    def push_context(self, context: int) -> None:
        if not self.tables.contexts.get(context - 0xC000):
            raise failure("cuCtxPushCurrent", api.INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT")
        self.stack.append(context)

    @call("cuCtxPopCurrent")
    def pop_context(self) -> None:
        self.stack.pop()

    def synchronize(self) -> None:
        self._may_synchronize()
        for stream in list(self._streams.values()):
            stream.drain(None)

    @call("cuCtxSynchronize")
    def _may_synchronize(self) -> None:
        if self._capturing:
            raise failure("cuCtxSynchronize", CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    # -- memory ---------------------------------------------------------------------------------------------------

    @call("cuPointerGetAttribute")
    def pointer_attribute(self, attribute: int, address: int) -> int:
        _, mapped = self._find(address, "cuPointerGetAttribute")
        if attribute in (api.BUFFER_ID, api.MEMORY_BLOCK_ID):
            return mapped.block.number
        return mapped.block.attributes[attribute]

    @call("cuMemGetAddressRange")
    def address_range(self, address: int) -> tuple[int, int]:
        base, mapped = self._find(address, "cuMemGetAddressRange", NOT_FOUND)
        return base, mapped.size

    @call("cuIpcGetMemHandle")
    def ipc_get_handle(self, address: int) -> bytes:
        _, mapped = self._find(address, "cuIpcGetMemHandle")
        if not mapped.block.attributes[api.IS_LEGACY_CAPABLE]:
            raise failure("cuIpcGetMemHandle", api.INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE")
        inode = os.fstat(mapped.block.fd).st_ino
        return _HANDLE.pack(_MAGIC, os.getpid(), mapped.block.fd, inode).ljust(api.IPC_HANDLE_BYTES, b"\0")

    @call("cuIpcOpenMemHandle")
    def ipc_open_handle(self, handle: bytes) -> int:
        magic, pid, number, inode = _HANDLE.unpack_from(handle)
        if pid == os.getpid():
            raise failure("cuIpcOpenMemHandle", api.INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT")
        for address, mapped in self.tables.mapped.items():
            if mapped.handle == handle:
                mapped.opened += 1
                return address
        try:
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            fd = -1
        if magic != _MAGIC or fd < 0 or os.fstat(fd).st_ino != inode:
            if fd >= 0:
                os.close(fd)
            raise failure("cuIpcOpenMemHandle", INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE")
        size = os.fstat(fd).st_size
        block = Block(fd, size, next(self._blocks), {api.DEVICE_ORDINAL: 0, api.IS_LEGACY_CAPABLE: 0})
        address = _map(None, size, mmap.PROT_READ | mmap.PROT_WRITE, fd)
        self.tables.mapped[address] = Mapped(size, block, 1, handle)
        return address

    @call("cuIpcCloseMemHandle")
    def ipc_close_handle(self, address: int) -> None:
        mapped = self.tables.mapped.get(address)
        if mapped is None or not mapped.opened:
            raise failure("cuIpcCloseMemHandle", api.INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE")
        mapped.opened -= 1
        if not mapped.opened:
            self.free(address)

    def _handle(self, block: Block) -> int:
        number = next(self._numbers)
        self.tables.handles[number] = block
        return number

    @call("cuMemRetainAllocationHandle")
    def retain_allocation(self, address: int) -> int:
        _, mapped = self._find(address, "cuMemRetainAllocationHandle")
        if mapped.block.attributes.get(api.IS_LEGACY_CAPABLE):
            raise failure("cuMemRetainAllocationHandle", api.INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE")
        mapped.block.references += 1
        return self._handle(mapped.block)

    @call("cuMemRelease")
    def release_allocation(self, handle: int) -> None:
        self._held(handle, "cuMemRelease")
        self.tables.handles.pop(handle).release()

    def _held(self, handle: int, name: str) -> Block:
        if handle not in self.tables.handles:
            raise failure(name, api.INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE")
        return self.tables.handles[handle]

    @call("cuMemExportToShareableHandle")
    def export_fd(self, handle: int) -> int:
        block = self._held(handle, "cuMemExportToShareableHandle")
        if not block.attributes.get(api.ALLOWED_HANDLE_TYPES, 0) & api.HANDLE_TYPE_FD:
            raise failure("cuMemExportToShareableHandle", api.INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE")
        return os.dup(block.fd)

    @call("cuMemImportFromShareableHandle")
    def import_fd(self, fd: int) -> int:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise failure("cuMemImportFromShareableHandle", api.INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE")
        return self._handle(Block(os.dup(fd), status.st_size, next(self._blocks), {api.DEVICE_ORDINAL: 0}))

    @call("cuMemAddressReserve")
    def reserve(self, size: int) -> int:
        if size <= 0 or size % GRANULARITY:
            raise failure("cuMemAddressReserve", api.INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE")
        address = _map(None, size, _PROT_NONE, -1)
        self.tables.reserved[address] = size
        return address

    @call("cuMemAddressFree")
    def free_reservation(self, address: int, size: int) -> None:
        inside = any(address <= base < address + size for base in self.tables.mapped)
        if self.tables.reserved.get(address) != size or inside:
            raise failure("cuMemAddressFree", api.INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE")
        del self.tables.reserved[address]
        _LIBC.munmap(address, size)

    @call("cuMemMap")
    def map(self, address: int, size: int, handle: int) -> None:
        block = self._held(handle, "cuMemMap")
        free = any(base <= address and address + size <= base + room for base, room in self.tables.reserved.items())
        taken = any(base < address + size and address < base + each.size for base, each in self.tables.mapped.items())
        if not free or taken or size <= 0 or size % GRANULARITY or size > block.size:
            raise failure("cuMemMap", api.INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE")
        _map(address, size, _PROT_NONE, block.fd)
        block.references += 1
        self.tables.mapped[address] = Mapped(size, block)

    @call("cuMemUnmap")
    def unmap(self, address: int, size: int) -> None:
        mapped = self.tables.mapped.get(address)
        if mapped is None or mapped.size != size or mapped.opened:
            raise failure("cuMemUnmap", api.INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE")
        _map(address, size, _PROT_NONE, -1)
        del self.tables.mapped[address]
        mapped.block.release()

    @call("cuMemSetAccess")
    def allow(self, address: int, size: int, ordinal: int, *, writable: bool) -> None:
        covered = sum(each.size for base, each in self.tables.mapped.items() if address <= base < address + size)
        if covered != size:
            raise failure("cuMemSetAccess", api.INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE")
        _LIBC.mprotect(address, size, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))

    # -- host memory and streams ----------------------------------------------------------------------------------

    @call("cuMemHostRegister")
    def register_host(self, address: int, size: int) -> None:
        if address in self.tables.registered:
            raise failure("cuMemHostRegister", ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED")
        self.tables.registered[address] = size

    @call("cuMemHostGetDevicePointer")
    def host_device_address(self, address: int) -> int:
        if address not in self.tables.registered:
            raise failure("cuMemHostGetDevicePointer", api.INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE")
        return address + DEVICE_OFFSET

    @call("cuMemHostUnregister")
    def unregister_host(self, address: int) -> None:
        if address not in self.tables.registered:
            raise failure("cuMemHostUnregister", NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED")
        del self.tables.registered[address]

    def _slot(self, name: str, stream: int, address: int) -> ctypes.c_uint64:
        host = address - DEVICE_OFFSET
        known = any(base <= host and host + 8 <= base + size for base, size in self.tables.registered.items())
        if not known or address % 8 or stream in self._capturing:
            raise failure(name, api.INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE")
        return ctypes.c_uint64.from_address(host)

    @call("cuStreamWriteValue64")
    def write_value(self, stream: int, address: int, value: int) -> None:
        slot = self._slot("cuStreamWriteValue64", stream, address)
        self._stream(stream).write(slot, value)

    @call("cuStreamWaitValue64")
    def wait_value(self, stream: int, address: int, value: int) -> None:
        slot = self._slot("cuStreamWaitValue64", stream, address)
        self._stream(stream).wait(slot, value)

    @call("cuStreamIsCapturing", context=False)
    def is_capturing(self, stream: int) -> bool:
        return stream in self._capturing or (stream == 0 and bool(self._capturing))
