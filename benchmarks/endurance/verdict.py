"""What may grow, and by how much.

What was looked at in the judged time is cut into tenths, in its order. Of what the agent uses, a tenth's value is its
median; of the probe's calls, their 99th percentile. Flat means: the last tenth is at most `RATIO` times the first, and
memory and files grow by at most `SLOPE` bytes per command, by the least-squares line through all samples. A slope is
judged as soon as there are `ENOUGH` commands: before that it is that of a handful of pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, TypeVar

import msgspec
import numpy as np

from endurance.samples import Sample, Timed

_T = TypeVar("_T", Sample, Timed)

RATIO: Final = 1.2
SLOPE: Final = 1.0
ENOUGH: Final = 100_000
TENTHS: Final = 10

_USED: Final = {
    "rss": "agent's resident memory",
    "private": "agent's private memory",
    "command_file": "command LMDB",
    "state_file": "state LMDB",
    "descriptors": "agent's descriptors",
    "mappings": "agent's mappings",
    "claims": "claims on record",
    "outcomes": "outcomes on record",
}
_BYTES: Final = ("rss", "private", "command_file", "state_file")
_CALLS: Final = {
    "lease": "a lease, taken and released, p99",
    "command": "a registration and its close, p99",
    "floor": "a ping-pong without etha, p99",
}


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is to stay flat.

    Attributes:
        name, what: of it.
        unit: ``"bytes"``, ``"s"`` or ``""``.
        tenths: its value in each.
        slope: bytes per command; None where that means nothing.
        judged: False for what is only to be known, such as the floor: it says what the machine did.
    """

    name: str
    what: str
    unit: str
    tenths: tuple[float, ...]
    slope: float | None = None
    judged: bool = True

    @property
    def ratio(self) -> float:
        """The last tenth to the first. A tenth of nothing counts as one: a count may come from zero."""
        return max(self.tenths[-1], _least(self.unit)) / max(self.tenths[0], _least(self.unit))

    @property
    def flat(self) -> bool:
        """Whether it is."""
        return not self.judged or (self.ratio <= RATIO and (self.slope is None or self.slope <= SLOPE))

    @property
    def verdict(self) -> str:
        """For people."""
        if not self.judged:
            return "not judged"
        if self.flat:
            return "flat"
        grown = [f"{self.ratio:.2f} times the first tenth"] if self.ratio > RATIO else []
        if self.slope is not None and self.slope > SLOPE:
            grown.append(f"{self.slope:.2f} bytes per command")
        return "grew: " + ", ".join(grown)


def judge(samples: Sequence[Sample], timed: Sequence[Timed], seconds: float) -> tuple[Judged, ...]:
    """Judge a run.

    Args:
        samples: of the judged time and, with negative moments, of the warm-up, which does not count.
        timed: the probe's calls, alike.
        seconds: the judged time.

    Raises:
        ValueError: there are fewer than ten samples, or calls of a kind.
    """
    used = _tenths(samples, seconds)
    commands = [float(sample.commands) for tenth in used for sample in tenth]
    found = []
    for name, what in _USED.items():
        values = [[float(getattr(sample, name)) for sample in tenth] for tenth in used]
        slope = None
        if name in _BYTES and commands[-1] - commands[0] >= ENOUGH:
            slope = float(np.polyfit(commands, [value for tenth in values for value in tenth], 1)[0])
        unit = "bytes" if name in _BYTES else ""
        tenths = tuple(float(np.median(tenth)) for tenth in values)
        found.append(Judged(name=name, what=what, unit=unit, tenths=tenths, slope=slope))
    for kind, what in _CALLS.items():
        calls = _tenths([call for call in timed if call.kind == kind], seconds)
        tenths = tuple(float(np.quantile([call.seconds for call in tenth], 0.99)) for tenth in calls)
        found.append(Judged(name=kind, what=what, unit="s", tenths=tenths, judged=kind != "floor"))
    return tuple(found)


def _tenths(all_of_them: Sequence[_T], seconds: float) -> list[list[_T]]:
    """By count, not by time: while an agent is being restarted nothing is looked at, and a tenth may be short."""
    judged = [each for each in all_of_them if 0 <= each.moment < seconds]
    if len(judged) < TENTHS:
        raise ValueError(f"{len(judged)} samples cannot be cut into tenths: the run was too short")
    edges = [len(judged) * tenth // TENTHS for tenth in range(TENTHS + 1)]
    return [judged[low:high] for low, high in pairwise(edges)]


def _least(unit: str) -> float:
    return 1e-9 if unit == "s" else 1.0
