"""`etha.tensor_bus.front_door`: who comes in, by the kernel's word, before a byte is read."""

from __future__ import annotations

import errno
import logging
import os
import resource
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from etha.errors import SystemLimit
from etha.tensor_bus import clock, packets, wire
from etha.tensor_bus.front_door import FrontDoor
from etha.tensor_bus.sessions import Session

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@pytest.fixture
def path(runtime: Path) -> str:
    return str(runtime / "door.sock")


@pytest.fixture
def door(path: str) -> Iterator[FrontDoor]:
    door = FrontDoor(path)
    yield door
    door.close()


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)
    return sock


def admit(door: FrontDoor) -> list[Session]:
    assert select.select([door], [], [], 30)[0], "nobody came"
    return door.admit(clock.now())


CALLER = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.settimeout(30)
BEFORE
error = sock.connect_ex(sys.argv[1])
if error:
    sys.exit(error)
sock.send(b"bytes that are not to be read")
print("sent", flush=True)
try:
    print("told", sock.recv(1 << 16))
except ConnectionResetError:
    print("closed unread")  # what Linux says when the other end closes with something in its queue
"""


def caller(path: str, before: str = "") -> subprocess.Popen:
    code = CALLER.replace("BEFORE", before)
    return subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)


BECOME_NOBODY = f"os.setgid({NOBODY}); os.setuid({NOBODY})"


def test_who_comes_in_is_known(door: FrontDoor, path: str):
    assert os.stat(path).st_mode & 0o777 == 0o600
    with connect(path), caller(path) as process:
        sessions = admit(door)
        while len(sessions) < 2:
            sessions += admit(door)
        assert [session.peer.pid for session in sessions] == [os.getpid(), process.pid]
        assert {session.peer.uid for session in sessions} == {os.geteuid()}
        assert not any(session.client for session in sessions)
        assert not any(os.get_inheritable(session.sock.fileno()) for session in sessions)
        for session in sessions:
            session.close()
    assert door.refused == 0
    assert door.admit(clock.now()) == []


def test_a_crowd_comes_in_a_few_at_a_time(door: FrontDoor, path: str):
    crowd = [connect(path) for _ in range(40)]
    admitted = []
    while len(admitted) < len(crowd):
        some = admit(door)
        assert 0 < len(some) <= 16
        admitted += some
    assert door.admit(clock.now()) == []
    for each in (*admitted, *crowd):
        each.close()


@as_root
def test_another_user_is_refused_unread(door: FrontDoor, path: str, caplog: pytest.LogCaptureFixture):
    """Even where the file system would let it in: the kernel says who it is."""
    os.chmod(path, 0o666)
    os.chmod(os.path.dirname(path), 0o755)
    with caller(path, BECOME_NOBODY) as process:
        assert process.stdout.readline() == b"sent\n"
        with caplog.at_level(logging.WARNING):
            assert admit(door) == []
        assert process.stdout.readline() == b"closed unread\n"
    assert door.refused == 1
    assert f"uid {NOBODY}" in caplog.text
    assert f"pid {process.pid}" in caplog.text


@as_root
def test_modes_keep_another_user_out_too(door: FrontDoor, path: str):
    os.chmod(os.path.dirname(path), 0o755)
    with caller(path, BECOME_NOBODY) as process:
        assert process.wait() == errno.EACCES
    assert not select.select([door], [], [], 0)[0]


@as_root
@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare(1)")
def test_another_pid_namespace_is_told_why(path: str):
    """A door inside a namespace, a caller outside of it: to the one inside, the other has no pid."""
    code = f"""
import select, sys
from etha.tensor_bus import clock
from etha.tensor_bus.front_door import FrontDoor
door = FrontDoor({path!r})
print(flush=True)
select.select([door], [], [], 30)[0] or sys.exit("nobody came")
door.admit(clock.now()) == [] or sys.exit("somebody was let in")
print(door.refused, flush=True)
sys.stdin.read()
"""
    inside = ["unshare", "--pid", "--fork", sys.executable, "-c", code]
    with subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with connect(path) as sock:
            assert process.stdout.readline() == b"1\n"
            reply = packets.FROM_AGENT.decode(wire.receive(sock)[0])
            assert isinstance(reply, packets.Refused)
            assert (reply.number, reply.failure.leaf) == (0, "OtherNamespace")
            assert wire.receive(sock) == (b"", [])


def test_one_that_is_dead_already_is_refused_or_known_to_be(door: FrontDoor, path: str):
    """By kernel: the pidfd of a process that has been reaped can be had since Linux 6.16."""
    with caller(path) as process:
        assert process.stdout.readline() == b"sent\n"
        process.kill()
        process.wait()
        sessions = admit(door)
    assert len(sessions) + door.refused == 1
    for session in sessions:
        assert not session.peer.alive()
        session.close()


def test_a_door_that_cannot_be_made_is_a_typed_error(runtime: Path, path: str):
    Path(path).touch()
    for where in (path, str(runtime / "nowhere" / "sock")):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(SystemLimit) as caught:
            FrontDoor(where)
        assert caught.value.resource == where
        assert len(os.listdir("/proc/self/fd")) == before


def take_all_descriptors(taken: list[int]) -> None:
    while True:
        try:
            taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            return


def test_those_that_wait_go_on_waiting_when_descriptors_run_out(door: FrontDoor, path: str):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connect(path), connect(path):
        fillers = [os.open("/dev/null", os.O_RDONLY)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[0] + 8, hard))
        try:
            take_all_descriptors(fillers)
            with pytest.raises(SystemLimit) as caught:
                door.admit(clock.now())
            assert caught.value.resource == "RLIMIT_NOFILE"
        finally:
            for filler in fillers:
                os.close(filler)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        sessions = admit(door)
        assert len(sessions) == 2
        for session in sessions:
            session.close()
    assert door.refused == 0


def test_one_descriptor_for_two_costs_a_refusal_and_no_descriptor(door: FrontDoor, path: str):
    """The connection has one, its pidfd none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connect(path) as sock:
        fillers = [os.open("/dev/null", os.O_RDONLY)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[0] + 8, hard))
        try:
            take_all_descriptors(fillers)
            os.close(fillers.pop())
            assert door.admit(clock.now()) == []
            fillers.append(os.open("/dev/null", os.O_RDONLY))
        finally:
            for filler in fillers:
                os.close(filler)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert wire.receive(sock) == (b"", [])
    assert door.refused == 1
