"""Exporting, opening and closing memory without etha: files of memory on the host, the driver's calls on a device.

The exporting side is the process whose tensors etha shares; on a device it exports what lies under those very tensors.
The opening side is a process of its own, in which nothing of it is open already.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from costs.tensors import raise_descriptor_limit

from bandwidths.place import Place

if TYPE_CHECKING:
    import torch

_PACKET: Final = 200
"""Descriptors or handles in one; the kernel takes 253."""

_HANDLE_BYTES: Final = 64

# Not Python's own mmap: it keeps a copy of the descriptor.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Exporter:
    """Exports some pieces of memory, and sends what names them."""

    def __init__(self, place: Place, sock: socket.socket) -> None:
        self._place = place
        self._sock = sock
        self._files: list[int] = []
        self._addresses: list[int] = []
        if place.kind != "host":
            from libcuda import Cuda

            self._cuda = Cuda().start()

    def prepare(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """The pieces that tensors are made of; bytes of each."""
        for fd in self._files:
            os.close(fd)
        self._files.clear()
        if self._place.kind == "host":
            for tensor in tensors:
                self._files.append(os.memfd_create("etha-bench", os.MFD_CLOEXEC))
                os.ftruncate(self._files[-1], tensor.nbytes)
            return [tensor.nbytes for tensor in tensors]
        pieces: dict[int, int] = {}
        for tensor in tensors:
            if self._place.kind == "legacy":
                base, size = self._cuda.range(tensor.data_ptr())
                pieces[base] = size
            else:
                from torch_handles import walk

                pieces.update(walk(self._cuda, tensor.data_ptr(), tensor.nbytes))
        self._addresses = sorted(pieces)
        return [pieces[address] for address in self._addresses]

    def export(self) -> float:
        """Seconds."""
        started = time.perf_counter_ns()
        if self._place.kind == "legacy":
            handles = [self._cuda.export_legacy(address) for address in self._addresses]
            for first in range(0, len(handles), _PACKET):
                self._sock.send(b"".join(handles[first : first + _PACKET]))
        else:
            fds = [self._descriptor(place) for place in range(len(self._files or self._addresses))]
            for first in range(0, len(fds), _PACKET):
                socket.send_fds(self._sock, [b"fds"], fds[first : first + _PACKET])
            for fd in fds:
                os.close(fd)
        return (time.perf_counter_ns() - started) * 1e-9

    def _descriptor(self, place: int) -> int:
        if self._files:
            return os.dup(self._files[place])
        handle = self._cuda.retain(self._addresses[place])
        try:
            return self._cuda.export_fd(handle)
        finally:
            self._cuda("cuMemRelease", handle)


class Opener:
    """The other side; an actor."""

    def __init__(self, place: Place, sock: socket.socket) -> None:
        raise_descriptor_limit()
        self._place = place
        self._sock = sock
        self._opened: list[tuple[int, int]] = []
        self._range = (0, 0)
        if place.kind != "host":
            from libcuda import Cuda

            self._cuda = Cuda().start()

    def open(self, sizes: list[int]) -> float:
        """Seconds to receive and open pieces of so many bytes, which have been sent."""
        started = time.perf_counter_ns()
        if self._place.kind == "legacy":
            handles = b"".join(self._sock.recv(_PACKET * _HANDLE_BYTES) for _ in range(0, len(sizes), _PACKET))
            for number, size in enumerate(sizes):
                handle = handles[number * _HANDLE_BYTES : (number + 1) * _HANDLE_BYTES]
                self._opened.append((self._cuda.open_legacy(handle), size))
        else:
            fds: list[int] = []
            while len(fds) < len(sizes):
                fds += socket.recv_fds(self._sock, 16, _PACKET)[1]
            if self._place.kind == "host":
                self._opened += [(_map_file(fd, size), size) for fd, size in zip(fds, sizes, strict=True)]
            else:
                self._map(fds, sizes)
            for fd in fds:
                os.close(fd)
        return (time.perf_counter_ns() - started) * 1e-9

    def _map(self, fds: list[int], sizes: list[int]) -> None:
        from libcuda import READ

        self._range = (self._cuda.reserve(sum(sizes)), sum(sizes))
        address = self._range[0]
        for fd, size in zip(fds, sizes, strict=True):
            handle = self._cuda.import_fd(fd)
            self._cuda.map(address, size, handle, READ)
            self._cuda("cuMemRelease", handle)
            self._opened.append((address, size))
            address += size

    def close(self) -> float:
        """Seconds to close all that is open."""
        started = time.perf_counter_ns()
        for address, size in self._opened:
            if self._place.kind == "host":
                _libc.munmap(address, size)
            elif self._place.kind == "legacy":
                self._cuda("cuIpcCloseMemHandle", address)
            else:
                self._cuda("cuMemUnmap", address, size)
        if self._range[0]:
            self._cuda("cuMemAddressFree", *self._range)
        took = (time.perf_counter_ns() - started) * 1e-9
        self._opened, self._range = [], (0, 0)
        return took


def _map_file(fd: int, size: int) -> int:
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"mapping {size} bytes")
    return int(address)
