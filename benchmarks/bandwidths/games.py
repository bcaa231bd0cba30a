"""A device's own ping-pong between two processes, and work that keeps it busy; the host's, for the same rows.

The device's is that of ``benchmarks/probes/ping_pong.py``: both sides queue a whole game in advance, so no host is in
it. What is busy is busy in the owner's process.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from costs.bare import Other

if TYPE_CHECKING:
    import torch

SLOTS_BYTES: Final = 4096
ROUNDS: Final = 20
"""Of one game: well below what a stream takes without blocking its host, and done while the device is kept busy."""

SERVE, RETURN = 0, 1
"""The slots of the two players."""

_BUSY_NS: Final = 1_000_000
_BUSY_KERNELS: Final = 200
_BLOCKS_A_MULTIPROCESSOR: Final = 32
_BUSY_WIDTH: Final = 512


def slots() -> int:
    """A file for the slots of a game, for both players."""
    from slots import sealed_memfd

    fd: int = sealed_memfd(SLOTS_BYTES)
    return fd


class Player:
    """One side of the device's game. Made in a process that has a context there."""

    def __init__(self, fd: int, mine: int) -> None:
        from libcuda import Cuda
        from slots import Slots

        self._cuda = Cuda().start()
        self._cuda.load()
        self._stream, self._other = self._cuda.stream(), self._cuda.stream()
        self._slots = Slots(self._cuda, fd, SLOTS_BYTES)
        self._mine, self._theirs = mine, SERVE + RETURN - mine
        self._full = _BLOCKS_A_MULTIPROCESSOR * self._cuda.attribute("multiprocessors")

    def play(self, first: int) -> float:
        """One game with the values from ``first`` on; seconds a round, as this side sees it."""
        started = time.perf_counter_ns()
        for value in range(first, first + ROUNDS):
            if self._mine == RETURN:
                self._slots.wait(self._stream, self._theirs, value)
            self._cuda.launch("nothing", self._stream)
            self._slots.signal(self._stream, self._mine, value)
            if self._mine == SERVE:
                self._slots.wait(self._stream, self._theirs, value)
        self._cuda("cuStreamSynchronize", self._stream)
        return (time.perf_counter_ns() - started) * 1e-9 / ROUNDS

    def start(self) -> None:
        """Fill the device, for a fifth of a second, from another stream."""
        for _ in range(_BUSY_KERNELS):
            self._cuda.launch("spin", self._other, _BUSY_NS, blocks=self._full)

    def stop(self) -> None:
        """Wait until it is idle."""
        self._cuda("cuStreamSynchronize", self._other)


class HostPlayer:
    """The host's: a ping-pong through epoll, and a thread that multiplies matrices. Made before there is a client."""

    def __init__(self) -> None:
        self._other = Other(answers=True)
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def play(self, first: int) -> float:
        """One packet there and back; seconds."""
        started = time.perf_counter_ns()
        self._other.ping()
        return (time.perf_counter_ns() - started) * 1e-9

    def start(self) -> None:
        """Keep a core busy from another thread."""
        import torch

        matrix = torch.ones(_BUSY_WIDTH, _BUSY_WIDTH)
        self._end.clear()
        self._thread = threading.Thread(target=self._work, args=(matrix,), daemon=True)
        self._thread.start()

    def _work(self, matrix: torch.Tensor) -> None:
        while not self._end.is_set():
            matrix @ matrix

    def stop(self) -> None:
        """End the thread."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
