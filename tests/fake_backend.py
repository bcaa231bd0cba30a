"""`CudaBackend` over the fake driver: its tensors are the CPU's over the same addresses, its streams the fake driver's.

A test says which stream is current with `FakeBackend.streams`, by thread; where it says nothing, it is the legacy
default one.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from etha.tensor_bus.ipc.backend import Buffer
from etha.tensor_bus.ipc.cuda_backend import CudaBackend

if TYPE_CHECKING:
    import torch


class FakeBackend(CudaBackend):
    """Device memory that a CPU tensor can lie over."""

    kind = "cpu"
    streams = threading.local()

    def base(self, buffer: Buffer) -> torch.Tensor:
        import torch

        return torch.frombuffer(buffer, dtype=torch.uint8)

    def empty(self) -> torch.Tensor:
        import torch

        return torch.empty(0, dtype=torch.uint8, device="cpu")

    def stream(self) -> int:
        return getattr(self.streams, "current", 0)
