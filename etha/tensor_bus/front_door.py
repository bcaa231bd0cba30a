"""Where workers come in: the listening socket, and the look at who they are before a byte of theirs is read.

A connection of another user, or of another PID namespace, is closed here. One that says nothing counts as a stranger,
and there is room for a bounded number of those.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from typing import Final

from etha.errors import EthaError, OtherNamespace, StaleHandle, SystemLimit, VersionMismatch
from etha.tensor_bus import packets, wire
from etha.tensor_bus.ipc.peer import Peer
from etha.tensor_bus.lockfile import LockText
from etha.tensor_bus.records import SCHEMA, Failure, encode
from etha.tensor_bus.sessions import Session

logger = logging.getLogger(__name__)

_BACKLOG: Final = 512
_PER_TURN: Final = 16
"""How many are let in at a time, a millisecond's work. With no bound, 10,000 that came at once had all descriptors that
there are, and held everybody up for five seconds, before the first of them was cut."""

_OUT_OF: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class FrontDoor:
    """The listening socket of one agent. Used by its control loop only.

    Attributes:
        refused: connections that were closed unread.
    """

    def __init__(self, path: str) -> None:
        """Listen at ``path``, for this user only.

        Raises:
            SystemLimit: the socket cannot be made.
        """
        self.refused = 0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._sock.setblocking(False)
            self._sock.bind(path)
            os.chmod(path, 0o600)
            self._sock.listen(_BACKLOG)
        except OSError as error:
            self._sock.close()
            raise SystemLimit(
                f"{path} cannot be made: {error.strerror}.",
                resource=path,
                remedy="See that the directory is writable and the disk not full; run: etha doctor",
            ) from error

    def fileno(self) -> int:
        """Readable while someone waits to come in."""
        return self._sock.fileno()

    def admit(self, now: float) -> list[Session]:
        """Those of this user who wait to come in, the first of them; who is left waits for the next turn.

        Raises:
            SystemLimit: this process is out of descriptors or memory; those that wait go on waiting.
        """
        admitted: list[Session] = []
        for _ in range(_PER_TURN):
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return admitted
            except OSError as error:
                if admitted or error.errno not in _OUT_OF:
                    return admitted
                raise SystemLimit(
                    f"no connection can be taken: {error.strerror}.",
                    resource="RLIMIT_NOFILE",
                    remedy="Raise the agent's limit (ulimit -n); run: etha doctor",
                ) from error
            session = self._look_at(sock, now)
            if session is not None:
                admitted.append(session)
        return admitted

    def close(self) -> None:
        """Take no more connections."""
        self._sock.close()

    def _look_at(self, sock: socket.socket, now: float) -> Session | None:
        sock.setblocking(False)
        try:
            peer = Peer.of(sock)
        except (EthaError, OSError) as error:
            if isinstance(error, OtherNamespace):
                logger.info("refused a connection: %s", error.message)
                _say_why(sock, error)
            self.refused += 1
            sock.close()
            return None
        if peer.uid != os.geteuid():
            logger.warning("refused a connection of uid %d (%s)", peer.uid, peer.label)
            self.refused += 1
            peer.close()
            sock.close()
            return None
        return Session(sock, peer, now)


def mismatch(hello: packets.Hello, agent: LockText, path: str) -> EthaError | None:
    """Why the worker that says this and the agent cannot work together, or None."""
    if hello.schema != SCHEMA:
        return VersionMismatch(
            f"the agent speaks record schema {SCHEMA}, the worker {hello.schema}.",
            resource=path,
            remedy="Install the same etha on both sides; run: etha doctor",
        )
    if (hello.boot, hello.namespace) != (agent.boot, agent.namespace):
        return OtherNamespace(
            "the worker lives in another PID namespace.",
            resource=path,
            remedy="Share the PID namespace (docker run --pid), or run an agent inside; run: etha doctor",
        )
    return None


def same_process(known: Session, stranger: Session) -> bool:
    """Whether the process that has connected is the one that the session is watching, by the kernel's word.

    While the one that is watched lives, its pid cannot be another's.
    """
    return known.peer.pid == stranger.peer.pid and known.peer.alive()


def unknown_client(path: str, label: str) -> StaleHandle:
    """A worker wants to go on as a client that is not known here, or is another process's."""
    return StaleHandle(
        f"the agent at {path} knows no such client of {label}: what its predecessor knew is lost.",
        resource=path,
        holder=label,
        remedy="Make a new client, and register and subscribe again.",
    )


def _say_why(sock: socket.socket, error: EthaError) -> None:
    try:
        wire.send(sock, encode(packets.Refused(0, Failure.of(error))))
    except OSError:
        return
