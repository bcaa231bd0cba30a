"""What is looked at, second by second, and each call of the probe."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The agent and its files at one moment.

    Attributes:
        moment: seconds since the judged time began; negative in the warm-up.
        commands: served since the run began, by the agents' own count as of their last heartbeat. What one served
            between that and its SIGKILL is missing.
        rss, private: bytes of the agent's memory: resident, and of those no other process's (``smaps_rollup``,
            ``Private_Clean`` and ``Private_Dirty``).
        descriptors, mappings: how many.
        command_file, state_file: bytes that are allocated to them (``st_blocks``).
        claims, outcomes: records of these kinds in the state LMDB.
        mistakes: of the agents' own, by their own count, as `commands`; each is a bug.
        cpu: seconds of processor time, of all agents together.
        load: as in ``uptime``, of one minute.
    """

    moment: float
    commands: int
    rss: int
    private: int
    descriptors: int
    mappings: int
    command_file: int
    state_file: int
    claims: int
    outcomes: int
    cpu: float
    load: float
    mistakes: int = 0


class Timed(msgspec.Struct, frozen=True, array_like=True):
    """One call of the probe: when it began, as `Sample.moment`, which kind, and seconds."""

    moment: float
    kind: str
    seconds: float


class Bin(msgspec.Struct, frozen=True, kw_only=True):
    """Some seconds of a run, for a file and a figure.

    Attributes:
        last: the last sample in it.
        p50, p99: of the probe's calls in it, by kind; seconds.
        calls: how many, by kind.
    """

    last: Sample
    p50: dict[str, float]
    p99: dict[str, float]
    calls: dict[str, int]


def bins(samples: Sequence[Sample], timed: Sequence[Timed], most: int = 120) -> tuple[Bin, ...]:
    """The run in at most ``most`` parts of equal length."""
    start, end = samples[0].moment, samples[-1].moment
    width = max((end - start) / most, 1e-9)
    found = []
    for number in range(most):
        low = start + number * width
        high = low + width if number < most - 1 else float("inf")
        seen = [sample for sample in samples if low <= sample.moment < high]
        if not seen:
            continue
        kinds: dict[str, list[float]] = {}
        for call in timed:
            if low <= call.moment < high:
                kinds.setdefault(call.kind, []).append(call.seconds)
        found.append(
            Bin(
                last=seen[-1],
                p50={kind: float(np.quantile(taken, 0.5)) for kind, taken in kinds.items()},
                p99={kind: float(np.quantile(taken, 0.99)) for kind, taken in kinds.items()},
                calls={kind: len(taken) for kind, taken in kinds.items()},
            )
        )
    return tuple(found)
