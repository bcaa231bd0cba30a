"""Helper processes that are called by name: ``actor.call("copy", 512)`` runs ``copy(512)`` of its object."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from costs.processes import Helper, Talk


def now() -> int:
    """Nanoseconds of a clock that all processes share (clock_gettime(2): ``CLOCK_MONOTONIC``)."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class Actor(Helper):
    """A forked process with an object in it. Arguments and answers are what JSON can say."""

    def __init__(self, make: Callable[..., object], *arguments: Any) -> None:
        super().__init__(_act, make, arguments)
        self.hear()

    def say(self, name: str, *arguments: Any) -> None:
        """Have it do something, and go on; what it answers is `hear`d later."""
        self.talk.say([name, *arguments])

    def call(self, name: str, *arguments: Any) -> Any:
        """Have it do something; what that returns."""
        self.say(name, *arguments)
        return self.hear()


def _act(talk: Talk, make: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    made = make(*arguments)
    talk.say("ready")
    while True:
        name, *rest = talk.hear()
        talk.say(getattr(made, name)(*rest))
