"""The floors: what no bus of this design could do without, in plain Python, with nothing of etha around it.

The LMDB files are opened as etha opens its own (not synced, LMDB's locking on) and lie in the same directory.
"""

from __future__ import annotations

import select
import socket
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import lmdb

from costs.processes import Helper, Talk

_KEY: Final = bytes(24)
_RECORD: Final = bytes(48)
"""As long as a publish command's key and record."""

_PACKET: Final = bytes(96)
"""As long as a request for a lease."""

_STOP: Final = b""


class Store:
    """One LMDB file and a put into it."""

    def __init__(self, path: Path) -> None:
        self._env = lmdb.open(str(path), subdir=False, map_size=1 << 28, sync=False, metasync=False)

    def put(self) -> None:
        """One write transaction with one put."""
        with self._env.begin(write=True) as transaction:
            transaction.put(_KEY, _RECORD)


class Other:
    """Another process, which waits in epoll for packets. A context manager.

    Args:
        answers: it sends one packet back for each.
        store: the LMDB file that it puts into before it answers, or None.
    """

    def __init__(self, *, answers: bool, store: Path | None = None) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._helper = Helper(_serve, theirs, self._ours, answers, store)
        theirs.close()
        self._helper.hear()
        self._ours.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._ours, select.EPOLLIN)

    def send(self) -> None:
        """One packet, unanswered."""
        self._ours.send(_PACKET, socket.MSG_DONTWAIT)

    def ping(self) -> None:
        """One packet there and one back, each end waiting in epoll."""
        self._ours.send(_PACKET, socket.MSG_DONTWAIT)
        self._epoll.poll()
        self._ours.recv(1 << 16)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._epoll.close()
        self._ours.close()
        self._helper.close()


def _serve(talk: Talk, sock: socket.socket, parents: socket.socket, answers: bool, path: Path | None) -> None:
    parents.close()
    store = Store(path) if path is not None else None
    sock.setblocking(False)
    epoll = select.epoll()
    epoll.register(sock, select.EPOLLIN)
    talk.say("ready")
    while True:
        epoll.poll()
        data = sock.recv(1 << 16)
        if data == _STOP:
            return
        if store is not None:
            store.put()
        if answers:
            sock.send(data, socket.MSG_DONTWAIT)
