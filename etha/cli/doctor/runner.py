"""Checks, each in a throw-away child and under a deadline: one that hangs or dies is a result.

Children also show the box as it is for this process: they inherit its user, limits, namespaces, filters and
attributes. Few run at once, so that a low limit on descriptors is found, not suffered.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec

from etha.cli.doctor import throwaway
from etha.cli.doctor.finding import Finding, Gate

_PARALLEL: Final = 4
_GRACE_SECONDS: Final = 1.2
"""From SIGTERM, on which a check tidies up, to SIGKILL."""

Verdicts = Sequence[Finding]


class Check(NamedTuple):
    """Something to look at.

    Attributes:
        gate: named in the finding if the check itself fails.
        look: runs in a child; returns what it found.
        seconds: its deadline.
        if_dead: makes the finding where death means something; None where it does not.
    """

    gate: Gate
    look: Callable[[], Verdicts]
    seconds: float = 3.0
    if_dead: Callable[[str], Finding] | None = None


class _Running:
    """A check in its child."""

    def __init__(self, check: Check) -> None:
        self.check = check
        self.fd, writing = os.pipe()
        self.data = b""
        self.told_to_end = False
        try:
            self.pid = throwaway.fork(lambda: _examine(check, self.fd, writing))
        finally:
            os.close(writing)
        self.deadline = time.monotonic() + check.seconds

    def read(self) -> bool:
        """Take what it wrote; whether that is all. One line is: a grandchild may hold the pipe open."""
        chunk = os.read(self.fd, 1 << 16)
        self.data += chunk
        return not chunk or self.data.endswith(b"\n")

    def hurry(self) -> bool:
        """Its deadline has come: ask it to end, the second time make it. Whether it has ended."""
        if self.told_to_end:
            return True
        self.told_to_end = True
        self.deadline = time.monotonic() + _GRACE_SECONDS
        _signal(self.pid, signal.SIGTERM)
        return False

    def end(self) -> Verdicts:
        """Collect the child, with all of its group, and what it found."""
        os.close(self.fd)
        if not self.data.endswith(b"\n") and not self.told_to_end:
            status = os.waitpid(self.pid, 0)[1]
            _signal(-self.pid, signal.SIGKILL)
            return [self._dead(throwaway.obituary(status))]
        _signal(-self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        if self.told_to_end:
            return [self._failed(f"it did not end within {self.check.seconds:.0f} s")]
        return msgspec.json.decode(self.data, type=list[Finding])

    def _dead(self, how: str) -> Finding:
        if self.check.if_dead is not None:
            return self.check.if_dead(how)
        return self._failed(f"the process that tried it {how}")

    def _failed(self, seen: str) -> Finding:
        return self.check.gate.broken(
            seen,
            "whatever else of etha does the same ends the same way",
            "Run etha doctor again; if it stays so, report its whole output with the kernel's log (dmesg | tail).",
        )


def run(checks: Sequence[Check]) -> list[Finding]:
    """Every finding of every check, in the order of the checks."""
    waiting = deque(enumerate(checks))
    running: dict[int, tuple[int, _Running]] = {}
    found: dict[int, Verdicts] = {}
    try:
        while waiting or running:
            while waiting and len(running) < _PARALLEL:
                index, check = waiting.popleft()
                started = _Running(check)
                running[started.fd] = index, started
            _wait(running)
            for fd, (index, child) in list(running.items()):
                overdue = time.monotonic() > child.deadline
                if (_readable(fd) and child.read()) or (overdue and child.hurry()):
                    del running[fd]
                    found[index] = child.end()
    finally:
        _abandon([child for _, child in running.values()])
    return [finding for index in range(len(checks)) for finding in found[index]]


def _examine(check: Check, reading: int, writing: int) -> None:
    """The child's part."""
    os.setpgid(0, 0)
    os.close(reading)
    # What a library prints would tear the screen, and a terminal's Ctrl-C is the parent's matter.
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    try:
        findings = list(check.look())
    except Exception as error:  # noqa: BLE001 - that a check fails in a way nobody thought of is a result, too
        findings = [
            check.gate.broken(
                f"{type(error).__name__}: {error}",
                "the check could not be made; whatever else of etha does the same fails the same way",
                "Report the whole output of etha doctor.",
            )
        ]
    os.write(writing, msgspec.json.encode(findings) + b"\n")


def _wait(running: dict[int, tuple[int, _Running]]) -> None:
    poll = select.poll()
    for fd in running:
        poll.register(fd, select.POLLIN)
    first = min(child.deadline for _, child in running.values())
    poll.poll(max(0.0, first - time.monotonic()) * 1000 + 1)


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _abandon(children: list[_Running]) -> None:
    """Interrupted: end what still runs, and give it the time to tidy up."""
    for child in children:
        _signal(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    for child in children:
        while not os.waitpid(child.pid, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                _signal(-child.pid, signal.SIGKILL)
            time.sleep(0.01)
        _signal(-child.pid, signal.SIGKILL)
        os.close(child.fd)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
