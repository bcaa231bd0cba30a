"""Something happens to a process at the K-th of its system calls, from outside, with strace(1).

strace attaches to a process that is ready and counts from there, each thread and each kind of call for itself. So a
step is the k-th call of a kind, written ``pwrite64:2``. A process that is killed there dies in the first thread that
comes to it, before the kernel carries the call out. All kinds with k = 1, 2, 3, ... are all steps of what the process
is asked to do.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import select
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from harness import PATIENCE

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace(1): apt-get install strace")


class Injected:
    """While it is entered, something happens at ``step``; the process is only watched where that is None.

    Attributes:
        fired: whether it has happened; set by whoever waits for it.
        steps: once it is left, by kind, how many calls the busiest thread of the process began.
        failed: once it is left, how many calls were given an error.
        log: what strace tells, while it is entered.
    """

    def __init__(self, pid: int, step: str | None, directory: Path, what: str) -> None:
        """``what`` happens is strace's: ``signal=SIGSTOP``, ``error=EMFILE``."""
        self.fired = False
        self.steps: dict[str, int] = {}
        self.failed = 0
        self.log = directory / f"strace-{pid}"
        self._pid = pid
        self._inject: list[str] = []
        if step is not None:
            kind, k = step.split(":")
            self._inject = ["-e", f"inject={kind}:{what}:when={k}"]
        self._strace: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        self._strace = subprocess.Popen(
            ["strace", "-f", "-o", str(self.log), "-e", "trace=all", *self._inject, "-p", str(self._pid)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        ready, _, _ = select.select([self._strace.stderr], [], [], PATIENCE)
        line = self._strace.stderr.readline().decode() if ready else ""
        if "attached" not in line:
            self.__exit__(None, None, None)
            raise RuntimeError(f"strace did not attach to {self._pid}: {line}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._strace.poll() is None:
            self._strace.send_signal(signal.SIGINT)  # it detaches
        self._strace.wait(PATIENCE)
        self._strace.stderr.close()
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        self.failed = sum("(INJECTED)" in line for line in lines)
        begun = Counter(match.groups() for line in lines if (match := re.match(r"(\d+) +(\w+)\(", line)))
        for (_, kind), count in begun.items():
            self.steps[kind] = max(self.steps.get(kind, 0), count)
        self.log.unlink(missing_ok=True)


class KilledAt(Injected):
    """While it is entered, the process dies at ``step``, or is only watched where that is None."""

    def __init__(self, pid: int, step: str | None, directory: Path) -> None:
        super().__init__(pid, step, directory, "signal=SIGKILL")


def died(pidfd: int, seconds: float) -> bool:
    """Whether the process ends within this time."""
    return bool(select.select([pidfd], [], [], seconds)[0])


def sample(steps: dict[str, int], count: int) -> list[str]:
    """Some steps of these, by a seed that is printed. ``ETHA_K=recvmsg:2`` asks for this one instead."""
    if "ETHA_K" in os.environ:
        return os.environ["ETHA_K"].split(",")
    every = [f"{kind}:{k}" for kind, most in sorted(steps.items()) for k in range(1, most + 1)]
    seed = int(os.environ.get("ETHA_SEED", random.randrange(1 << 20)))
    chosen = random.Random(seed).sample(every, min(count, len(every)))
    print(f"ETHA_SEED={seed}: of {len(every)} steps: {chosen}")
    return chosen


def sweep(steps: dict[str, int], play: Callable[[str], bool]) -> int:
    """``play`` every step, each kind's until a run is untouched; how many kills that were."""
    kills = 0
    for kind in sorted(steps):
        for k in itertools.count(1):
            if not play(f"{kind}:{k}"):
                break
            kills += 1
    return kills
