"""The kinds of memory that the contract is asked of: how each makes tensors, shares them, opens and reads them.

Used by the tests, and by the owner process beside them (`owner.py`).
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fake_backend import FakeBackend
from fake_driver import GRANULARITY, FakeDriver

from etha.tensor_bus.ipc import host, mapping
from etha.tensor_bus.ipc.cuda import Device
from etha.tensor_bus.ipc.cuda_backend import CudaBackend
from etha.tensor_bus.ipc.export import Export
from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.ipc.mapping import ImportedMemory, MappingTable


def pattern(nbytes: int, seed: int = 0) -> bytes:
    """Bytes that tell their place and their seed."""
    return bytes((seed * 89 + place * 7 + (place >> 8)) % 256 for place in range(nbytes))


class World:
    """One kind of memory in this process.

    Attributes:
        name: of the kind.
        read_only: whether a reader's write ends it.
        manifest_type: of its manifests.
    """

    name = ""
    read_only = True
    manifest_type: Any = Manifest

    def tensors(self, *sizes: int) -> list[torch.Tensor]:
        """Tensors of so many bytes each that can be shared, filled with their `pattern`."""
        raise NotImplementedError

    def unshareable(self) -> torch.Tensor:
        """A tensor of the same device type that cannot."""
        raise NotImplementedError

    def export(self, tensors: Mapping[str, object]) -> Export:
        raise NotImplementedError

    def import_memory(self, manifest: Any, fds: Sequence[int], table: MappingTable) -> ImportedMemory:
        raise NotImplementedError

    def read(self, buffer: ctypes.Array[ctypes.c_ubyte]) -> bytes:
        """The bytes behind a buffer of an import."""
        return bytes(buffer)

    def settle(self, table: MappingTable) -> None:
        """What an etha call does about what has died."""
        table.reap()

    def left_open(self) -> dict[str, int]:
        """How much is open, by kind."""
        gc.collect()
        return {"descriptors": len(os.listdir("/proc/self/fd"))}

    def close(self) -> None:
        """Nothing more is asked."""


class HostWorld(World):
    """Host memory."""

    name = "host"
    manifest_type = Manifest

    def tensors(self, *sizes: int) -> list[torch.Tensor]:
        made = []
        for seed, size in enumerate(sizes):
            made.append(torch.frombuffer(bytearray(pattern(size, seed)), dtype=torch.uint8).share_memory_())
        return made

    def unshareable(self) -> torch.Tensor:
        return torch.ones(3)

    def export(self, tensors: Mapping[str, object]) -> Export:
        return host.export(tensors)

    def import_memory(self, manifest: Any, fds: Sequence[int], table: MappingTable) -> ImportedMemory:
        return mapping.import_memory(manifest, fds, table)


class FakeCudaWorld(World):
    """Device memory of the fake driver. Its tensors are the CPU's, over the very addresses."""

    def __init__(self) -> None:
        self.driver = FakeDriver()
        self.device = Device(self.driver, self.driver.uuids[0])
        self.backend = FakeBackend(self.device, os.urandom(16))

    def _fill(self, address: int, sizes: Sequence[int], stride: int) -> list[torch.Tensor]:
        made = []
        for seed, size in enumerate(sizes):
            memory = (ctypes.c_ubyte * size).from_address(address + seed * stride)
            memory[:] = pattern(size, seed)
            made.append(torch.frombuffer(memory, dtype=torch.uint8))
        return made

    def unshareable(self) -> torch.Tensor:
        address = self.driver.allocate(GRANULARITY, IS_MANAGED=1)
        return self._fill(address, [16], 0)[0]

    def export(self, tensors: Mapping[str, object]) -> Export:
        return self.backend.export(tensors)

    def import_memory(self, manifest: Any, fds: Sequence[int], table: MappingTable) -> ImportedMemory:
        return mapping.import_memory(manifest, fds, table, self.backend)

    def settle(self, table: MappingTable) -> None:
        table.reap()
        self.device.drain()

    def left_open(self) -> dict[str, int]:
        return {**super().left_open(), **self.driver.left_open()}

    def close(self) -> None:
        self.device.close()
        self.driver.shut()


class FakeLegacyWorld(FakeCudaWorld):
    """``cudaMalloc``: all tensors in one allocation, as torch packs small ones."""

    name = "fake-cuda-legacy"
    read_only = False

    def tensors(self, *sizes: int) -> list[torch.Tensor]:
        stride = -(-max(sizes) // 512) * 512
        return self._fill(self.driver.allocate(stride * len(sizes) + GRANULARITY) + 512, sizes, stride)


class FakeVirtualWorld(FakeCudaWorld):
    """``expandable_segments``: tensors over chunks of two sizes, and across their borders."""

    name = "fake-cuda-fd"

    def tensors(self, *sizes: int) -> list[torch.Tensor]:
        stride = -(-max(sizes) // 512) * 512
        chunks = []
        while sum(chunks) < stride * len(sizes) + 512:
            chunks.append(GRANULARITY * (1 + len(chunks) % 2))
        return self._fill(self.driver.allocate_chunks(*chunks) + 512, sizes, stride)


class CudaWorld(World):
    """A GPU: the first visible one, whatever torch's allocator gives there."""

    name = "cuda"

    def __init__(self) -> None:
        from etha.tensor_bus.ipc import driver
        from etha.tensor_bus.ipc.cuda import visible_devices

        torch.empty(1, device="cuda")
        self.driver = driver.load()
        self.device = Device(self.driver, visible_devices(self.driver)[0])
        self.backend = CudaBackend(self.device, os.urandom(16))
        self.read_only = "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")

    def tensors(self, *sizes: int) -> list[torch.Tensor]:
        made = []
        for seed, size in enumerate(sizes):
            made.append(torch.frombuffer(bytearray(pattern(size, seed)), dtype=torch.uint8).cuda())
        torch.cuda.synchronize()
        return made

    def unshareable(self) -> torch.Tensor:
        return torch.ones(3).pin_memory()

    def export(self, tensors: Mapping[str, object]) -> Export:
        return self.backend.export(tensors)

    def import_memory(self, manifest: Any, fds: Sequence[int], table: MappingTable) -> ImportedMemory:
        return mapping.import_memory(manifest, fds, table, self.backend)

    def read(self, buffer: ctypes.Array[ctypes.c_ubyte]) -> bytes:
        class Seen:
            __cuda_array_interface__ = {
                "shape": (len(buffer),),
                "typestr": "|u1",
                "data": (ctypes.addressof(buffer), False),
                "version": 3,
            }

        return bytes(torch.as_tensor(Seen(), device="cuda").cpu().tolist())

    def settle(self, table: MappingTable) -> None:
        table.reap()
        self.device.drain()

    def left_open(self) -> dict[str, int]:
        # Not the descriptors: the driver opens its own when it likes.
        return {"retired": self.device.retired}

    def close(self) -> None:
        self.device.close()


WORLDS: dict[str, type[World]] = {each.name: each for each in (HostWorld, FakeLegacyWorld, FakeVirtualWorld, CudaWorld)}
