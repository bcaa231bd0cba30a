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


REBIND = "weights = torch.ones(1024).share_memory_(); policy.rebind({'weights': weights})"


def test_one_that_is_closed_while_it_maps_anew_keeps_nothing(owner: Worker, reader: Worker):
    reader.do("""
from etha.tensor_bus import subscription
Mapped = subscription.Mapped
def made(*arguments):
    mapped = Mapped(*arguments)
    closing = threading.Thread(target=policy.close)
    closing.start(); closing.join()
    return mapped
""")
    owner.do(REBIND)
    reader.do("subscription.Mapped = made")
    with raises("LeaseReleased"):
        reader.do("policy.read()")
    reader.do("subscription.Mapped = Mapped; client.subscribe('policy').close()")
    owner.do("policy.close(timeout=5)")  # the reader has the object still


def test_a_read_beside_one_that_maps_anew_goes_on(owner: Worker, reader: Worker):
    """The import that it asks through is given back before its request comes."""
    owner.do(REBIND)
    reader.do("""
request = client._link.request
def late(*arguments):
    client._link.request = request
    other = threading.Thread(target=lambda: policy.read().release())
    other.start(); other.join()
    return request(*arguments)
client._link.request = late
""")
    assert reader.do("with policy.read() as w: v = w['weights'][5].item()\nv") == 1.0


def test_a_lease_has_its_tensors_whoever_maps_anew_beside_it(owner: Worker, reader: Worker):
    reader.do("""
again = policy._map_again
def late(asked):
    made = again(asked)
    policy._mapped.end()  # as another thread does that maps anew
    return made
policy._map_again = late
""")
    owner.do(REBIND)
    assert reader.do("lease = policy.read(); lease['weights'][5].item()") == 1.0
    reader.do("lease.release()")
