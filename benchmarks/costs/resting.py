"""What an agent costs while nobody asks anything of it: processor time and disk writes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

from costs.bare import Store
from costs.pairing import Run
from costs.processes import Box, Helper, Talk, client
from costs.row import Budget, Row
from costs.spread import spread
from costs.tensors import parameters


def idle(run: Run) -> list[Row]:
    """A publication, a reader, and silence; beside a process that puts one record into an LMDB file every second."""
    seconds, rounds = (1.0, 2) if run.quick else (4.0, 8)
    with Box() as box, Helper(_beat, box.directory / "bare.lmdb") as floor:
        floor.hear()
        bus = client()
        publication = bus.register_tensors("policy", parameters(100))
        subscription = bus.subscribe("policy")
        time.sleep(1.0)  # the agent looks at a new owner's memory once
        files = [path for path in box.directory.iterdir() if path.suffix == ".lmdb"]
        looks = [_look(box.agent.pid, floor.pid, files)]
        for number in range(rounds):
            time.sleep(seconds)
            looks.append(_look(box.agent.pid, floor.pid, files))
            run.step((number + 1) / rounds)
        subscription.close()
        publication.close()
    return [
        _row("idle-cpu", "an idle agent's share of a core", "share", looks, Budget("value", 0.01, "< 1 %")),
        _row(
            "idle-writes",
            "an idle agent's disk writes",
            "bytes/s",
            looks,
            Budget("value", 65536.0, "none to speak of (≤ 64 KiB/s)"),
        ),
    ]


class _Look(NamedTuple):
    """A moment in seconds; and, for the agent and the floor, what each had used by then."""

    moment: float
    share: tuple[float, float]
    written: tuple[int, int]


def _look(agent: int, floor: int, files: list[Path]) -> _Look:
    """What was used until now. The files are written back first.

    The kernel counts a page as it becomes dirty, and again only once it has been written back: by itself up to half a
    minute later. So this counts more than an agent alone would cause, never less.
    """
    for path in files:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    return _Look(time.monotonic(), (cpu_seconds(agent), cpu_seconds(floor)), (_written(agent), _written(floor)))


def _row(name: str, what: str, unit: str, looks: list[_Look], budget: Budget) -> Row:
    """What was used per second between each look and the next. No ratio: the floor may have used nothing."""

    def rates(side: int) -> list[float]:
        used = [look.share[side] if unit == "share" else float(look.written[side]) for look in looks]
        return [
            (after - before) / (late.moment - early.moment)
            for before, after, early, late in zip(used, used[1:], looks, looks[1:], strict=False)
        ]

    return Row(
        name=name,
        what=what,
        unit=unit,
        etha=spread(rates(0)),
        floor=spread(rates(1)),
        floor_is="one LMDB put a second",
        budget=budget,
        samples=len(looks) - 1,
        rounds=len(looks) - 1,
        more={"seconds": looks[-1].moment - looks[0].moment},
    )


def cpu_seconds(pid: int) -> float:
    """Processor time of all threads, in seconds, to the nanosecond (proc_pid_schedstat(5): the first field)."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) * 1e-9


def _written(pid: int) -> int:
    """Bytes that it caused to be written to a disk (proc_pid_io(5), ``write_bytes``: counted as pages get dirty)."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("write_bytes:")).split()[1])


def _beat(talk: Talk, path: Path) -> None:
    store = Store(path)
    talk.say(os.getpid())
    while not talk.waiting():
        time.sleep(1.0)
        store.put()
