"""`etha.tensor_bus.premises`: an agent deletes what agents made, and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Agent, Raised, Worker

from etha.errors import AgentRunning, InvalidArgument, UnsafePath, VersionMismatch
from etha.tensor_bus.agent import TensorBusAgent
from etha.tensor_bus.command_queue import CommandQueue
from etha.tensor_bus.ipc.process import boot_id
from etha.tensor_bus.lockfile import AgentLock
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.premises import Premises
from etha.tensor_bus.records import SCHEMA
from etha.tensor_bus.state import AGENT_KEY, AgentRecord, StateReader
from etha.tensor_bus.state_writer import StateWriter


def start(*arguments: str) -> str:
    command = [sys.executable, "-m", "etha", "agent", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_text_file_given_as_the_state_is_untouched(runtime: Path):
    notes = runtime / "notes.txt"
    notes.write_text("what I must not forget, and longer than the header of a page")
    notes.chmod(0o600)
    assert "UnsafePath" in start("--state", str(notes))
    assert notes.read_text().startswith("what I must not forget")
    assert os.listdir(runtime) == ["notes.txt"]


@pytest.mark.parametrize("name", ["socket", "writer", "command", "state"])
def test_each_file_is_known_by_its_kind(runtime: Path, name: str):
    paths = agent_paths(0)
    path = Path(getattr(paths, name))
    path.write_bytes(b"mine" * 100)
    path.chmod(0o600)
    with pytest.raises(UnsafePath) as caught:
        Premises(paths).clear()
    assert (caught.value.resource, caught.value.remedy is not None) == (str(path), True)
    assert path.read_bytes() == b"mine" * 100


@pytest.mark.parametrize("file", ["command", "state", "command-lock"])
def test_a_broken_beginning_is_set_aside_where_an_agent_was(runtime: Path, file: str):
    """Its lock file says so. Without that, or under another name, the file may be anybody's."""
    paths = agent_paths(0)
    CommandQueue(paths, create=True).close()
    StateWriter(paths.state).close()
    name = getattr(paths, file.removesuffix("-lock")) + ("-lock" if "-lock" in file else "")
    data = bytearray(Path(name).read_bytes())
    data[:24] = b"broken from the beginning"[:24]
    Path(name).write_bytes(data)
    with pytest.raises(UnsafePath):
        Premises(paths).take_over(None)
    assert Path(name).read_bytes() == data
    lock = AgentLock(paths.lock, 0, "cpu")
    assert Premises(paths).take_over(lock.text) is False
    lock.release(remove=True)
    assert Path(name + ".damaged").read_bytes() == data
    assert all(each.endswith(".damaged") for each in os.listdir(runtime))


def test_what_a_dead_agent_left_is_deleted(runtime: Path):
    paths = agent_paths(0)
    StateWriter(paths.state).close()
    Path(paths.command).touch(0o600)
    Path(paths.writer).touch(0o600)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(paths.socket)
    os.chmod(paths.socket, 0o600)
    Premises(paths).clear()
    assert os.listdir(runtime) == []


def test_the_state_of_a_live_agent_is_untouched(agent, owner, reader, runtime: Path):
    state = agent_paths(0).state
    before = os.stat(state).st_ino
    said = start("--rank", "1", "--state", state)
    assert "AgentRunning" in said
    assert f"pid {agent.pid}" in said
    assert os.stat(state).st_ino == before
    assert not [name for name in os.listdir(runtime) if name.startswith("agent_rank1")]
    owner.do("with policy.update(): pass")
    assert reader.do("with policy.read(min_version=1) as lease: version = lease.version\nversion") == 1


def test_the_slower_of_two_that_start_at_once_gives_way(runtime: Path):
    paths = agent_paths(0)
    writer = StateWriter(paths.state)
    writer.write({AGENT_KEY: AgentRecord(77, "b", 1, 1, 1, 0, "cpu", "c", 0.0, 0.0, {})})
    first, second = Premises(paths), Premises(paths)
    first.hold(paths.state)
    with pytest.raises(AgentRunning) as caught:
        second.hold(paths.state)
    assert caught.value.holder == "pid 77"
    with pytest.raises(AgentRunning):
        second.clear()
    writer.close()
    first.leave(remove=True)
    assert os.listdir(runtime) == []


@pytest.mark.parametrize("state", ["c", "c.sock", "c-lock", "c.agent", "link/c"])
def test_two_files_of_an_agent_are_never_one(runtime: Path, state: str, request):
    (runtime / "link").symlink_to(runtime)
    request.addfinalizer((runtime / "link").unlink)
    with pytest.raises(InvalidArgument) as caught:
        TensorBusAgent(0, "cpu", str(runtime / "c"), str(runtime / state))
    assert caught.value.remedy
    assert os.listdir(runtime) == ["link"]


def test_a_reader_opens_the_held_state_as_ever(agent, runtime: Path):
    reader = StateReader(agent_paths(0).state)
    assert reader.agent().pid == agent.pid
    reader.close()


# -- one of the two databases has gone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["command", "state"])
def test_what_is_left_of_a_pair_is_set_aside_while_somebody_counts_on_it(
    agent: Agent, owner: Worker, start_agent, runtime: Path, gone: str
):
    paths = agent_paths(0)
    agent.kill()
    agent.process.wait()
    owner.do("policy.publish()")  # committed, and so acknowledged
    lost, left = (paths.command, paths.state) if gone == "command" else (paths.state, paths.command)
    inode = os.stat(left).st_ino
    os.unlink(lost)
    said = start_agent().errors.read_text()
    assert os.stat(left + ".damaged").st_ino == inode
    assert not os.path.exists(lost + ".damaged")
    assert f"{lost} has gone" in said
    assert said.count("\n") == 1
    with pytest.raises(Raised, match=r"^StaleHandle:"):
        owner.do("with policy.update(timeout=20): pass")
    owner.do("client.close(); client = TensorBusClient(0)")
    owner.do("client.register_tensors('policy', {'weights': weights}).close()")


@pytest.mark.parametrize("gone", ["command", "state"])
def test_what_is_left_of_a_pair_goes_when_nobody_counts_on_it(
    agent: Agent, start_worker, start_agent, runtime: Path, gone: str
):
    worker = start_worker()
    agent.kill()
    agent.process.wait()
    worker.destroy()
    os.unlink(getattr(agent_paths(0), gone))
    successor = start_agent()
    assert successor.errors.read_text() == ""
    assert not [name for name in os.listdir(runtime) if name.endswith(".damaged")]


def test_a_lone_state_of_another_schema_is_untouched(runtime: Path):
    state = agent_paths(0).state
    writer = StateWriter(state)
    writer.write({AGENT_KEY: AgentRecord(77, boot_id(), 1, 1, SCHEMA + 1, 0, "cpu", "c", 0.0, 0.0, {})})
    writer.close()
    before = Path(state).read_bytes()
    with pytest.raises(VersionMismatch):
        TensorBusAgent(0)
    assert Path(state).read_bytes() == before
