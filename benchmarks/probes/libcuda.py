"""The driver's calls that the probes need, by ctypes.

The driver is called directly (``libcuda.so.1``), so that a probe needs neither cuda-bindings nor CuPy, and shows what
the driver does and not what a library makes of it. Names are those of the symbols: where ``cuda.h`` renames a call
(``_v2``), the renamed one is the current one. Prototypes: ``cuda.h`` of CUDA 12.9; they are the same in 13.

Device numbers are those of the process: the first visible device. Nothing here touches a setting of the device.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

from kernels import ptx

MIB = 1 << 20
CUDA_ERROR_NOT_READY = 600

# CUdevice_attribute
ATTRIBUTES = {
    "compute_major": 75,
    "compute_minor": 76,
    "host_pointer_for_registered": 91,
    "stream_memory_operations_64_bit": 122,
    "host_register": 99,
    "virtual_memory": 102,
    "fd_handles": 103,
    "ipc_events": 125,
    "fabric_handles": 128,
    "compute_mode": 20,
    "multiprocessors": 16,
}

# CUpointer_attribute
POINTER = {
    "memory_type": 2,
    "buffer_id": 7,
    "managed": 8,
    "device": 9,
    "legacy_capable": 10,
    "range_start": 11,
    "range_size": 12,
    "mapped": 13,
    "handle_types": 14,
    "mempool": 17,
    "mapping_size": 18,
    "mapping_base": 19,
    "memory_block_id": 20,
}

_c_int, _c_uint, _c_u64, _c_size, _c_void = (
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_uint64,
    ctypes.c_size_t,
    ctypes.c_void_p,
)
_POINTER: Any = ctypes.POINTER


class IpcHandle(ctypes.Structure):
    """``CUipcMemHandle`` and ``CUipcEventHandle``: 64 bytes, passed by value."""

    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


class Location(ctypes.Structure):
    """``CUmemLocation``."""

    _fields_ = [("type", _c_int), ("id", _c_int)]


class AllocationProperties(ctypes.Structure):
    """``CUmemAllocationProp``."""

    _fields_ = [
        ("type", _c_int),
        ("requested_handle_types", _c_int),
        ("location", Location),
        ("win32", _c_void),
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class AccessDescription(ctypes.Structure):
    """``CUmemAccessDesc``."""

    _fields_ = [("location", Location), ("flags", _c_int)]


_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_c_uint,),
    "cuDriverGetVersion": (_POINTER(_c_int),),
    "cuDeviceGet": (_POINTER(_c_int), _c_int),
    "cuDeviceGetName": (ctypes.c_char_p, _c_int, _c_int),
    "cuDeviceGetAttribute": (_POINTER(_c_int), _c_int, _c_int),
    "cuDevicePrimaryCtxRetain": (_POINTER(_c_void), _c_int),
    "cuDevicePrimaryCtxRelease_v2": (_c_int,),
    "cuCtxSetCurrent": (_c_void,),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (_POINTER(_c_size), _POINTER(_c_size)),
    "cuMemAlloc_v2": (_POINTER(_c_u64), _c_size),
    "cuMemFree_v2": (_c_u64,),
    "cuMemsetD32_v2": (_c_u64, _c_uint, _c_size),
    "cuMemsetD32Async": (_c_u64, _c_uint, _c_size, _c_void),
    "cuMemcpyDtoH_v2": (_c_void, _c_u64, _c_size),
    "cuMemcpyHtoD_v2": (_c_u64, _c_void, _c_size),
    "cuMemcpyDtoDAsync_v2": (_c_u64, _c_u64, _c_size, _c_void),
    "cuPointerGetAttribute": (_c_void, _c_int, _c_u64),
    "cuMemGetAddressRange_v2": (_POINTER(_c_u64), _POINTER(_c_size), _c_u64),
    "cuIpcGetMemHandle": (_POINTER(IpcHandle), _c_u64),
    "cuIpcOpenMemHandle_v2": (_POINTER(_c_u64), IpcHandle, _c_uint),
    "cuIpcCloseMemHandle": (_c_u64,),
    "cuIpcGetEventHandle": (_POINTER(IpcHandle), _c_void),
    "cuIpcOpenEventHandle": (_POINTER(_c_void), IpcHandle),
    "cuEventCreate": (_POINTER(_c_void), _c_uint),
    "cuEventRecord": (_c_void, _c_void),
    "cuStreamWaitEvent": (_c_void, _c_void, _c_uint),
    "cuStreamCreate": (_POINTER(_c_void), _c_uint),
    "cuStreamQuery": (_c_void,),
    "cuStreamSynchronize": (_c_void,),
    "cuStreamWriteValue64_v2": (_c_void, _c_u64, _c_u64, _c_uint),
    "cuStreamWaitValue64_v2": (_c_void, _c_u64, _c_u64, _c_uint),
    "cuMemHostRegister_v2": (_c_void, _c_size, _c_uint),
    "cuMemHostUnregister": (_c_void,),
    "cuMemHostGetDevicePointer_v2": (_POINTER(_c_u64), _c_void, _c_uint),
    "cuMemGetAllocationGranularity": (_POINTER(_c_size), _POINTER(AllocationProperties), _c_int),
    "cuMemCreate": (_POINTER(_c_u64), _c_size, _POINTER(AllocationProperties), _c_u64),
    "cuMemRelease": (_c_u64,),
    "cuMemRetainAllocationHandle": (_POINTER(_c_u64), _c_void),
    "cuMemExportToShareableHandle": (_c_void, _c_u64, _c_int, _c_u64),
    "cuMemImportFromShareableHandle": (_POINTER(_c_u64), _c_void, _c_int),
    "cuMemAddressReserve": (_POINTER(_c_u64), _c_size, _c_size, _c_u64, _c_u64),
    "cuMemAddressFree": (_c_u64, _c_size),
    "cuMemMap": (_c_u64, _c_size, _c_size, _c_u64, _c_u64),
    "cuMemUnmap": (_c_u64, _c_size),
    "cuMemSetAccess": (_c_u64, _c_size, _POINTER(AccessDescription), _c_size),
    "cuModuleLoadData": (_POINTER(_c_void), ctypes.c_char_p),
    "cuModuleGetFunction": (_POINTER(_c_void), _c_void, ctypes.c_char_p),
    "cuLaunchKernel": (_c_void, *(_c_uint,) * 7, _c_void, _POINTER(_c_void), _POINTER(_c_void)),
}

POSIX_FD, FABRIC = 1, 8
_PINNED, _DEVICE = 1, 1
READ, READ_WRITE = 1, 3


class CudaError(Exception):
    """A call of the driver failed."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} ({code})")
        self.call = call
        self.code = code
        self.name = name


class NoCuda(Exception):
    """There is no driver, or no device: the probe skips and says so."""


class Cuda:
    """The driver, and with `start` the primary context of the first device, current in the calling thread."""

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NoCuda(f"no CUDA driver: {error}") from error
        missing = [name for name in _PROTOTYPES if not hasattr(self.library, name)]
        if missing:
            raise NoCuda(f"this CUDA driver is too old; it lacks {', '.join(missing)}")
        for name, arguments in _PROTOTYPES.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        self.library.cuGetErrorName.argtypes = (_c_int, _POINTER(ctypes.c_char_p))
        self._functions: dict[str, ctypes.c_void_p] = {}

    def start(self) -> Cuda:
        """Initialise and take the context; `NoCuda` where there is no device."""
        code = self.library.cuInit(0)
        if code:
            raise NoCuda(f"no CUDA device: cuInit gives {self.error_name(code)} ({code})")
        device, context = _c_int(), _c_void()
        try:
            self("cuDeviceGet", ctypes.byref(device), 0)
        except CudaError as error:
            raise NoCuda(f"no CUDA device: {error}") from error
        self.device = device.value
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)
        self("cuCtxSetCurrent", context)
        self.context = context
        return self

    def adopt(self) -> None:
        """Make the context current in another thread of this process."""
        self("cuCtxSetCurrent", self.context)

    def __call__(self, name: str, *arguments: object) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise CudaError(name, code, self.error_name(code))

    def error_name(self, code: int) -> str:
        text = ctypes.c_char_p()
        self.library.cuGetErrorName(code, ctypes.byref(text))
        return (text.value or b"unknown").decode()

    def attempt(self, name: str, *arguments: object) -> str:
        """``"ok"``, or the error's name."""
        code = getattr(self.library, name)(*arguments)
        return "ok" if code == 0 else self.error_name(code)

    # -- the device -------------------------------------------------------------------------------------------------

    def attribute(self, name: str) -> int:
        value = _c_int()
        self("cuDeviceGetAttribute", ctypes.byref(value), ATTRIBUTES[name], self.device)
        return value.value

    def name(self) -> str:
        text = ctypes.create_string_buffer(256)
        self("cuDeviceGetName", text, 256, self.device)
        return text.value.decode()

    def version(self) -> int:
        """The newest CUDA that the driver knows: 13000 is 13.0."""
        value = _c_int()
        self("cuDriverGetVersion", ctypes.byref(value))
        return value.value

    def free_bytes(self) -> int:
        free, total = _c_size(), _c_size()
        self("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    # -- memory -----------------------------------------------------------------------------------------------------

    def allocate(self, size: int) -> int:
        address = _c_u64()
        self("cuMemAlloc_v2", ctypes.byref(address), size)
        return address.value

    def fill(self, address: int, word: int, size: int) -> None:
        self("cuMemsetD32_v2", address, word, size // 4)
        self("cuCtxSynchronize")

    def word(self, address: int) -> int:
        """The 32-bit word there, by a copy to the host."""
        value = ctypes.c_uint32()
        self("cuMemcpyDtoH_v2", ctypes.byref(value), address, 4)
        return value.value

    def look(self, address: int) -> str:
        """The word there in hexadecimal, or the error's name."""
        try:
            return f"{self.word(address):#010x}"
        except CudaError as error:
            return error.name

    def pointer(self, name: str, address: int) -> int | str:
        """A pointer's attribute, or the error's name. The buffer is larger than any attribute's type."""
        value = (_c_u64 * 8)()
        said = self.attempt("cuPointerGetAttribute", ctypes.addressof(value), POINTER[name], address)
        return value[0] if said == "ok" else said

    def range(self, address: int) -> tuple[int, int]:
        base, size = _c_u64(), _c_size()
        self("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        return base.value, size.value

    def export_legacy(self, address: int) -> bytes:
        handle = IpcHandle()
        self("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle.reserved)

    def open_legacy(self, handle: bytes) -> int:
        address = _c_u64()
        self("cuIpcOpenMemHandle_v2", ctypes.byref(address), IpcHandle.from_buffer_copy(handle), 1)
        return address.value

    def _properties(self) -> AllocationProperties:
        properties = AllocationProperties()
        properties.type = _PINNED
        properties.requested_handle_types = POSIX_FD
        properties.location = Location(_DEVICE, self.device)
        return properties

    def granularity(self) -> int:
        size = _c_size()
        self("cuMemGetAllocationGranularity", ctypes.byref(size), ctypes.byref(self._properties()), 0)
        return size.value

    def create(self, size: int) -> int:
        """A physical allocation that can be exported by fd; its handle."""
        handle = _c_u64()
        self("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._properties()), 0)
        return handle.value

    def export_fd(self, handle: int) -> int:
        fd = _c_int(-1)
        self("cuMemExportToShareableHandle", ctypes.addressof(fd), handle, POSIX_FD, 0)
        return fd.value

    def import_fd(self, fd: int) -> int:
        handle = _c_u64()
        self("cuMemImportFromShareableHandle", ctypes.byref(handle), fd, POSIX_FD)
        return handle.value

    def reserve(self, size: int) -> int:
        address = _c_u64()
        self("cuMemAddressReserve", ctypes.byref(address), size, 0, 0, 0)
        return address.value

    def map(self, address: int, size: int, handle: int, access: int) -> None:
        self("cuMemMap", address, size, 0, handle, 0)
        description = AccessDescription(Location(_DEVICE, self.device), access)
        self("cuMemSetAccess", address, size, ctypes.byref(description), 1)

    def retain(self, address: int) -> int:
        handle = _c_u64()
        self("cuMemRetainAllocationHandle", ctypes.byref(handle), address)
        return handle.value

    # -- streams ----------------------------------------------------------------------------------------------------

    def stream(self) -> ctypes.c_void_p:
        made = _c_void()
        self("cuStreamCreate", ctypes.byref(made), 1)  # CU_STREAM_NON_BLOCKING
        return made

    def done(self, stream: ctypes.c_void_p) -> bool:
        code: int = self.library.cuStreamQuery(stream)
        if code not in (0, CUDA_ERROR_NOT_READY):
            raise CudaError("cuStreamQuery", code, self.error_name(code))
        return code == 0

    def done_within(self, stream: ctypes.c_void_p, seconds: float) -> float | str | None:
        """Seconds until the stream was done, None if it was not, or the error's name."""
        start = time.monotonic()
        try:
            while not self.done(stream):
                if time.monotonic() - start > seconds:
                    return None
                time.sleep(0.001)
        except CudaError as error:
            return error.name
        return round(time.monotonic() - start, 3)

    def event(self, flags: int = 2) -> ctypes.c_void_p:
        """An event without timing; 6: for other processes too."""
        made = _c_void()
        self("cuEventCreate", ctypes.byref(made), flags)
        return made

    def load(self) -> None:
        """Compile the kernels and run each once, before a clock starts.

        The driver loads a kernel when it is first launched, and may wait for the whole context to do so: on a stream
        behind which another process stands, that would be for ever.
        """
        module = _c_void()
        image = ptx(self.attribute("compute_major"), self.attribute("compute_minor"))
        self("cuModuleLoadData", ctypes.byref(module), image)
        for name in ("spin", "nothing", "move"):
            function = _c_void()
            self("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            self._functions[name] = function
        stream, scratch = self.stream(), self.allocate(8)
        self.launch("spin", stream, 0)
        self.launch("nothing", stream)
        self.launch("move", stream, scratch + 4, scratch)
        self("cuStreamSynchronize", stream)
        self("cuMemFree_v2", scratch)

    def launch(self, name: str, stream: ctypes.c_void_p, *numbers: int, blocks: int = 1) -> None:
        """Queue a kernel of one thread a block; its arguments are 64-bit numbers, copied at once."""
        values = (_c_u64 * max(1, len(numbers)))(*numbers)
        places = (_c_void * max(1, len(numbers)))()
        for index in range(len(numbers)):
            places[index] = ctypes.addressof(values) + 8 * index
        self("cuLaunchKernel", self._functions[name], blocks, 1, 1, 1, 1, 1, 0, stream, places, None)


def median(numbers: Sequence[float]) -> float:
    """The middle one of an odd count."""
    return sorted(numbers)[len(numbers) // 2]
