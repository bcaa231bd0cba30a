"""Measuring: the sides of a comparison take turns, sample by sample, so that what the machine does meets all alike.

A *side* is a function that does its work once and says how many seconds of it count. The order within a turn is
reversed every other turn, so that no side always comes first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Side = Callable[[], float]


def clocked(call: Callable[[], object]) -> Side:
    """The side of which every moment counts."""

    def side() -> float:
        started = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - started) * 1e-9

    return side


@dataclass
class Run:
    """How much is measured, and who is told how far it has come.

    Attributes:
        quick: only as much as shows that a row works; its numbers mean nothing.
        step: told the share of the row that is done.
    """

    quick: bool = False
    step: Callable[[float], None] = lambda share: None

    def pick(self, full: float, quick: float) -> int:
        """The one or the other."""
        return int(quick if self.quick else full)

    def interleave(
        self, sides: Mapping[str, Side], *, rounds: int, turns: int = 1, pause: float = 0.0, warm: int = 1
    ) -> dict[str, list[list[float]]]:
        """Measure the sides in turns.

        Args:
            sides: by name.
            rounds: how many medians of each side there will be.
            turns: samples of each side in one round.
            pause: seconds of rest before each sample. A loop that never rests measures a machine that is never idle.
            warm: turns before the first round, which do not count.

        Returns:
            name to samples in seconds, round by round.
        """
        rounds, turns, warm = self.pick(rounds, 2), self.pick(turns, min(turns, 3)), self.pick(warm, 1)
        order = list(sides.items())
        taken: dict[str, list[list[float]]] = {name: [] for name in sides}
        for _ in range(warm):
            for _, side in order:
                time.sleep(pause)
                side()
        for number in range(rounds):
            now: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(turns):
                for name, side in order:
                    time.sleep(pause)
                    now[name].append(side())
                order.reverse()
            for name, samples in now.items():
                taken[name].append(samples)
            self.step((number + 1) / rounds)
        return taken
