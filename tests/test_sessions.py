"""`etha.tensor_bus.sessions`: one worker's connection, and what a worker can do to it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator

import pytest

from etha.errors import InvalidRecord
from etha.tensor_bus import packets, sessions, wire
from etha.tensor_bus.ipc.peer import Peer
from etha.tensor_bus.records import Failure
from etha.tensor_bus.sessions import Session


@pytest.fixture
def ends() -> Iterator[tuple[Session, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    session = Session(ours, Peer.of(ours), 0.0)
    yield session, theirs
    session.close()
    theirs.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_bell_is_the_write_end_of_a_pipe_and_nothing_else(ends, tmp_path):
    session, _ = ends
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read, write = os.pipe()
    others = [
        os.dup(read),
        os.eventfd(0),
        os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR),
        os.open(fifo, os.O_PATH),
        os.open(fifo, os.O_RDWR),
    ]
    for number, fd in enumerate(others):
        with pytest.raises(InvalidRecord):
            session.add_bell(number, fd)
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)
        session.ring(number)
    session.add_bell(9, write)
    session.ring(9)
    session.ring(9)
    assert os.read(read, 9) == b"\1"
    os.close(read)
    session.ring(9)
    assert session._bells == {}


def test_a_bell_that_fails_for_any_reason_is_taken_down(ends, monkeypatch):
    session, _ = ends
    read, write = os.pipe()
    session.add_bell(1, write)

    def fail(*_):
        raise OSError(errno.EIO, "fails")

    monkeypatch.setattr(fcntl, "ioctl", fail)
    session.ring(1)
    assert session._bells == {}
    os.close(read)


def test_a_worker_that_does_not_read_is_cut_before_it_takes_all_descriptors(ends):
    session, _ = ends
    read, write = os.pipe()
    before = descriptors()
    for _ in range(10_000):
        session.send(packets.Descriptors(1, 0), [read] * packets.FDS_PER_PACKET)
        if session.stuck:
            break
    assert session.stuck
    assert descriptors() - before <= 3000
    session.hang_up()
    assert descriptors() < before
    os.close(read)
    os.close(write)


def test_to_be_out_of_descriptors_cuts_the_connection_and_ends_nothing_else(ends, monkeypatch):
    session, _ = ends
    while not session.backlog:
        session.send(packets.Imported(1, 1, 1, 1))
    before = descriptors()

    def none_left(*_):
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(fcntl, "fcntl", none_left)
    session.send(packets.Descriptors(1, 0), [0, 1])
    assert session.stuck
    assert descriptors() == before


def test_a_failure_of_any_length_arrives(ends):
    session, theirs = ends
    session.send(packets.Refused(7, Failure("DeadlockError", "m" * 10**6, "r", "h" * 10**6, None)))
    session.send(packets.Outcome(8, 1, Failure("NameTaken", "m" * 10**5, "r" * 10**5), 8))
    refused = packets.FROM_AGENT.decode(wire.receive(theirs)[0])
    assert (refused.number, refused.failure.leaf, refused.failure.resource) == (7, "DeadlockError", "r")
    assert refused.failure.message.startswith("mmm")
    assert packets.FROM_AGENT.decode(wire.receive(theirs)[0]).sequence == 8
    assert not session.stuck


def test_a_reply_that_cannot_be_sent_cuts_the_connection(ends, monkeypatch):
    session, theirs = ends

    def fail(*_):
        raise OSError(errno.EMSGSIZE, "too long")

    with monkeypatch.context() as patch:
        patch.setattr(sessions.wire, "send", fail)
        session.send(packets.Descriptors(1, 0))
    assert session.stuck
    session.send(packets.Imported(1, 1, 1, 1))
    with pytest.raises(BlockingIOError):  # what would have come behind it makes no sense without it
        wire.receive(theirs)


def test_descriptors_on_their_way_are_waited_for_beside_epoll(ends, monkeypatch):
    session, _ = ends
    sent = wire.send

    def choke(*_):
        raise BlockingIOError(errno.ETOOMANYREFS, "too many references")

    monkeypatch.setattr(sessions.wire, "send", choke)
    session.send(packets.Imported(1, 1, 1, 1))
    session.flush()
    assert session.choked
    monkeypatch.setattr(sessions.wire, "send", sent)
    session.flush()
    assert not session.choked
    assert session.backlog == 0
