"""Two processes share a tensor end to end, and if they cannot, the step that failed is named.

An agent and the two processes of `exchange` are started in a directory of their own, inside the runtime directory if
that can be used, so that its file system is tried too. All of it is gone afterwards.
"""

from __future__ import annotations

import os
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from etha.cli.doctor import throwaway
from etha.cli.doctor.exchange import DONE, KINDS, Step
from etha.cli.doctor.finding import Finding, Gate
from etha.cli.doctor.runner import Check
from etha.errors import InvalidArgument
from etha.tensor_bus.paths import agent_paths, runtime_directory

_SECONDS: Final = 6.5
_GRACE_SECONDS: Final = 0.9
_TAIL: Final = 300

_WHAT: Final = "an agent, an owner and a reader share 1 KiB of host memory"
SECTION: Final = "processes"
_ALL: Final = Gate(SECTION, "sharing", _WHAT)


def checks() -> list[Check]:
    """One examination, a finding for each kind of handle."""
    return [Check(_ALL, _look, _SECONDS + _GRACE_SECONDS + 0.3)]


def judge(steps: list[Step], how: str, log: str) -> list[Finding]:
    """What the steps that were told say.

    Args:
        steps: in the order in which they were told.
        how: how the telling ended.
        log: the last words on stderr.
    """
    return [_judge(kind, [step for step in steps if step.kind in (None, kind)], how, log) for kind in KINDS]


def _judge(kind: str, steps: list[Step], how: str, log: str) -> Finding:
    gate = Gate(SECTION, f"sharing by {kind}", f"{_WHAT}, torch's strategy {kind}")
    if {step.who for step in steps if step.kind == kind and step.what == DONE} == {"owner", "reader"}:
        return gate.ok("registered, mapped, read, updated in place, read again, closed", "host memory is shared")
    failed = next((step for step in steps if step.failure), None)
    last = failed or (steps[-1] if steps else Step("owner", None, "start"))
    why = last.failure or f"{how}. {log}".strip()
    seen = f'the {last.who} failed at "{last.what}": {why}'
    if failed is None and last.what == "import torch" and how == _TOO_SLOW:
        return gate.degraded(
            seen,
            "nothing is known of sharing: torch was not there in time",
            "Run it again: torch is in the page cache now.",
        )
    remedy = "Mend what is named above first; if nothing is, report the whole output of etha doctor."
    if "No module named 'torch'" in why:
        remedy = "pip install torch"
    return gate.broken(seen, f"no publication can be shared by {kind}", remedy)


_TOO_SLOW: Final = f"no answer within {_SECONDS:.0f} s"


def _look() -> list[Finding]:
    throwaway.adopt_orphans()
    with _directory() as directory:
        # torch's helper for shared memory makes a directory there, and should it be killed, leaves it.
        os.environ["TMPDIR"] = directory
        log = os.path.join(directory, "log")
        pids: list[int] = []
        with open(log, "wb") as stderr:
            try:
                steps, how = _exchange(directory, stderr.fileno(), pids)
            finally:
                throwaway.end_all(pids, _GRACE_SECONDS)
        with open(log, errors="replace") as file:
            return judge(steps, how, file.read()[-_TAIL:])


def _exchange(directory: str, stderr: int, pids: list[int]) -> tuple[list[Step], str]:
    files = [os.path.join(directory, "c"), os.path.join(directory, "s")]
    arguments = ["--rank", "0", "--command-queue", files[0], "--state", files[1]]
    pids.append(throwaway.execute([sys.executable, "-m", "etha", "agent", *arguments], stdout=stderr, stderr=stderr))
    reading, writing = os.pipe()
    program = [sys.executable, "-m", "etha.cli.doctor.exchange", *files]
    pids.append(throwaway.execute(program, stdout=writing, stderr=stderr))
    os.close(writing)
    data, in_time = _read_all(reading, time.monotonic() + _SECONDS)
    os.close(reading)
    steps = [msgspec.json.decode(line, type=Step) for line in data.split(b"\n")[:-1]]
    if not in_time:
        return steps, _TOO_SLOW
    return steps, throwaway.obituary(os.waitpid(pids.pop(), 0)[1])


def _read_all(fd: int, deadline: float) -> tuple[bytes, bool]:
    """Everything until the end of file, and whether that came before the deadline."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    data = b""
    while True:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return data, False
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            return data, True
        data += chunk


@contextmanager
def _directory() -> Iterator[str]:
    directory = _make_directory()
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


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
