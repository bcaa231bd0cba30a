"""`etha.tensor_bus.reach`: why nobody answers, each reason by its own name."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from harness import Agent

from etha.errors import (
    AgentError,
    AgentStopped,
    InvalidArgument,
    InvalidRecord,
    NoAgent,
    OtherNamespace,
    OtherUser,
    UnsafePath,
    VersionMismatch,
)
from etha.tensor_bus import clock, packets, wire
from etha.tensor_bus.client import TensorBusClient
from etha.tensor_bus.ipc import process
from etha.tensor_bus.lockfile import AgentLock, LockText, read_lock
from etha.tensor_bus.paths import AgentPaths, agent_paths
from etha.tensor_bus.reach import reach
from etha.tensor_bus.records import SCHEMA, encode

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")


@pytest.fixture
def paths(runtime: Path) -> AgentPaths:
    return agent_paths(0)


def refused(leaf: type[AgentError], paths: AgentPaths, timeout: float = 0.0) -> AgentError:
    """The error that `reach` raises, which must be of this leaf, a `ConnectionError`, and leave nothing open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(leaf) as caught:
        reach(paths, 0, timeout)
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.remedy
    assert len(os.listdir("/proc/self/fd")) == before
    return caught.value


def rewrite(paths: AgentPaths, **fields: object) -> LockText:
    """The live agent's lock file, with other words in it."""
    text = read_lock(paths.lock).text
    Path(paths.lock).write_bytes(msgspec.json.encode(msgspec.structs.replace(text, **fields)))
    return text


# -- it answers --------------------------------------------------------------------------------------------------------


def test_a_connection_is_authenticated(agent: Agent, paths: AgentPaths):
    connection, text = reach(paths, 0, clock.MAX_TIMEOUT)
    assert connection.agent.pid == text.pid == agent.pid
    assert connection.epoch == text.epoch
    assert len(connection.client) == 16
    connection.close()


def test_an_agent_that_starts_later_is_waited_for(paths: AgentPaths, start_agent: Callable[..., Agent]):
    started = threading.Thread(target=start_agent)
    started.start()
    connection, _ = reach(paths, 0, 30)
    connection.close()
    started.join()


# -- nobody does -------------------------------------------------------------------------------------------------------


def test_absent(paths: AgentPaths):
    error = refused(NoAgent, paths)
    assert error.resource == paths.command
    assert "etha agent --rank 0" in error.remedy
    began = clock.now()
    refused(NoAgent, paths, 0.2)
    assert 0.15 <= clock.now() - began < 1.2
    with pytest.raises(InvalidArgument):
        reach(paths, 0, -1)


def test_dead(agent: Agent, paths: AgentPaths):
    agent.kill()
    agent.process.wait()
    error = refused(NoAgent, paths)
    assert error.holder == f"pid {agent.pid}"
    assert "is dead" in error.message


def test_stopped(agent: Agent, paths: AgentPaths):
    agent.kill(signal.SIGSTOP)
    os.waitid(os.P_PID, agent.pid, os.WSTOPPED | os.WNOWAIT)
    began = clock.now()
    error = refused(AgentStopped, paths, 0.3)
    assert 0.25 <= clock.now() - began < 1.3
    assert error.holder.startswith(f"pid {agent.pid} ")
    assert "(stopped)" in error.message
    assert f"kill -CONT {agent.pid}" in error.remedy
    agent.kill(signal.SIGCONT)
    reach(paths, 0, 30)[0].close()


def test_starting(paths: AgentPaths):
    lock = AgentLock(paths.lock, 0, "cpu")
    error = refused(AgentStopped, paths)
    assert error.holder.startswith(f"pid {os.getpid()} ")
    os.truncate(paths.lock, 0)
    assert "starting" in refused(NoAgent, paths).message
    lock.release(remove=True)


def test_a_backlog_that_is_full(paths: AgentPaths):
    lock = AgentLock(paths.lock, 0, "cpu")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(paths.socket)
        door.listen(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
            first.connect(paths.socket)
            refused(AgentStopped, paths)
    lock.release(remove=True)


@as_root
def test_other_user_by_its_file(agent: Agent, paths: AgentPaths):
    """Its words are not even read."""
    before = Path(paths.lock).read_bytes()
    Path(paths.lock).write_bytes(b"{")
    os.chown(paths.lock, NOBODY, NOBODY)
    began = clock.now()
    error = refused(OtherUser, paths, 20)
    assert clock.now() - began < 5
    assert (error.resource, error.holder) == (paths.lock, f"uid {NOBODY}")
    os.chown(paths.lock, 0, 0)
    Path(paths.lock).write_bytes(before)


DOOR = f"""
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.bind(sys.argv[1])
if sys.argv[2:]:
    os.setuid({NOBODY})
sock.listen()
print(flush=True)
theirs, _ = sock.accept()
print(theirs.recv(1000) if sys.argv[2:] else theirs.close(), flush=True)
sock.accept()
"""


@contextmanager
def listening(paths: AgentPaths, *arguments: str) -> Iterator[subprocess.Popen]:
    """Something that is no agent, at an agent's socket."""
    with subprocess.Popen([sys.executable, "-c", DOOR, paths.socket, *arguments], stdout=subprocess.PIPE) as door:
        try:
            door.stdout.readline()
            yield door
        finally:
            door.kill()


@as_root
def test_other_user_by_the_kernels_word(paths: AgentPaths):
    """A file that says it is ours, and a listener that is not: it does not get one byte."""
    lock = AgentLock(paths.lock, 0, "cpu")
    with listening(paths, "nobody") as door:
        error = refused(OtherUser, paths, 20)
        assert door.stdout.readline() == b"b''\n"
    assert error.holder == f"uid {NOBODY}"
    lock.release(remove=True)


def test_one_that_hangs_up_is_no_more_than_one_that_does_not_answer(paths: AgentPaths):
    lock = AgentLock(paths.lock, 0, "cpu")
    with listening(paths):
        refused(AgentStopped, paths)
    refused(AgentStopped, paths)
    lock.release(remove=True)


def test_a_listener_that_died_and_left_its_socket_to_a_child(paths: AgentPaths):
    """There is someone to connect to, and it is not whom the kernel names."""
    lock = AgentLock(paths.lock, 0, "cpu")
    code = DOOR.split("theirs, _")[0].replace("print(", "print() if os.fork() else sys.stdin.read() or print(")
    with subprocess.Popen(
        [sys.executable, "-uc", code, paths.socket], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as door:
        door.stdout.readline()
        door.wait()
        refused(AgentStopped, paths)
        door.stdin.close()
        assert door.stdout.read() == b"\n", "it still listened"
    lock.release(remove=True)


# -- one that can never be talked to -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [SCHEMA - 1, SCHEMA + 1])
def test_another_schema_says_both_and_at_once(agent: Agent, paths: AgentPaths, schema: int):
    state = Path(paths.state).read_bytes()
    rewrite(paths, schema=schema)
    began = clock.now()
    error = refused(VersionMismatch, paths, 20)
    assert clock.now() - began < 5
    assert f"schema {schema}" in error.message
    assert str(SCHEMA) in error.message.split(str(schema), 1)[1]
    assert agent.process.poll() is None
    assert len(Path(paths.state).read_bytes()) == len(state)


@pytest.mark.parametrize("hello", [{"schema": SCHEMA + 1}, {"namespace": 1}, {"boot": "another"}], ids=str)
def test_an_agent_refuses_a_worker_that_is_of_another_world(agent: Agent, paths: AgentPaths, hello: dict):
    """Both sides look: the worker at the file, the agent at the greeting."""
    greeting = packets.Hello(SCHEMA, process.boot_id(), process.pid_namespace())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(30)
        sock.connect(paths.socket)
        sock.send(encode(msgspec.structs.replace(greeting, **hello)))
        reply = packets.FROM_AGENT.decode(sock.recv(1 << 16))
        assert isinstance(reply, packets.Refused)
        assert reply.failure.leaf == ("VersionMismatch" if "schema" in hello else "OtherNamespace")
        assert reply.failure.remedy
        assert wire.receive(sock)[0] == b""


def test_another_namespace_by_its_file(agent: Agent, paths: AgentPaths):
    rewrite(paths, namespace=1)
    error = refused(OtherNamespace, paths, 20)
    assert error.holder == f"pid {agent.pid} there"


@as_root
@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare(1)")
def test_another_namespace_for_real(agent: Agent, paths: AgentPaths):
    code = """
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.reach import reach
try:
    reach(agent_paths(0), 0, 20)
except ConnectionError as error:
    print(type(error).__name__, error.holder)
"""
    inside = ["unshare", "--pid", "--fork", sys.executable, "-c", code]
    done = subprocess.run(inside, capture_output=True, text=True, check=True)
    assert done.stdout == f"OtherNamespace pid {agent.pid} there\n"


def test_a_foreign_boot_is_dead_whoever_holds_the_lock(agent: Agent, paths: AgentPaths):
    """Its pids are others' by now, so nobody is asked to stop pid 1."""
    rewrite(paths, boot="00000000-0000-4000-8000-000000000000", pid=1)
    assert "is dead" in refused(NoAgent, paths).message


def test_what_no_agent_wrote(paths: AgentPaths, runtime: Path):
    Path(paths.lock).write_text("{}")
    with pytest.raises(InvalidRecord):
        reach(paths, 0, 0)
    os.unlink(paths.lock)
    os.symlink("/etc/passwd", paths.lock)
    with pytest.raises(UnsafePath):
        reach(paths, 0, 20)


def test_a_client_that_cannot_open_the_files_leaves_nothing_open(agent: Agent, paths: AgentPaths):
    os.rename(paths.state, paths.state + ".away")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NoAgent):
        TensorBusClient(0, connection_timeout=1)
    assert len(os.listdir("/proc/self/fd")) == before
    os.rename(paths.state + ".away", paths.state)
    TensorBusClient(0).close()
