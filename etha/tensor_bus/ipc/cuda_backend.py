"""Device memory as a `Backend`: one device of this process, as one client uses it.

Every client of a process uses the same `Device`: it holds what waits to be unmapped there, and knows what this process
itself has exported. It is made when the first tensor comes, not before: ``cuInit`` makes every later fork of the
process useless to CUDA.

This has run on a fake driver only; ``docs/cuda-ipc.md`` says what a GPU has still to answer.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from etha.errors import InvalidRecord
from etha.tensor_bus.ipc import driver
from etha.tensor_bus.ipc.allocations import Allocation, HostAllocation, pieces
from etha.tensor_bus.ipc.backend import Buffer, Opened
from etha.tensor_bus.ipc.cuda import Device, open_allocation
from etha.tensor_bus.ipc.cuda_export import CudaExport, export

if TYPE_CHECKING:
    import torch


class CudaBackend:
    """One device, as one client uses it.

    Attributes:
        device: the device.
        owner: 16-byte id of the client.
        kind: the tensors' device type.
    """

    kind = "cuda"

    def __init__(self, device: Device, owner: bytes) -> None:
        self.device = device
        self.owner = owner

    def export(self, tensors: Mapping[str, object]) -> CudaExport:
        """Share the memory under tensors; see `cuda_export.export`. An array of another library that offers DLPack
        (CuPy, JAX) is taken as the tensor over its memory."""
        if isinstance(tensors, Mapping):
            tensors = {name: _as_tensor(value) for name, value in tensors.items()}
        return export(self.device, self.owner, tensors, self.kind)

    def check_descriptors(self, allocation: Allocation, fds: Sequence[int]) -> None:
        """Only how many there are: the driver has no call that tells what a descriptor leads to."""
        chunks = len(pieces(allocation))
        if isinstance(allocation, HostAllocation) or len(fds) != chunks:
            raise InvalidRecord(f"{len(fds)} descriptors came for {chunks} chunks.", resource="fds")

    def open_allocation(self, allocation: Allocation, fds: Sequence[int]) -> Opened:
        """See `cuda.open_allocation`."""
        if isinstance(allocation, HostAllocation):
            raise InvalidRecord("A file of host memory is no memory of a device.", resource="allocations")
        return open_allocation(self.device, allocation, fds)

    def base(self, buffer: Buffer) -> torch.Tensor:
        """Over the device's addresses; torch keeps what it is made of alive."""
        import torch

        return torch.as_tensor(_Bytes(buffer), device=self._torch_device())

    def empty(self) -> torch.Tensor:
        """On the device."""
        import torch

        return torch.empty(0, dtype=torch.uint8, device=self._torch_device())

    def settle(self) -> bool:
        """See `Device.drain`; waits for the device where something was closed."""
        self.device.drain(self.stream())
        return self.device.retired == 0

    def stream(self) -> int:
        """The driver's number of torch's current stream in this thread."""
        import torch

        return int(torch.cuda.current_stream(self.device.ordinal).cuda_stream)

    def _torch_device(self) -> str:
        return f"{self.kind}:{self.device.ordinal}"


class _Bytes:
    """Device bytes by the CUDA Array Interface, version 3 (numba's documents); keeps their buffer alive."""

    def __init__(self, buffer: Buffer) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (len(buffer),),
            "typestr": "|u1",
            "data": (ctypes.addressof(buffer), False),
            "strides": None,
            "version": 3,
        }
        self._buffer = buffer


def _as_tensor(value: object) -> object:
    """The tensor over an array's memory; anything else as it is."""
    import torch.utils.dlpack

    if isinstance(value, torch.Tensor) or not hasattr(value, "__dlpack__"):
        return value
    try:
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(value)
        return tensor
    except (BufferError, RuntimeError, TypeError, ValueError):
        return value  # which is refused by its type, with its name


_devices: Final[dict[tuple[int, bytes], Device]] = {}


def device_of(uuid: bytes) -> Device:
    """This process's own `Device`, made at the first call.

    Raises:
        InvalidArgument: ``CUDA_VISIBLE_DEVICES`` does not show it.
        DriverError: there is no driver, or it refuses; in a forked child of a process that has used CUDA, always.
    """
    key = (os.getpid(), uuid)
    made = _devices.get(key)
    if made is None:
        made = Device(driver.load(), uuid)
        first = _devices.setdefault(key, made)
        if first is not made:  # another thread's, meanwhile
            made.close()
        return first
    return made
