"""`etha.tensor_bus.subscription`: a reader that follows its owner's memory, by several threads and agents."""

from __future__ import annotations

import signal
import time

import pytest
from harness import Raised, Worker

from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.state import ClaimRecord, StateReader

PATIENCE = 60.0


def raises(kind: str):
    return pytest.raises(Raised, match=f"^{kind}:")


def maps(worker: Worker, inode: int) -> int:
    with open(f"/proc/{worker.pid}/maps") as lines:
        return sum(line.split()[4] == str(inode) for line in lines)


def until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline


def test_that_it_unmapped_is_told_to_the_next_agent_too(agent, owner: Worker, reader: Worker, start_agent):
    """The agent dies with the reader's word unread in its socket."""
    inode = owner.do("os.fstat(weights.untyped_storage()._share_fd_cpu_()[0]).st_ino")
    reader.say("policy.read(min_version=1, timeout=50).version")
    state = StateReader(agent_paths(0).state)

    def claimed(kind: str) -> bool:
        return any(claim.kind == kind for claim in state.all(ClaimRecord).values())

    until(lambda: claimed("lease"))
    reader.kill(signal.SIGSTOP)
    owner.say("policy.suspend(timeout=40)")
    until(lambda: claimed("suspend"))
    heartbeat = state.agent().heartbeat
    until(lambda: state.agent().heartbeat > heartbeat)  # so it has asked the reader, too
    state.close()
    agent.kill(signal.SIGSTOP)
    reader.kill(signal.SIGCONT)
    until(lambda: maps(reader, inode) == 0)
    agent.kill()
    agent.process.wait()
    start_agent()
    owner.hear()
    owner.do("policy.resume()")
    assert reader.hear() == 1
