"""Children that cannot outlive their parent, however it ends.

For processes without threads only: a check and all that it starts are such.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Final, NoReturn

from etha.tensor_bus.ipc import libc

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_HELD_BACK: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_SECONDS: Final = 0.01


def fork(body: Callable[[], object]) -> int:
    """Run ``body`` in a child, which exits with 0 if it returned.

    The kernel sends the child SIGTERM when this process dies, and keeps that across execve(2). SIGTERM unwinds the
    child's stack, so that its ``finally`` clauses run.

    Returns:
        The child's pid.
    """
    parent = os.getpid()
    # An exception of a signal's handler would be lost if it came while the hooks of os.fork() run.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid
    status = 1
    try:
        signal.signal(signal.SIGTERM, _leave)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == parent:  # else it died before the kernel was told
            body()
            status = 0
    except SystemExit:
        pass
    finally:
        os._exit(status)


def execute(command: list[str], *, stdout: int, stderr: int) -> int:
    """Start a program, as `fork` starts a function; its standard input is empty.

    Returns:
        Its pid.
    """

    def become() -> NoReturn:
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.execv(command[0], command)

    return fork(become)


def adopt_orphans() -> None:
    """Become the parent of what the children leave behind (torch's helper for shared memory detaches itself)."""
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_all(pids: list[int], seconds: float) -> None:
    """SIGTERM, a time of grace for them and for adopted orphans to end, SIGKILL; until no child is left."""
    for pid in pids:
        _kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not _reap():
            return
        time.sleep(_LOOK_SECONDS)
    for pid in {*pids, *_children()}:
        _kill(pid, signal.SIGKILL)
    while _reap():
        time.sleep(_LOOK_SECONDS)


def obituary(status: int) -> str:
    """How a process ended, by what waitpid(2) said of it."""
    code = os.waitstatus_to_exitcode(status)
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _reap() -> bool:
    """Whether a child is left, after all that have ended are collected."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []  # /proc of another PID namespace, or a kernel built without the file


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
