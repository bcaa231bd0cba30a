"""A process whose CUDA driver is the fake one: agents and workers of the tests of device memory on the bus.

    python fake_gpu.py agent --device cuda:0        an agent

A worker of `harness` imports this module, and calls `install`. The devices are the fake driver's two; an environment
variable of the tests' own says in which order this process sees them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fake_driver import GRANULARITY, FakeDriver

UUIDS = (b"the first device", b"the other device")
ORDER = "ETHA_TEST_DEVICES"
"""Which of `UUIDS` this process sees, as ``CUDA_VISIBLE_DEVICES`` would say it: ``"1,0"``."""


def seen() -> tuple[bytes, ...]:
    return tuple(UUIDS[int(number)] for number in os.environ.get(ORDER, "0,1").split(","))


def install() -> FakeDriver:
    """Put the fake driver in the place of the real one, in this process."""
    from etha.tensor_bus import agent, client_device
    from etha.tensor_bus.ipc import devices, driver

    fake = FakeDriver(seen())
    driver.load = lambda: fake
    devices._ask = seen
    from fake_backend import FakeBackend

    client_device.CudaBackend = FakeBackend
    agent.CudaBackend = FakeBackend
    return fake


class Gpu:
    """For workers: memory, streams and kernels on the fake device.

    Attributes:
        driver: this process's.
    """

    def __init__(self) -> None:
        from etha.tensor_bus.ipc.cuda_backend import device_of

        self.driver = install()
        self._device_of = device_of
        self._stream = 0

    def tensors(self, kind: str, *sizes: int):
        """uint8 tensors of so many bytes, in one allocation of that kind."""
        import torch

        device = self._device_of(UUIDS[0])
        stride = -(-max(sizes) // 512) * 512
        with device.current():
            if kind == "legacy":
                where = {"IS_LEGACY_CAPABLE": 1, "DEVICE_ORDINAL": device.ordinal}
                address = self.driver.allocate(stride * len(sizes) + GRANULARITY, **where)
            else:
                chunks = []
                while sum(chunks) < stride * len(sizes):
                    chunks.append(GRANULARITY * (1 + len(chunks) % 2))
                address = self.driver.allocate_chunks(*chunks, DEVICE_ORDINAL=device.ordinal)
        made = {}
        for index, size in enumerate(sizes):
            memory = (ctypes.c_ubyte * size).from_address(address + index * stride)
            made[f"w{index}"] = torch.frombuffer(memory, dtype=torch.uint8)
        return made

    def stream(self) -> int:
        """A stream of its own, current in this thread from now on."""
        from fake_backend import FakeBackend

        self._stream = FakeBackend.streams.current = self.driver.create_stream()
        return self._stream

    def launch(self, kernel) -> None:
        """Queue a kernel on the current stream."""
        self.driver.launch(self._stream, kernel)

    def drained(self, timeout: float = 20.0) -> bool:
        """Whether the current stream comes to its end in time."""
        return self.driver.drain(self._stream, timeout)

    def idle(self) -> bool:
        """Whether it has."""
        return self.driver.idle(self._stream)


def main() -> None:
    install()
    from etha.cli import main as etha

    etha()


if __name__ == "__main__":
    main()
