"""Tensors of one kind of memory, and what is measured of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

import torch
import torch.multiprocessing
from costs.tensors import raise_descriptor_limit

from bandwidths.place import Place

MIB: Final = 1 << 20
GIB: Final = 1 << 30


class Memory:
    """Of a place, in a process that may use it. Its streams are torch's current ones.

    On a device, making one makes the process's context there.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.device = torch.device(place.device)
        raise_descriptor_limit()
        torch.set_num_threads(1)
        torch.multiprocessing.set_sharing_strategy("file_system")
        if self.on_device:
            torch.zeros(1, device=self.device)
            torch.cuda.synchronize()

    @property
    def on_device(self) -> bool:
        return self.device.type != "cpu"

    def shared(self, shape: tuple[int, ...], dtype: torch.dtype, value: int = 1) -> torch.Tensor:
        """A tensor that can be registered, every byte of it written."""
        made = torch.full(shape, value, dtype=dtype, device=self.device)
        return made if self.on_device else made.share_memory_()

    def private(self, nbytes: int) -> torch.Tensor:
        """Bytes to copy into, each written once."""
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device).fill_(0)

    def wait(self) -> None:
        """Until all that was queued is done."""
        if self.on_device:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """What a call takes where its bytes move: by the device's clock, or by the host's."""
        if not self.on_device:
            started = time.perf_counter_ns()
            call()
            return (time.perf_counter_ns() - started) * 1e-9
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e-3

    def free(self) -> int:
        """Bytes that are free, of which a run may take half."""
        if self.on_device:
            torch.cuda.empty_cache()
            return torch.cuda.mem_get_info()[0]
        shared = os.statvfs("/dev/shm")
        return min(available(), shared.f_bavail * shared.f_frsize)


def available() -> int:
    """The host's memory that can be had without swapping, in bytes (proc_meminfo(5), ``MemAvailable``)."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
