"""`etha.tensor_bus.wire` and `sessions`: packets with descriptors, and a worker that does not read."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from etha.errors import InvalidRecord
from etha.tensor_bus import clock, packets, wire
from etha.tensor_bus.ipc.peer import Peer
from etha.tensor_bus.packets import FDS_PER_PACKET, MAX_PACKET_BYTES
from etha.tensor_bus.sessions import Session

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def fd() -> Iterator[int]:
    """A descriptor with an identity."""
    fd = os.memfd_create("sent")
    yield fd
    os.close(fd)


@pytest.fixture
def few_descriptors():
    """This process may open eight more, wherever its table of descriptors has holes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 10, hard))
    fillers: list[int] = []

    def fill() -> None:
        while True:
            fillers.append(os.open("/dev/null", os.O_RDONLY))

    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        fill()
    for _ in range(8):
        os.close(fillers.pop())
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for filler in fillers:
        os.close(filler)


# -- packets -----------------------------------------------------------------------------------------------------------


def test_packets_keep_their_bounds(pair):
    ours, theirs = pair
    sent = [b"x", b"y" * 10_000, b"z"]
    for data in sent:
        wire.send(ours, data)
    assert [wire.receive(theirs) for _ in sent] == [(data, []) for data in sent]
    with pytest.raises(BlockingIOError):
        wire.receive(theirs)


def test_descriptors_arrive_close_on_exec_and_as_many_as_fit(pair, fd):
    ours, theirs = pair
    wire.send(ours, b"x", [fd] * FDS_PER_PACKET)
    _, arrived = wire.receive(theirs)
    assert len(arrived) == FDS_PER_PACKET
    assert {os.fstat(number).st_ino for number in arrived} == {os.fstat(fd).st_ino}
    assert not any(os.get_inheritable(number) for number in arrived)
    wire.close_all(arrived)
    with pytest.raises(OSError, match="Invalid argument"):
        wire.send(ours, b"x", [fd] * (FDS_PER_PACKET + 1))


def test_a_peer_that_does_not_read_is_not_waited_for(pair, fd):
    ours, theirs = pair

    def send_until_full() -> None:
        for number in itertools.count():
            wire.send(ours, b"%d" % number)

    with pytest.raises(BlockingIOError):
        send_until_full()
    with pytest.raises(BlockingIOError):
        wire.send(ours, b"x", [fd])
    assert wire.receive(theirs) == (b"0", [])
    wire.send(ours, b"y")


def test_a_peer_that_is_gone(pair):
    ours, theirs = pair
    wire.send(theirs, b"last words")
    theirs.close()
    assert wire.receive(ours) == (b"last words", [])
    assert wire.receive(ours) == (b"", [])
    with pytest.raises(ConnectionError):
        wire.send(ours, b"x")


def test_a_packet_that_is_too_long_is_refused_and_its_descriptors_closed(pair, fd):
    ours, theirs = pair
    wire.send(ours, bytes(MAX_PACKET_BYTES))
    assert len(wire.receive(theirs)[0]) == MAX_PACKET_BYTES
    before = descriptors()
    wire.send(ours, bytes(MAX_PACKET_BYTES + 1), [fd])
    with pytest.raises(InvalidRecord):
        wire.receive(theirs)
    assert descriptors() == before
    wire.send(ours, b"next")
    assert wire.receive(theirs) == (b"next", [])


def test_more_descriptors_than_may_be_opened_are_refused_and_none_is_kept(pair, fd, few_descriptors):
    ours, theirs = pair
    wire.send(ours, b"x", [fd] * 20)
    before = descriptors()
    with pytest.raises(InvalidRecord) as caught:
        wire.receive(theirs)
    assert "RLIMIT_NOFILE" in caught.value.remedy
    assert descriptors() == before


@as_root
def test_too_many_descriptors_on_their_way_are_back_pressure():
    """``ETOOMANYREFS`` is for users who are not root."""
    code = """
import os, resource, socket
from etha.tensor_bus import wire
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
os.setgid(65534)
os.setuid(65534)
sent = 0
try:
    while True:
        wire.send(ours, b"x", [0] * 20)
        sent += 1
except BlockingIOError as error:
    if error.errno != 109:
        raise
if not 1 < sent < 10:
    raise SystemExit(f"{sent} were sent")
wire.close_all(wire.receive(theirs)[1])
wire.send(ours, b"x", [0] * 20)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


# -- sessions ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def session(pair) -> Iterator[Session]:
    ours, _ = pair
    session = Session(ours, Peer.of(ours), clock.now())
    yield session
    session.close()


def fill(session: Session) -> int:
    """Send until the first packet has to wait; how many there were."""
    number = 0
    while not session.backlog:
        number += 1
        session.send(packets.MayWrite(number, 0, 1))
    return number


def numbers(sock: socket.socket) -> Iterator[int]:
    while select.select([sock], [], [], 0)[0]:
        yield packets.FROM_AGENT.decode(wire.receive(sock)[0]).number


def test_what_has_no_room_waits_in_order(session: Session, pair, fd):
    last = fill(session)
    before = descriptors()
    session.send(packets.Descriptors(last + 1, 0), [fd, fd])
    session.send(packets.MayWrite(last + 2, 0, 1))
    assert session.backlog == 3
    assert descriptors() == before + 2
    assert list(numbers(pair[1])) == list(range(1, last))
    session.flush()
    assert session.backlog == 0
    assert descriptors() == before
    assert packets.FROM_AGENT.decode(wire.receive(pair[1])[0]).number == last
    data, arrived = wire.receive(pair[1])
    assert packets.FROM_AGENT.decode(data).number == last + 1
    assert [os.fstat(number).st_ino for number in arrived] == [os.fstat(fd).st_ino] * 2
    wire.close_all(arrived)
    assert list(numbers(pair[1])) == [last + 2]


def test_a_worker_that_never_reads_is_stuck_at_a_bound(session: Session):
    last = fill(session)
    while not session.stuck:
        session.send(packets.MayWrite(last, 0, 1))
    assert session.backlog < 10_000


def test_descriptors_that_wait_are_bounded(session: Session, fd):
    """A reader that asks again and again and never reads must not take all of the agent's."""
    fill(session)
    before = descriptors()
    for _ in range(100):
        session.send(packets.Descriptors(1, 0), [fd] * FDS_PER_PACKET)
        if session.stuck:
            break
    assert session.stuck
    assert descriptors() - before < 3_000
    session.hang_up()
    assert descriptors() < before


def test_an_agent_without_descriptors_lets_the_worker_go(session: Session, fd, few_descriptors):
    fill(session)
    before = descriptors()
    session.send(packets.Descriptors(1, 0), [fd] * 20)
    assert session.stuck
    assert descriptors() == before


def test_a_worker_that_is_gone_is_no_error(session: Session, pair):
    fill(session)
    pair[1].close()
    session.flush()
    session.send(packets.MayWrite(1, 0, 1))
    assert session.backlog == 0
    session.hang_up()
    session.send(packets.MayWrite(1, 0, 1))
    session.flush()
    assert session.sock is None
    assert session.peer.alive()


# -- bells -------------------------------------------------------------------------------------------------------------


def test_rings_are_coalesced(session: Session):
    read, write = os.pipe2(os.O_NONBLOCK)
    session.add_bell(1, write)
    session.ring(2)
    assert not select.select([read], [], [], 0)[0]
    for _ in range(1000):
        session.ring(1)
    assert os.read(read, 100) == b"\1"
    session.ring(1)
    assert os.read(read, 100) == b"\1"
    os.close(read)


def test_a_bell_goes_with_its_import_its_connection_and_its_listener(session: Session):
    before = descriptors()
    pipes = [os.pipe() for _ in range(4)]
    for number, (_, write) in enumerate(pipes):
        session.add_bell(min(number, 2), write)
    assert descriptors() == before + 7, "the fourth takes the place of the third"
    session.remove_bell(0)
    os.close(pipes[1][0])
    session.ring(1)
    assert descriptors() == before + 4
    session.hang_up()
    for index in (0, 2, 3):
        os.close(pipes[index][0])
    assert descriptors() == before - 1


def useless(kind: str, tmp_path: Path) -> int:
    if kind == "read end":
        read, write = os.pipe()
        os.close(write)
        return read
    if kind == "eventfd":
        return os.eventfd(0)
    if kind == "socket":
        ours, theirs = socket.socketpair()
        theirs.close()
        return ours.detach()
    if kind == "file":
        return os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    return os.open({"null": "/dev/null", "directory": tmp_path}[kind], os.O_RDONLY)


@pytest.mark.parametrize("kind", ["read end", "eventfd", "socket", "file", "null", "directory"])
def test_what_is_no_pipe_to_write_to_is_no_bell(session: Session, tmp_path: Path, kind: str):
    """The loop rings it: it must not fail there, nor wait."""
    before = descriptors()
    with pytest.raises(InvalidRecord):
        session.add_bell(1, useless(kind, tmp_path))
    session.ring(1)
    assert descriptors() == before
