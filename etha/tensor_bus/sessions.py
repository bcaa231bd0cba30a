"""The agent's end of one worker's connection: who it is, what waits to be sent, what it has sent.

A session outlives its socket: when a connection ends and the process lives, its pidfd is still watched, and only
death (or a goodbye) ends it. A worker that does not read is not waited for: what cannot be sent at once is kept up to
a bound, then the connection is cut.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import termios
from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Final

import msgspec

from etha.errors import InvalidRecord
from etha.tensor_bus import packets, wire
from etha.tensor_bus.ipc.peer import Peer
from etha.tensor_bus.records import Failure, encode

_MAX_BACKLOG: Final = 4096
"""Packets kept for a worker that does not read: more than one per request that its socket can hold."""

_MAX_WAITING_FDS: Final = 2048
"""Descriptors kept with them: eight packets full."""

_LONGEST_TEXT: Final = 4096
"""Characters of each text of a failure whose packet would be too long: that of a circle grows with the circle."""


class Session:
    """One connection and the process behind it.

    Attributes:
        peer: the process.
        client: its client id; empty until it has said hello.
        served: its last served command.
        since: ``CLOCK_BOOTTIME`` seconds of the connection.
        sock: None once the connection has ended.
        choked: the backlog waits for other descriptors to arrive, not for room: ``epoll`` will not say when.
        failed: the agent can keep no order with this worker any more; its connection is to be cut.
        leaving: it has said, through the queue, that it holds nothing any more.
        reasserted: claims of a worker that has come back and has not named all of them yet.
    """

    def __init__(self, sock: socket.socket | None, peer: Peer, since: float) -> None:
        """Take over a socket, if there is one, and the process behind it."""
        self.sock = sock
        self.peer = peer
        self.client = b""
        self.served = 0
        self.since = since
        self.queue_seen = -1
        self.choked = False
        self.failed = False
        self.leaving = False
        self.reasserted: set[int] = set()
        self._backlog: deque[tuple[bytes, list[int]]] = deque()
        self._waiting_fds = 0
        self._bells: dict[int, int] = {}

    @property
    def backlog(self) -> int:
        """Packets that wait for room in the socket."""
        return len(self._backlog)

    @property
    def stuck(self) -> bool:
        """True when the connection is to be cut: the worker has not read for too long, or this end has failed."""
        return self.failed or len(self._backlog) > _MAX_BACKLOG or self._waiting_fds > _MAX_WAITING_FDS

    def send(self, packet: packets.FromAgent, fds: Sequence[int] = ()) -> None:
        """Send now, or keep for `flush`; the descriptors stay the caller's."""
        if self.sock is None or self.failed:
            return  # what follows on a reply that was lost would make no sense
        data = _fitting(packet)
        if not self._backlog:
            try:
                wire.send(self.sock, data, fds)
                return
            except BlockingIOError:
                pass
            except ConnectionError:
                return  # its end of file is on the way
            except OSError:  # a reply that is left out would keep its caller waiting
                self.failed = True
                return
        kept: list[int] = []
        self._backlog.append((data, kept))
        self._waiting_fds += len(fds)
        if self.stuck:
            return  # to be cut: what it does not get now, it never will
        try:
            for fd in fds:
                kept.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0))  # noqa: PERF401 - those before a failure count
        except OSError:  # this process may open no more
            self.failed = True
            wire.close_all(kept)
            kept.clear()

    def flush(self) -> None:
        """Send what waits, as far as there is room."""
        self.choked = False
        while self._backlog and self.sock is not None and not self.stuck:
            data, fds = self._backlog[0]
            try:
                wire.send(self.sock, data, fds)
            except BlockingIOError as error:
                self.choked = error.errno == errno.ETOOMANYREFS
                return
            except OSError:
                self._drop_backlog()
                return
            self._backlog.popleft()
            self._waiting_fds -= len(fds)
            wire.close_all(fds)

    def add_bell(self, number: int, fd: int) -> None:
        """Keep the pipe that is to be rung for an import; ``fd`` is this object's from now on.

        Raises:
            InvalidRecord: it is not the end of a pipe that can be written to, so ringing might fail, or wait.
        """
        self.remove_bell(number)
        if not stat.S_ISFIFO(os.fstat(fd).st_mode) or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY:
            os.close(fd)
            raise InvalidRecord("a bell is the end of a pipe that can be written to.", resource="Bell")
        os.set_blocking(fd, False)
        self._bells[number] = fd

    def remove_bell(self, number: int) -> None:
        """The import is over."""
        fd = self._bells.pop(number, None)
        if fd is not None:
            os.close(fd)

    def keep_bells(self, numbers: AbstractSet[int]) -> None:
        """All other imports are over."""
        for number in self._bells.keys() - numbers:
            self.remove_bell(number)

    def ring(self, number: int) -> None:
        """Put one byte into the import's pipe, unless one is there unread."""
        fd = self._bells.get(number)
        if fd is None:
            return
        try:
            unread = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))[0]
            if unread == 0:
                os.write(fd, b"\1")
        except BlockingIOError:
            return
        except OSError:  # nobody listens any more
            self.remove_bell(number)

    def take_over(self, other: Session) -> None:
        """The process has connected again: its new socket is this session's now, and ``other`` is empty."""
        self.hang_up()
        self.sock, other.sock = other.sock, None
        self.choked = self.failed = False
        self.reasserted.clear()
        other.close()

    def hang_up(self) -> None:
        """The connection is over; the process is still watched."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        self._drop_backlog()
        for number in list(self._bells):
            self.remove_bell(number)

    def close(self) -> None:
        """Forget the process too."""
        self.hang_up()
        self.peer.close()

    def _drop_backlog(self) -> None:
        self._waiting_fds = 0
        while self._backlog:
            wire.close_all(self._backlog.popleft()[1])


def _fitting(packet: packets.FromAgent) -> bytes:
    """The bytes of a packet; the texts of a failure are cut where it would be longer than a packet may be."""
    data = encode(packet)
    if len(data) > packets.MAX_PACKET_BYTES and isinstance(packet, packets.Refused | packets.Outcome):
        texts = msgspec.structs.astuple(packet.failure) if packet.failure is not None else ()
        short = Failure(*(text and text[:_LONGEST_TEXT] for text in texts))
        data = encode(msgspec.structs.replace(packet, failure=short))
    return data
