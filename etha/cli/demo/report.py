"""What a run of the demo showed, and whether that is what it must show."""

from __future__ import annotations

import math
from typing import Final

import msgspec

ACCURACY_GOAL: Final = 0.97


class Latency(msgspec.Struct, frozen=True):
    """Of one operation, in microseconds."""

    count: int
    median_us: float
    p99_us: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The demo's result: what ``--json`` prints."""

    ok: bool
    """The exit status is 0."""
    failures: tuple[str, ...]
    """Why not, one sentence each."""
    sabotage: bool
    """The evaluator read without leases, and torn reads are what the run must show."""
    device: str
    backend: str
    """The agent's backend, and why this one."""
    steps: int
    seconds: float
    """From the first line to the last event."""
    trainer_pid: int
    evaluator_pid: int
    agent_pid: int
    accuracy: float
    """On the test set, of the last read."""
    versions_published: int
    """Version 0, as registered, not counted."""
    versions_read: int
    """Distinct versions that the evaluator read whole, version 0 counted."""
    reads: int
    torn: int
    bytes_shared: int
    """Registered, stamps included."""
    bytes_copied: int
    """As `etha.cli.demo.copied` defines it."""
    trainer_inodes: tuple[int, ...]
    """Under the registered tensors, by the trainer's /proc/PID/maps."""
    evaluator_inodes: tuple[int, ...]
    """The same, by the evaluator's."""
    box_shmem_growth: int
    """Raw, in bytes; other programs of the box included."""
    own_shmem_growth: int
    """Raw, in bytes, of the three processes."""
    update_enter: Latency | None
    """Entering ``update``: waits until the evaluator's lease ends."""
    publish: Latency | None
    """Leaving ``update``: publishes."""
    read: Latency | None
    """From when a version is both written and asked for, to the lease in hand. None: no leases."""


class Curves(msgspec.Struct, frozen=True):
    """The points behind the report, for the plot."""

    accuracy: tuple[tuple[int, float], ...]
    """(version, accuracy), in the order of reading."""
    publish_us: tuple[float, ...]
    read_us: tuple[float, ...]


def latency(samples: tuple[float, ...]) -> Latency | None:
    """Median and p99 (nearest rank) of ``samples``, in µs; None without any."""
    if not samples:
        return None
    ordered = sorted(samples)

    def quantile(share: float) -> float:
        return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 1)

    return Latency(len(ordered), quantile(0.5), quantile(0.99))


def failures(
    *,
    sabotage: bool,
    accuracy: float,
    torn: int,
    bytes_copied: int,
    ended_badly: tuple[str, ...],
) -> tuple[str, ...]:
    """What a run did not show that it must; empty: exit status 0.

    A sabotaged run must show torn reads, and nothing else: that is the proof that the stamp in a
    normal run would have seen one.
    """
    found = [f"{name} ended badly" for name in ended_badly]
    if sabotage:
        if torn == 0:
            found.append("the sabotage went unseen: reads without leases, and no stamp differed")
        return tuple(found)
    if accuracy < ACCURACY_GOAL:
        found.append(f"accuracy {accuracy:.3f} is below {ACCURACY_GOAL} (too few --steps?)")
    if torn:
        found.append(f"{torn} reads were torn under a lease")
    if bytes_copied:
        found.append(f"{bytes_copied} bytes were copied")
    return tuple(found)
