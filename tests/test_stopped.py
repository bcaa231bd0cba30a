"""Rows 2, 6, 7, 10 and the later half of 25: an agent or a worker that is stopped, and children that are forked.

A stopped process is no dead one: nothing of it is taken, others are told who stands still, and all is well after
SIGCONT.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from box import Box, until
from harness import Raised


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    box = Box("stopped", tmp_path_factory.mktemp("stopped"))
    yield box
    os.kill(box.agent.pid, signal.SIGCONT)
    assert box.close() == ""


@pytest.fixture(scope="module")
def standing(box):
    """An owner and a reader that live through the module: what is tested must leave them as they were."""
    owner = box.worker("import gc\nx = shared(); policy = client.register_tensors('policy', {'x': x})")
    reader = box.worker("policy = client.subscribe('policy')")
    return owner, reader


@pytest.fixture
def owner(box, standing):
    yield standing[0]
    until(lambda: box.claims("policy") == [])
    assert standing[0].do("poll_wins(policy)") is True
    assert box.publications() == {"policy"}


@pytest.fixture
def reader(owner, standing):
    return standing[1]


@pytest.fixture
def stopped(box, owner, reader):
    """The agent, stopped for the test."""
    stop(box.agent.pid)
    yield box.agent
    os.kill(box.agent.pid, signal.SIGCONT)


def stop(pid: int) -> None:
    """SIGSTOP, and the wait until it has taken effect."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def raises(kind: str):
    return pytest.raises(Raised, match=f"^{kind}:")


TIMED = """
def timed(call):
    started = time.monotonic()
    try:
        call()
    except etha.errors.EthaError as error:
        return type(error).__name__, time.monotonic() - started, error.holder
    return None, time.monotonic() - started, None
"""


def times_out(worker, call: str, timeout: float, holder: int) -> None:
    """The call is told within its deadline, a tenth (at least 0.1 s) more, and what this box needs to say so."""
    kind, took, named = worker.do(TIMED + f"timed(lambda: {call})")
    assert kind == "AgentTimeout"
    assert timeout <= took <= timeout + max(0.1, timeout * 0.1) + 0.5, took
    assert f"pid {holder} " in named


# -- the agent ----------------------------------------------------------------------------------------


def test_what_times_out_while_the_agent_stands_still_leaves_nothing(box, owner, reader):
    held = memory(box.agent.pid)
    stop(box.agent.pid)
    for timeout in (0, 0.3, 2.0):
        times_out(reader, f"policy.read(timeout={timeout})", timeout, box.agent.pid)
    times_out(reader, "client.subscribe('policy', timeout=0.3)", 0.3, box.agent.pid)
    times_out(owner, "write_once(policy, 0.3)", 0.3, box.agent.pid)
    times_out(owner, "client.register_tensors('late', {'x': shared()}, timeout=0.3)", 0.3, box.agent.pid)
    times_out(owner, "policy.close(timeout=0.3)", 0.3, box.agent.pid)
    version = owner.do("policy.version")
    assert owner.do("[policy.publish() for _ in range(1000)][-1]") == version + 1000
    os.kill(box.agent.pid, signal.SIGCONT)
    # Answered in the order of the queue: so everything above has been served when this is.
    assert owner.do("len(policy.readers()), poll_wins(policy)") == (1, True)
    assert box.publications() == {"policy"}
    assert reader.do("with policy.read(timeout=5) as w: v = w.version\nv") >= version + 1000
    until(lambda: memory(box.agent.pid) <= held)


def test_a_late_registration_is_no_longer_pinned_once_it_is_cancelled(box, stopped, owner):
    owner.do("import weakref; late = shared(); pin = weakref.ref(late)")
    times_out(owner, "client.register_tensors('late', {'late': late}, timeout=0.1)", 0.1, stopped.pid)
    owner.do("del late; gc.collect()")
    assert owner.do("pin() is None") is False
    os.kill(stopped.pid, signal.SIGCONT)
    # One call hears that it was cancelled, and the next lets go.
    owner.do("poll_wins(policy); client.subscribe('policy').close(); gc.collect()")
    assert owner.do("pin() is None") is True


def test_a_lease_that_was_held_is_held_after_and_one_given_back_meanwhile_is_gone(box, owner, reader):
    reader.do("kept, given = policy.read(), policy.read()")
    stop(box.agent.pid)
    reader.do("given.release()")
    assert reader.do("kept['x'].sum().item()") == 0
    os.kill(box.agent.pid, signal.SIGCONT)
    until(lambda: len(box.claims("policy")) == 1)
    reader.do("kept.check(); kept.release()")


def test_a_new_client_is_told_that_the_agent_is_stopped(stopped, owner):
    with raises("AgentStopped") as raised:
        owner.do("bootstrap_client(connection_timeout=0.3)")
    assert f"pid {stopped.pid} " in raised.value.holder


def memory(pid: int) -> tuple[int, int]:
    """Descriptors and shared mappings of a process."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return len(os.listdir(f"/proc/{pid}/fd")), sum("/dev/shm" in line or "/torch_" in line for line in maps)


# -- a worker that holds the queue --------------------------------------------------------------------


def test_a_worker_stopped_with_the_queue_in_hand(box, owner, reader):
    neighbour = box.worker("leases = [client.subscribe('policy').read()]; turn = client._link.queue._turn")
    neighbour.say("turn.during(lambda: os.kill(os.getpid(), signal.SIGSTOP), 1e9)")
    until(lambda: Path(f"/proc/{neighbour.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    before = owner.do("policy.version")
    times_out(owner, "client.register_tensors('late', {'x': shared()}, timeout=0.5)", 0.5, neighbour.pid)
    times_out(owner, "policy.close(timeout=0.5)", 0.5, neighbour.pid)
    owner.do("client._link.patience = 0.5")
    times_out(owner, "policy.publish()", 0.5, neighbour.pid)
    # Claims go on: they do not need the queue. So do deaths, and the heartbeat.
    assert reader.do("with policy.read(timeout=5) as w: v = w.version\nv") == before
    doomed = box.worker("lease = client.subscribe('policy').read()")
    until(lambda: len(box.claims("policy")) == 2)
    doomed.kill()
    until(lambda: len(box.claims("policy")) == 1)
    beat = box.state.agent().heartbeat
    until(lambda: box.state.agent().heartbeat > beat)
    # An update that can be entered but not left: the version is torn, and the agent hears of it later.
    owner.say("policy.update(timeout=20, on_timeout='raise').__enter__()")
    until(lambda: box.claims("policy", granted=False))
    assert not owner.heard()
    os.kill(neighbour.pid, signal.SIGCONT)
    neighbour.hear()
    neighbour.do("leases.pop().release()")
    owner.hear()
    owner.do("gc.collect()")
    with raises("TornError"):
        reader.do("policy.read(timeout=5)")
    assert owner.do("client._link.patience = 20.0\nwrite_once(policy)") == before + 1
    assert reader.do("with policy.read(timeout=5) as w: v = w.version\nv") == before + 1
    assert neighbour.end() == 0


def test_an_update_that_cannot_be_left_is_torn_and_mended_by_the_next(box, owner, reader):
    neighbour = box.worker("turn = client._link.queue._turn")
    owner.do("client._link.patience = 0.3; update = enter_update(policy)")
    neighbour.say("turn.during(lambda: os.kill(os.getpid(), signal.SIGSTOP), 1e9)")
    until(lambda: Path(f"/proc/{neighbour.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    times_out(owner, "leave_update(update)", 0.3, neighbour.pid)
    os.kill(neighbour.pid, signal.SIGCONT)
    neighbour.hear()
    version = owner.do("client._link.patience = 20.0\nwrite_once(policy)")
    assert reader.do("with policy.read(timeout=5) as w: v = w.version\nv") == version
    assert neighbour.end() == 0


def test_a_stopped_reader_keeps_its_lease_and_is_named(box, owner, reader):
    reader.do("lease = policy.read()")
    stop(reader.pid)
    with raises("LeaseTimeout") as raised:
        owner.do("write_once(policy, 0.5)")
    assert f"pid {reader.pid} " in raised.value.holder
    os.kill(reader.pid, signal.SIGCONT)
    reader.do("lease.check(); lease.release()")


# -- forked children ----------------------------------------------------------------------------------

FORK = """
import io, traceback
def forked(calls):
    '''What each call comes to in a forked child, and how the child ended.'''
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        told = []
        for call in calls:
            try:
                call()
                told.append('nothing')
            except BaseException as error:
                told.append(type(error).__name__)
        os.write(theirs, repr(told).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, 'rb') as pipe:
        told = eval(pipe.read())
    return told, os.waitpid(child, 0)[1]
"""


def test_a_forked_child_can_use_nothing_and_takes_nothing(owner, reader):
    reader.do(FORK + "lease = policy.read(); bell = policy.fileno()")
    told, status = reader.do(
        "forked([lambda: client.subscribe('policy'), lambda: client.register_tensors('y', {}), policy.read,"
        " policy.fileno, lambda: next(iter(policy)), lambda: lease['x'], lease.check, lambda: list(lease),"
        " lambda: lease.copy_into({}), lambda: lease.wanted])"
    )
    assert (told, status) == (["ForkedClient"] * 10, 0)
    told, status = reader.do("forked([lease.release, policy.close, client.close])")
    assert (told, status) == (["nothing"] * 3, 0)
    owner.do(FORK)
    told, status = owner.do(
        "forked([policy.publish, policy.readers, policy.close, policy.update().__enter__, lambda: write_once(policy)])"
    )
    assert (told, status) == (["ForkedClient"] * 5, 0)
    # The parents have lost nothing by it.
    assert reader.do("lease.check(); v = lease['x'].sum().item(); lease.release(); v") == 0
    assert owner.do("write_once(policy) == policy.version") is True


PARENT = """
import os, signal, sys, torch
from etha import bootstrap_client
client, _ = bootstrap_client()
weights = torch.zeros(8).share_memory_()
own = client.register_tensors("of a parent", {"x": weights})
policy = client.subscribe("policy")
lease = policy.read()
update = own.update()
update.__enter__()
child = os.fork()
if child == 0:
    ENDING
_, status = os.waitpid(child, 0)
lease.check()
try:
    own.update(timeout=0).__enter__()
except Exception as error:
    print(type(error).__name__, status)
update.__exit__(None, None, None)
policy.read(timeout=0).release()
lease.release()
client.close()
"""


@pytest.mark.parametrize(
    ("ending", "status"), [("sys.exit(0)", 0), ("os.kill(os.getpid(), signal.SIGKILL)", int(signal.SIGKILL))]
)
def test_a_child_that_ends_first_leaves_the_parent_what_it_holds(box, owner, reader, ending, status):
    """And neither says a word: an interpreter that ends in a child must not touch what the parent has."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PARENT.replace("ENDING", ending)],
        env=box.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stderr, done.returncode, done.stdout) == ("", 0, f"LeaseTimeout {status}\n")
    until(lambda: box.publications() == {"policy"})


def test_a_killed_reader_frees_the_owner_while_its_forked_child_lives(box, owner):
    reader = box.worker("policy = client.subscribe('policy'); leases = [policy.read() for _ in range(100)]")
    child = reader.do("child = os.fork()\nif child == 0: signal.pause()\nchild")
    owner.say("write_once(policy, 20)\ntime.clock_gettime(time.CLOCK_MONOTONIC)")
    until(lambda: box.claims("policy", granted=False))
    killed = time.monotonic()
    reader.kill()
    try:
        assert owner.hear() - killed < 0.5
        os.kill(child, 0)  # it still lives
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)  # an orphan of our worker is ours: see `zygote`
