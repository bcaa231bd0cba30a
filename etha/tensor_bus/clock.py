"""The one clock of deadlines: ``CLOCK_BOOTTIME``, in seconds.

It is the same for every process of a box, does not jump when the wall clock is set, and goes on while the box sleeps,
so a deadline written by a worker means the same to the agent. The wall clock is used nowhere.
"""

from __future__ import annotations

import time
from typing import Final

from etha.errors import InvalidArgument

_NUMBER: Final = (int, float)

MAX_TIMEOUT: Final = 1_000_000
"""Seconds, eleven days: with its `grace` still what poll(2) takes, which counts milliseconds in 31 bits."""


def now() -> float:
    """Seconds since the box booted, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def deadline_after(timeout: float) -> float:
    """The moment ``timeout`` seconds from now.

    Raises:
        InvalidArgument: ``timeout`` is no number from 0 to `MAX_TIMEOUT`.
    """
    if not isinstance(timeout, _NUMBER) or not 0 <= timeout <= MAX_TIMEOUT:
        raise InvalidArgument(
            f"timeout={timeout!r} is not a number of seconds from 0 to {MAX_TIMEOUT}.",
            resource="timeout",
            remedy="Every wait in etha ends: give the longest that you would wait.",
        )
    return now() + timeout


def remaining(deadline: float) -> float:
    """Seconds until ``deadline``, never below 0."""
    return max(0.0, deadline - now())


def grace(timeout: float) -> float:
    """How long past its deadline a call still waits for the agent to say that it failed.

    A tenth of the timeout, at least a tenth of a second. A poll is nothing but the wait for that answer, and on a
    loaded box an agent may need longer for it: half a second.
    """
    return 0.5 if timeout == 0 else max(0.1, timeout * 0.1)
