"""Two processes share a tensor end to end, and if they cannot, the step that failed is named.

An agent and the two processes of `exchange` are started in a directory of their own, inside the runtime directory if
that can be used, so that its file system is tried too. All of it is gone afterwards.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import tempfile
import time
from typing import Final, NamedTuple

import msgspec

from etha.cli.doctor import throwaway
from etha.cli.doctor.exchange import DONE, KINDS, Step
from etha.cli.doctor.finding import Finding, Gate
from etha.cli.doctor.runner import Check
from etha.errors import InvalidArgument
from etha.tensor_bus.paths import agent_paths, runtime_directory

_SECONDS: Final = 7.2
_GRACE_SECONDS: Final = 0.9
_STEP_SECONDS: Final = 3.0
"""A step that takes longer than this hangs; one that was begun later was only not given its time."""

_START: Final = Step("owner", None, "start")
_SLOW: Final = (_START.what, "import torch")
"""Steps whose length is the disk's, not a gate's."""

_TAIL: Final = 300
_SUN_PATH_MAX: Final = 107
_SOCKET_OF_TORCH: Final = 40
"""Bytes that torch's helper for shared memory adds to TMPDIR for its socket, whose path has 107 at most."""

_WHAT: Final = "an agent, an owner and a reader share 1 KiB of host memory"
SECTION: Final = "processes"
_ALL: Final = Gate(SECTION, "sharing", _WHAT)


def checks() -> list[Check]:
    """One examination, a finding for each kind of handle."""
    return [Check(_ALL, _look, _SECONDS + _GRACE_SECONDS + 0.2)]


class Ended(NamedTuple):
    """How the telling of steps ended.

    Attributes:
        how: how the process that told them did; None if it had to be ended.
        silence: seconds that nothing had been told, until then.
        log: last words on stderr.
    """

    how: str | None
    silence: float
    log: str


def judge(steps: list[Step], ended: Ended) -> list[Finding]:
    """What the steps that were told, in their order, say of each kind of handle."""
    return [_judge(kind, [step for step in steps if step.kind in (None, kind)], ended) for kind in KINDS]


def _judge(kind: str, steps: list[Step], ended: Ended) -> Finding:
    gate = Gate(SECTION, f"sharing by {kind}", f"{_WHAT}, torch's strategy {kind}")
    if {step.who for step in steps if step.kind == kind and step.what == DONE} == {"owner", "reader"}:
        return gate.ok("registered, mapped, read, updated in place, read again, closed", "host memory is shared")
    failed = next((step for step in steps if step.failure), None)
    last = failed or (steps[-1] if steps else _START)
    if failed is None and ended.how is None and (ended.silence < _STEP_SECONDS or last.what in _SLOW):
        return gate.degraded(
            f'after {_SECONDS:.0f} s the {last.who} was at "{last.what}"',
            "nothing is known of sharing: the box was too slow",
            "Run etha doctor again: torch is in the page cache now.",
        )
    why = last.failure or f"{ended.how or f'it hung for {ended.silence:.0f} s'}. {ended.log}".strip()
    remedy = "Mend what is named above first; if nothing is, report the whole output of etha doctor."
    if "No module named 'torch'" in why:
        remedy = "pip install torch"
    seen = f'the {last.who} failed at "{last.what}": {why}'
    return gate.broken(seen, f"no publication can be shared by {kind}", remedy)


def _look() -> list[Finding]:
    throwaway.adopt_orphans()
    # The SIGTERM that ends this check would come between making the directory and being ready to remove it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    try:
        directory = _make_directory()
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return _look_in(directory)
        finally:
            shutil.rmtree(directory)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _look_in(directory: str) -> list[Finding]:
    # torch's helper for shared memory makes a directory there, and should it be killed, leaves it.
    if len(os.fsencode(directory)) + _SOCKET_OF_TORCH < _SUN_PATH_MAX:
        os.environ["TMPDIR"] = directory
    log = os.path.join(directory, "log")
    pids: list[int] = []
    with open(log, "wb") as stderr:
        try:
            steps, how, silence = _exchange(directory, stderr.fileno(), pids)
        finally:
            throwaway.end_all(pids, _GRACE_SECONDS)
    with open(log, errors="replace") as file:
        return judge(steps, Ended(how, silence, file.read()[-_TAIL:]))


def _exchange(directory: str, stderr: int, pids: list[int]) -> tuple[list[Step], str | None, float]:
    files = [os.path.join(directory, "c"), os.path.join(directory, "s")]
    arguments = ["--rank", "0", "--command-queue", files[0], "--state", files[1]]
    pids.append(throwaway.execute([sys.executable, "-m", "etha", "agent", *arguments], stdout=stderr, stderr=stderr))
    reading, writing = os.pipe()
    program = [sys.executable, "-m", "etha.cli.doctor.exchange", *files]
    pids.append(throwaway.execute(program, stdout=writing, stderr=stderr))
    os.close(writing)
    data, silence, whole = _read_all(reading, time.monotonic() + _SECONDS)
    os.close(reading)
    steps = [msgspec.json.decode(line, type=Step) for line in data.split(b"\n")[:-1]]
    return steps, throwaway.obituary(os.waitpid(pids.pop(), 0)[1]) if whole else None, silence


def _read_all(fd: int, deadline: float) -> tuple[bytes, float, bool]:
    """What came until the end of file or the deadline, how long ago the last of it, and whether that was all."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    data, heard = b"", time.monotonic()
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            return data, time.monotonic() - heard, True
        data, heard = data + chunk, time.monotonic()
    return data, time.monotonic() - heard, False


def _make_directory() -> str:
    for place in (runtime_directory(), tempfile.gettempdir()):
        try:
            directory = tempfile.mkdtemp(prefix="etha-doctor-", dir=place)
        except OSError:
            continue
        try:
            agent_paths(0, os.path.join(directory, "c"), os.path.join(directory, "s"))
        except InvalidArgument:
            os.rmdir(directory)
            continue
        return directory
    raise OSError(f"no directory can be made in {runtime_directory()} or {tempfile.gettempdir()}")
