"""The seam between kinds of memory: what every backend can do, and the one for host memory.

Whoever shares, opens or views memory asks a `Backend` and never looks at a device. `HOST` is here; that of a device is
`etha.tensor_bus.ipc.cuda_backend.CudaBackend`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from etha.errors import InvalidRecord
from etha.tensor_bus.ipc import host
from etha.tensor_bus.ipc.allocations import Allocation, HostAllocation
from etha.tensor_bus.ipc.export import Export

if TYPE_CHECKING:
    import torch

Buffer = ctypes.Array[ctypes.c_ubyte]
"""Bytes by their address; whether the host may touch them is the backend's to say."""


class Opened(Protocol):
    """One allocation opened in this process."""

    @property
    def address(self) -> int:
        """Address of the first byte."""

    @property
    def size(self) -> int:
        """Bytes, > 0."""

    def close(self) -> None:
        """Unmap, or have it unmapped by `Backend.settle`; idempotent. Only called when no view is left."""


class Backend(Protocol):
    """What a kind of memory offers."""

    @property
    def kind(self) -> str:
        """The device type that it serves, as in ``torch.device.type``."""

    def export(self, tensors: Mapping[str, object]) -> Export:
        """Describe and pin the memory under tensors; raises `InvalidArgument`, `NotShareable` or `SystemLimit`."""

    def check_descriptors(self, allocation: Allocation, fds: Sequence[int]) -> None:
        """Refuse descriptors that are not what an allocation claims, as far as that can be told; raises `StaleHandle`
        or `InvalidRecord`."""

    def open_allocation(self, allocation: Allocation, fds: Sequence[int]) -> Opened:
        """Open an allocation, read-only where that can be, after its descriptors have been checked. They are neither
        kept nor closed."""

    def base(self, buffer: Buffer) -> torch.Tensor:
        """A uint8 tensor of exactly the buffer's bytes, which keeps the buffer alive."""

    def empty(self) -> torch.Tensor:
        """A uint8 tensor without elements, on the device."""

    def settle(self) -> bool:
        """Unmap what was closed and could not be unmapped at once; whether nothing waits for that any more."""


class HostBackend:
    """Host memory. Opening maps, and closing unmaps, at once."""

    kind = "cpu"

    def export(self, tensors: Mapping[str, object]) -> Export:
        """See `etha.tensor_bus.ipc.host.export`."""
        return host.export(tensors)

    def check_descriptors(self, allocation: Allocation, fds: Sequence[int]) -> None:
        """See `etha.tensor_bus.ipc.host.check_descriptor`."""
        host.check_descriptor(*self._file(allocation, fds))

    def open_allocation(self, allocation: Allocation, fds: Sequence[int]) -> Opened:
        """See `etha.tensor_bus.ipc.host.open_allocation`."""
        return host.open_allocation(*self._file(allocation, fds))

    def base(self, buffer: Buffer) -> torch.Tensor:
        """Over the mapped bytes themselves."""
        import torch

        return torch.frombuffer(buffer, dtype=torch.uint8)

    def empty(self) -> torch.Tensor:
        """On the CPU, whatever the default device is."""
        import torch

        return torch.empty(0, dtype=torch.uint8, device="cpu")

    def settle(self) -> bool:
        """Nothing ever waits."""
        return True

    def _file(self, allocation: Allocation, fds: Sequence[int]) -> tuple[int, HostAllocation]:
        if not isinstance(allocation, HostAllocation) or len(fds) != 1:
            raise InvalidRecord(
                f"An allocation with {len(fds)} descriptors is no file of host memory.", resource="allocations"
            )
        return fds[0], allocation


HOST: Final = HostBackend()
