"""What `Subscription.fileno` gives: a descriptor that becomes readable, and that outlives the agent that rings it.

The agent rings through a pipe, whose read end also becomes readable when the agent dies. With a new agent comes a new
pipe. ``select`` and ``asyncio`` have been given a number, and ``epoll`` remembers the open file behind it: so the
user's descriptor is an epoll of our own, which stays, and the pipe of the day is inside it.
"""

from __future__ import annotations

import os
import select
from itertools import chain

from etha.tensor_bus.ipc.libc import system_limit


class Bell:
    """One subscriber's bell. Not safe across threads; its subscription's lock guards it.

    Attributes:
        seen: the newest version that the subscriber knows.
    """

    _epoll: select.epoll | None = None

    def __init__(self, seen: int) -> None:
        """Nobody has been given a pipe yet.

        Raises:
            SystemLimit: no descriptor is left.
        """
        self.seen = seen
        self._pipe: list[int] = []
        try:
            self._epoll = select.epoll()
        except OSError as error:
            raise system_limit(error, "making a descriptor for select()") or error from error

    def fileno(self) -> int:
        """The user's descriptor.

        Raises:
            ValueError: it was closed.
        """
        if self._epoll is None:
            raise ValueError("the bell was closed")
        return self._epoll.fileno()

    def renew(self) -> int:
        """Make a pipe for an agent, instead of the one before; its write end, which stays this object's.

        Raises:
            ValueError: the bell was closed.
        """
        if self._pipe and self._epoll is not None:
            self._epoll.unregister(self._pipe[0])
        self._close_pipe()
        # Made and put on record in one call, so that an interrupt finds either nothing or both.
        self._pipe.extend(chain.from_iterable(map(os.pipe2, (os.O_CLOEXEC | os.O_NONBLOCK,))))
        epoll = self._epoll
        if epoll is None:  # by another thread, meanwhile: it has not seen this pipe
            self._close_pipe()
            raise ValueError("the bell was closed")
        epoll.register(self._pipe[0], select.EPOLLIN)
        return self._pipe[1]

    def hand_over(self) -> None:
        """The agent has the write end: close ours, so that its death is the end of the pipe."""
        if len(self._pipe) > 1:
            self._close_last()

    def silence(self) -> None:
        """Take the readiness away."""
        if self._pipe:
            try:
                os.read(self._pipe[0], 64)
            except BlockingIOError:
                return

    def close(self) -> None:
        """Close everything; idempotent. Also what a forked child does with what it inherited."""
        self._close_pipe()
        epoll, self._epoll = self._epoll, None
        if epoll is not None:
            epoll.close()

    def _close_pipe(self) -> None:
        while self._pipe:
            self._close_last()

    def _close_last(self) -> None:
        # Forgotten and closed with no call in between: an interrupt loses neither.
        fd = self._pipe[-1]
        del self._pipe[-1]
        os.close(fd)

    def __del__(self) -> None:
        if self._epoll is not None:
            self.close()
