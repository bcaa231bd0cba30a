"""For workers of the tests: lanes (threads that do what they are told), calls that are timed, and words for outcomes.

A call may overshoot its timeout by a tenth, and by what a loaded box costs: `SLACK`. A hang is 30 seconds or for ever.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from etha.errors import EthaError
from etha.tensor_bus.state import ClaimRecord

SLACK = 1.0


class Overshot(Exception):
    """A call kept its caller longer than it may."""


class Lane:
    """A thread with a name."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)

    def start(self, call: Callable, *arguments) -> Future:
        return self._executor.submit(call, *arguments)

    def run(self, call: Callable, *arguments):
        return self.start(call, *arguments).result(60)

    def end(self) -> None:
        self._executor.shutdown()


def outcome(call: Callable, timeout: float):
    """What a call with a timeout gave, or the name of its error; raises `Overshot` when it took too long."""
    started = time.monotonic()
    try:
        value = call()
    except EthaError as error:
        value = type(error).__name__
    took = time.monotonic() - started
    if took > timeout * 1.1 + SLACK:
        raise Overshot(f"{took:.2f} s with a timeout of {timeout} s: {value}")
    return value


def shared(size: int = 64) -> torch.Tensor:
    """A tensor that may be registered."""
    return torch.zeros(size).share_memory_()


def enter_update(publication, timeout: float = 20.0, **options):
    """Enter an update; the caller leaves it."""
    update = publication.update(timeout=timeout, **options)
    return update.__enter__()


def leave_update(update) -> None:
    update.__exit__(None, None, None)


def write_once(publication, timeout: float = 20.0, **options) -> int:
    """One whole update."""
    with publication.update(timeout=timeout, **options):
        pass
    return publication.version


def waits(client, name: str, count: int = 1) -> None:
    """Return once ``count`` claims on a publication wait; they are looked for again and again."""

    def waiting() -> int:
        return sum(claim.name == name and not claim.granted for claim in client._link.state.all(ClaimRecord).values())

    until(lambda: waiting() >= count, waiting)


def poll_wins(publication) -> bool:
    """Whether an update is granted at once."""
    with publication.update(timeout=0):
        return True


def descriptors() -> int:
    """How many this process has open, garbage left out."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def until(condition: Callable[[], bool], story: Callable[[], object], timeout: float = 20.0) -> None:
    """Wait for what another process does; it is looked at again and again, and fails with the story."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so within {timeout} s: {story()}")
        os.sched_yield()
