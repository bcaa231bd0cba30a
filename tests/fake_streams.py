"""Streams of the fake driver: each a queue, and a thread that works it off in order."""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable


def reached(found: int, wanted: int) -> bool:
    """``CU_STREAM_WAIT_VALUE_GEQ`` in 64 bits: (int64)(found - wanted) >= 0."""
    return (found - wanted) % 2**64 < 2**63


class Stream:
    """Operations in the order in which they were put."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._done = threading.Condition()
        self._pending = 0
        self._ended = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="fake-stream", daemon=True)
        self._thread.start()

    def put(self, operation: Callable[[], object]) -> None:
        """Queue an operation; what it raises is kept in ``error`` and ends the stream, as a fault ends a context."""
        with self._done:
            self._pending += 1
        self._queue.put(operation)

    def write(self, slot: ctypes.c_uint64, value: int) -> None:
        def store() -> None:
            slot.value = value

        self.put(store)

    def wait(self, slot: ctypes.c_uint64, value: int) -> None:
        def poll() -> None:
            while not reached(slot.value, value) and not self._ended:
                time.sleep(0.000_01)

        self.put(poll)

    def drain(self, timeout: float | None) -> bool:
        """Wait until all that was put is done; whether it is."""
        with self._done:
            self._done.wait_for(lambda: self._pending == 0 or self.error is not None, timeout)
            if self.error is not None:
                raise self.error
            return self._pending == 0

    def end(self) -> None:
        """Wait for nothing any more, and end the thread."""
        self._ended = True
        self._queue.put(None)
        self._thread.join(60)

    def _work(self) -> None:
        while (operation := self._queue.get()) is not None:
            try:
                if not self._ended and self.error is None:
                    operation()
            except BaseException as error:
                self.error = error
            with self._done:
                self._pending -= 1
                self._done.notify_all()
