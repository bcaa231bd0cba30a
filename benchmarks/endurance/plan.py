"""What a soak runs."""

from __future__ import annotations

from typing import Final

import msgspec

MOVING: Final = 2
"""Publications of each worker that are rebound, suspended, closed and registered again. The others stay as they are."""

SUBSCRIPTIONS: Final = 4
"""Subscriptions that each worker keeps, of others' publications that stay."""


COMMANDS_PER_OPERATION: Final = 0.8
"""On average, by the workers' mix: a read is none, a suspension and its end are three."""

ANSWERED_FIRST: Final = 64
"""Blocking commands of each worker before the warm-up. The agent keeps the last 64 outcomes of each client; until there
are so many, the state grows, and is meant to."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    Attributes:
        minutes: that are judged; the warm-up comes before.
        commands: that the workers aim for in those minutes. On a machine that is too slow there will be fewer.
        workers: processes.
        publications: of all workers together.
        restart_every: seconds between two SIGKILLs of the agent; 0 for none.
        seed: of the workers' chances.
    """

    minutes: float
    commands: int
    workers: int
    publications: int
    restart_every: float
    seed: int

    @property
    def seconds(self) -> float:
        """That are judged."""
        return self.minutes * 60

    @property
    def warm(self) -> float:
        """Seconds before: caches, arenas and files reach their sizes, every kind of operation has been done."""
        return min(60.0, self.seconds / 10)

    @property
    def pause(self) -> float:
        """Seconds between the starts of two operations of one worker."""
        return self.workers * self.seconds * COMMANDS_PER_OPERATION / self.commands

    def names(self, worker: int) -> list[str]:
        """The publications of a worker."""
        return [f"soak/{index}" for index in range(worker, self.publications, self.workers)]

    def staying(self) -> list[str]:
        """The publications that stay, of all workers."""
        return [name for worker in range(self.workers) for name in self.names(worker)[MOVING:]]

    def moving(self) -> list[str]:
        """The others."""
        return [name for worker in range(self.workers) for name in self.names(worker)[:MOVING]]
