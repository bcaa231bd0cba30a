"""How much is done for one lease, publish, update, registration and closing, in numbers that no other load changes.

``python benchmarks/counts.py`` prints, for the worker that calls and for the agent, per operation: Python functions
called, bytecodes executed, calls into C, and system calls by name (with strace; left out where there is none). Where
`latency.py` says how long something takes, this says why, and whether a change has made it less.

An agent's heartbeats are counted too, and their share is taken off by what an idle second has counted.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Final

import typer
from costs.processes import Box, Helper, Talk, client
from costs.tensors import parameters

from etha.tensor_bus.agent import TensorBusAgent

OPERATIONS: Final = ("lease", "publish", "update", "register", "close")
_KINDS: Final = ("functions", "bytecodes", "calls into C")
_SLOTS: Final = {"call": 0, "opcode": 1, "c_call": 2}
_REST: Final = 0.05
"""Seconds until the agent has done what nobody waits for: what it heard unanswered, and a look at an owner's memory."""


class Counts:
    """What one process has executed since it began to count. In memory that it shares with its parent."""

    def __init__(self) -> None:
        self._numbers = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    def begin(self) -> None:
        """Count in this thread, and in every thread that it starts."""
        threading.setprofile(self._profile)
        threading.settrace(self._trace)
        sys.setprofile(self._profile)
        sys.settrace(self._trace)

    def read(self) -> list[int]:
        """One number per kind."""
        return list(self._numbers[: len(_KINDS)])

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        slot = _SLOTS.get(event)
        if slot is not None:
            self._numbers[slot] += 1

    def _trace(self, frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        if event == "opcode":
            self._numbers[_SLOTS[event]] += 1
        else:
            frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._trace


def _work(talk: Talk, counts: Counts | None) -> None:
    """A worker: does what it is told, as often as it is told, and says how many seconds it took."""
    bus = client()
    tensors = parameters(1)
    published = bus.register_tensors("own", tensors)
    subscription = client().subscribe("policy")
    names = (f"number {number}" for number in itertools.count())
    made = []

    def lease() -> None:
        with subscription.read():
            pass

    def update() -> None:
        with published.update():
            pass

    operations: dict[str, Callable[[], object]] = {
        "lease": lease,
        "publish": published.publish,
        "update": update,
        "register": lambda: made.append(bus.register_tensors(next(names), tensors)),
        "close": lambda: made.pop().close(),
    }
    if counts is not None:
        counts.begin()
    talk.say("ready")
    while True:
        name, times = talk.hear()
        started = time.monotonic()
        for _ in range(times):
            operations[name]()
        talk.say(time.monotonic() - started)


def _own(talk: Talk) -> None:
    publication = client().register_tensors("policy", parameters(1))
    talk.say(publication.version)
    talk.hear()


def _serve(talk: Talk, counts: Counts) -> None:
    agent = TensorBusAgent(0)
    counts.begin()
    agent.run(lambda: talk.say("serves"))


@contextmanager
def _counted() -> Iterator[tuple[Helper, Counts, Counts]]:
    """A worker and an agent that count; and an owner."""
    worker_counts, agent_counts = Counts(), Counts()
    with tempfile.TemporaryDirectory(prefix="etha-counts-") as directory:
        os.environ["ETHA_RUNTIME_DIR"] = directory
        with Helper(_serve, agent_counts) as agent:
            agent.hear()
            with Helper(_own) as owner, Helper(_work, worker_counts) as worker:
                owner.hear()
                worker.hear()
                yield worker, worker_counts, agent_counts


def calls(times: int) -> dict[str, dict[str, list[float]]]:
    """Operation to side to one number per kind, per operation."""
    with _counted() as (worker, worker_counts, agent_counts):
        before = agent_counts.read()
        time.sleep(2.0)
        idle = [(after - first) / 2.0 for after, first in zip(agent_counts.read(), before, strict=True)]
        found = {}
        for name in OPERATIONS:
            worker.ask((name, 2 if name not in ("register", "close") else 1))
            time.sleep(_REST)
            own, agents, started = worker_counts.read(), agent_counts.read(), time.monotonic()
            worker.ask((name, times - (name == "close")))
            time.sleep(_REST)
            seconds = time.monotonic() - started
            found[name] = {
                "worker": [(a - b) / times for a, b in zip(worker_counts.read(), own, strict=True)],
                "agent": [
                    (a - b - rate * seconds) / times
                    for a, b, rate in zip(agent_counts.read(), agents, idle, strict=True)
                ],
            }
        return found


class Strace:
    """Counts the system calls of a running process, by name. A context manager; `calls` afterwards."""

    def __init__(self, pid: int) -> None:
        self.calls: dict[str, int] = {}
        self._summary = Path(os.environ["ETHA_RUNTIME_DIR"], f"calls of {pid}")
        command = ["strace", "-f", "-c", "-U", "name,calls", "-o", str(self._summary), "-p", str(pid)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> Strace:
        while "attached" not in self._process.stderr.readline():
            if self._process.poll() is not None:
                raise RuntimeError("strace may not look at our own child; see: etha doctor")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.stderr.close()
        self._process.wait()
        rows = re.findall(r"^(\w+)\s+(\d+)$", self._summary.read_text(), re.MULTILINE)
        self.calls = {name: int(number) for name, number in rows if name != "total"}
        self._summary.unlink()


def system_calls(times: int) -> dict[str, dict[str, dict[str, float]]]:
    """Operation to side to name of the system call to how many per operation; of those that are not rare."""
    found = {}
    with Box() as box, Helper(_own) as owner, Helper(_work, None) as worker:
        owner.hear()
        worker.hear()
        for name in OPERATIONS:
            with Strace(box.agent.pid) as agents, Strace(worker.pid) as own:
                worker.ask((name, times))
                time.sleep(_REST)
            found[name] = {
                side: {call: number / times for call, number in each.calls.items() if number / times > 0.3}
                for side, each in (("worker", own), ("agent", agents))
            }
    return found


def counts(times: Annotated[int, typer.Option(help="How often each operation is done.", min=2)] = 100) -> None:
    """Print how much is done for one lease, publish, update, registration and closing, on either side."""
    traced = system_calls(times) if shutil.which("strace") else {}
    print(f"{'operation':<10}{'side':<8}" + "".join(f"{kind:>14}" for kind in _KINDS) + "  system calls")
    for name, sides in calls(times).items():
        for side, numbers in sides.items():
            by_name = traced.get(name, {}).get(side, {})
            names = ", ".join(f"{call} {each:.1f}" for call, each in sorted(by_name.items(), key=lambda row: -row[1]))
            row = "".join(f"{number:>14.1f}" for number in numbers)
            print(f"{name:<10}{side:<8}{row}  {sum(by_name.values()):.1f}: {names}")


if __name__ == "__main__":
    typer.run(counts)
