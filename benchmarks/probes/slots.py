"""64-bit numbers in shared host memory, which devices and hosts of several processes read and write."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

from libcuda import Cuda

RELEASED = 1 << 62
"""A value that passes every wait: the comparison is (int64)(*address - value) >= 0, so 2**64 - 1 would pass none."""


class Slots:
    """A file of them, mapped, registered, and with its device address."""

    def __init__(self, cuda: Cuda, fd: int, size: int) -> None:
        self._cuda = cuda
        self._memory = mmap.mmap(fd, size)
        self.host = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        cuda("cuMemHostRegister_v2", self.host, size, 3)  # PORTABLE | DEVICEMAP
        address = ctypes.c_uint64()
        cuda("cuMemHostGetDevicePointer_v2", ctypes.byref(address), self.host, 0)
        self.device = address.value

    def signal(self, stream: ctypes.c_void_p, slot: int, value: int) -> None:
        self._cuda("cuStreamWriteValue64_v2", stream, self.device + 8 * slot, value, 0)

    def wait(self, stream: ctypes.c_void_p, slot: int, value: int) -> None:
        self._cuda("cuStreamWaitValue64_v2", stream, self.device + 8 * slot, value, 0)  # GEQ, cyclic

    def read(self, slot: int) -> int:
        return ctypes.c_uint64.from_address(self.host + 8 * slot).value

    def store(self, slot: int, value: int) -> None:
        ctypes.c_uint64.from_address(self.host + 8 * slot).value = value


def sealed_memfd(size: int) -> int:
    """Shared memory that nobody can shrink under another's feet."""
    fd = os.memfd_create("etha-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd
