"""Which descriptor means which worker: the agent's ``epoll``, and the sessions behind its sockets and pidfds.

Used by the agent's control loop only.
"""

from __future__ import annotations

import select

from etha.tensor_bus.sessions import Session


class Switchboard:
    """Descriptors that the control loop waits for.

    Attributes:
        by_socket, by_pidfd: descriptor to session.
        strangers: descriptor to session of the connections that have not said hello, the oldest first.
    """

    def __init__(self) -> None:
        self.by_socket: dict[int, Session] = {}
        self.by_pidfd: dict[int, Session] = {}
        self.strangers: dict[int, Session] = {}
        self._epoll = select.epoll()

    def wait(self, seconds: float) -> list[tuple[int, int]]:
        """(descriptor, mask) of what is ready."""
        return self._epoll.poll(seconds)

    def watch(self, fd: int) -> None:
        """Wait for a descriptor that is no worker's."""
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Wait for it no more."""
        self._epoll.unregister(fd)

    def admit(self, session: Session) -> None:
        """A connection of nobody knows whom yet."""
        if session.sock is not None:
            fd = session.sock.fileno()
            self.strangers[fd] = self.by_socket[fd] = session
            self.watch(fd)

    def greeted(self, session: Session) -> None:
        """It has said who it is."""
        if session.sock is not None:
            self.strangers.pop(session.sock.fileno(), None)

    def watch_process(self, session: Session) -> None:
        """Wait for the death of the session's process."""
        self.by_pidfd[session.peer.fileno()] = session
        self.watch(session.peer.fileno())

    def move_socket(self, known: Session) -> None:
        """The session has taken over another's socket, which is watched already."""
        if known.sock is not None:
            self.by_socket[known.sock.fileno()] = known

    def leave_socket(self, session: Session) -> None:
        """Its connection is over."""
        if session.sock is not None:
            fd = session.sock.fileno()
            self.strangers.pop(fd, None)
            if self.by_socket.pop(fd, None) is not None:
                self.unwatch(fd)

    def part(self, session: Session) -> None:
        """Its process is watched no more either."""
        self.leave_socket(session)
        if self.by_pidfd.pop(session.peer.fileno(), None) is not None:
            self.unwatch(session.peer.fileno())

    def arm(self, session: Session) -> None:
        """Wait for room in its socket exactly while something waits to be sent."""
        if session.sock is not None and session.sock.fileno() in self.by_socket:
            mask = select.EPOLLIN | (select.EPOLLOUT if session.backlog and not session.choked else 0)
            self._epoll.modify(session.sock, mask)

    def close(self) -> None:
        """Forget all sessions, and close their descriptors and our own."""
        for session in [*self.by_socket.values(), *self.by_pidfd.values()]:
            session.close()
        self.by_socket.clear()
        self.by_pidfd.clear()
        self._epoll.close()
