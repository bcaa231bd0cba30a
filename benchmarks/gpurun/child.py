"""A process with a deadline. What is not done by then is asked to stop, then killed, with all that it left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

GRACE: Final = 15.0
"""Seconds from SIGINT, at which pytest writes down what it has, to SIGKILL; taken from the end of the time allowed."""

_DRIVER_SECONDS: Final = 20.0
"""How long the driver may hold a process that was killed."""

_PR_SET_CHILD_SUBREAPER: Final = 36


class Ran(NamedTuple):
    """How it ended.

    Attributes:
        status: ``"ended"``, or ``"out of time"``.
        exit_status: as `subprocess` says it; None where even SIGKILL has not ended it yet.
        seconds: that it took.
        said: on stdout and stderr.
    """

    status: str
    exit_status: int | None
    seconds: float
    said: str


def become_reaper() -> None:
    """Have the orphans of this process's children become its own, so that `run` can end them (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run(command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str], directory: Path) -> Ran:
    """Run a command; after it nothing of it is left. `become_reaper` comes first.

    Args:
        command: and its arguments.
        seconds: allowed, what it takes to end it included.
        log: where stdout and stderr go, while it runs.
        environment: its own.
        directory: its working directory.
    """
    began = time.monotonic()
    status = "ended"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(environment), cwd=directory
        )
        try:
            process.wait(max(1.0, seconds - min(GRACE, seconds / 2)))
        except subprocess.TimeoutExpired:
            status = "out of time"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(GRACE, seconds / 2))
        finally:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold it for a while
                process.wait(_DRIVER_SECONDS)
            _end_descendants()
    return Ran(status, process.returncode, round(time.monotonic() - began, 2), log.read_text(errors="replace"))


def _end_descendants() -> None:
    """Kill and reap until there are none: each death may bring orphans."""
    deadline = time.monotonic() + _DRIVER_SECONDS
    while (left := list(_descendants(os.getpid()))) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)


def _descendants(pid: int) -> Iterator[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # proc_pid_stat(5): the name, in brackets, may hold anything; the parent is the second field behind it.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    wanted = [pid]
    while wanted:
        for child in parents.get(wanted.pop(), []):
            yield child
            wanted.append(child)
