"""One packet over one `SOCK_SEQPACKET` socket, with descriptors. Used by both ends; never waits.

A send is one system call and so one packet, whole or not at all: threads need no lock to send. Every descriptor that
arrives is close-on-exec and is owned by whoever called `receive`.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

from etha.errors import InvalidRecord
from etha.tensor_bus.packets import FDS_PER_PACKET, MAX_PACKET_BYTES

_FD_BYTES: Final = array.array("i").itemsize
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(FDS_PER_PACKET * _FD_BYTES)
# Plain numbers: joining socket's flags is done in Python, and took 1.5 µs of every packet.
_SEND_FLAGS: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_RECEIVE_FLAGS: Final = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_CUT_SHORT: Final = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send one packet.

    Raises:
        BlockingIOError: the peer does not read, or (``ETOOMANYREFS``) too many descriptors are on their way.
        ConnectionError: the peer is gone.
    """
    if fds:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        try:
            sock.sendmsg([data], [rights], _SEND_FLAGS)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise BlockingIOError(error.errno, error.strerror) from error
            raise
    else:
        sock.send(data, _SEND_FLAGS)


Raw = tuple[bytes, list[tuple[int, int, bytes]], int, Any]
"""A packet as recvmsg(2) gives it: data, ancillary data, flags, address."""


class Mail(deque[Raw]):
    """Packets that have arrived, the first first; it owns their descriptors until it is closed or dropped."""

    _closing: list[int] = []

    def collect(self, sock: socket.socket) -> None:
        """Receive one packet.

        In one call from the kernel to the deque: Python looks for signals between two calls, and a packet that was
        on its way from one to the other when Ctrl-C came would be lost, whichever thread waits for it.

        Raises:
            BlockingIOError: there is none.
            ConnectionError: the peer is gone.
        """
        self.extend(map(sock.recvmsg, (MAX_PACKET_BYTES,), (_ANCILLARY_BYTES,), (_RECEIVE_FLAGS,)))

    def move_first(self, other: Mail) -> None:
        """Hand the first packet over to ``other``; as little to be interrupted as `collect`."""
        other.extend(map(deque.popleft, (self,)))

    def descriptors(self) -> list[int]:
        """All descriptors, in order. They stay this object's."""
        return [fd for raw in self for fd in _rights(raw)]

    def close(self) -> None:
        """Close the descriptors, forget the packets. What an interrupt leaves of them, the next call closes."""
        while self or self._closing:
            if not self._closing:
                self._closing = _rights(self[0])
                del self[0]
            while self._closing:
                fd = self._closing[-1]
                del self._closing[-1]
                os.close(fd)

    def __del__(self) -> None:
        if self or self._closing:
            self.close()


def is_whole(raw: Raw) -> bool:
    """False for a packet that was cut short: too long, or out of descriptors."""
    return not raw[2] & _CUT_SHORT


def require_whole(raw: Raw) -> None:
    """Refuse a packet that was cut short.

    Raises:
        InvalidRecord: it was.
    """
    if not is_whole(raw):
        raise InvalidRecord(
            "a packet was cut short: too long, or more descriptors than this process may open.",
            resource="packet",
            remedy="Raise RLIMIT_NOFILE (ulimit -n); run: etha doctor",
        )


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one packet and its descriptors; ``b""`` when the peer has closed.

    Raises:
        BlockingIOError: there is none.
        InvalidRecord: it was cut short. Its descriptors are closed.
        ConnectionError: the peer is gone.
    """
    raw = sock.recvmsg(MAX_PACKET_BYTES, _ANCILLARY_BYTES, _RECEIVE_FLAGS)
    fds = _rights(raw)
    if not is_whole(raw):
        close_all(fds)
        require_whole(raw)
    return raw[0], fds


def _rights(raw: Raw) -> list[int]:
    if not raw[1]:
        return []
    rights = array.array("i")
    for level, kind, payload in raw[1]:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            rights.frombytes(payload[: len(payload) - len(payload) % _FD_BYTES])
    return list(rights)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)
