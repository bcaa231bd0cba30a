"""A worker's end of the connection to its agent: requests and their replies, descriptors, and the agent's death.

No thread is started, and no lock is held while waiting. Whichever thread waits for a reply first becomes the
*receiver*: it reads the socket and hands each packet to the request that it answers. When its own has come, another
waiting thread takes over.

A reply that nobody waits for any more is dropped, and descriptors with it are closed: its request has been followed
by a `Release`, so the agent has taken the claim back already. An interrupt between two bytecodes loses no packet.

After a fork the child's copy is closed and every use of it raises `ForkedClient`.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Final

from etha.errors import AgentGone, AgentTimeout, ClientClosed, EthaError, ForkedClient, InvalidRecord, SystemLimit
from etha.tensor_bus import clock, packets, wire
from etha.tensor_bus.ipc.peer import Peer
from etha.tensor_bus.pending import Pending
from etha.tensor_bus.records import Failure, encode

_GONE: Final = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF)
_GOODBYE_SECONDS: Final = 1.0
"""How long a client that closes waits for room, so that what it gave back is heard."""

_TAKE_OVER_SECONDS: Final = 0.25
"""How often a waiting thread looks whether the receiver left without handing over (an interrupt can do that)."""


class Connection:
    """An authenticated connection. Safe across threads.

    Attributes:
        agent: the process at the other end.
        client: the client id that it gave, 16 bytes.
        epoch: its epoch.
    """

    def __init__(self, sock: socket.socket, agent: Peer, welcome: packets.Welcome) -> None:
        self.agent = agent
        self.client = welcome.client
        self.epoch = welcome.epoch
        self._sock = sock
        self._lock = threading.Lock()
        self._pending: dict[int, Pending] = {}
        self._given_up: set[int] = set()
        self._receiver: Pending | None = None
        self._unsent: deque[bytes] = deque()
        self._mail = wire.Mail()
        self._end: EthaError | None = None
        self._closed = False
        self.bells: set[int] = set()
        """Descriptors that a forked child closes."""
        self.unasked: dict[int, EthaError] = {}
        """Generation to failure of a command that nobody waited for."""
        _connections.add(self)

    # -- sending ----------------------------------------------------------------------------------

    def hint(self, packet: packets.FromWorker) -> None:
        """Send what may be lost. Never waits, never raises for an agent that is gone."""
        if self._end is None:
            try:
                wire.send(self._sock, encode(packet))
            except OSError:
                return

    def tell(self, packet: packets.FromWorker) -> None:
        """Send what must arrive and is not answered: now, or with the next call. May be called by a finaliser."""
        if self._end is None:
            # Kept first, so that an interrupt can only make it arrive twice, which is no error.
            self._unsent.append(encode(packet))
            try:
                self._flush()
            except OSError:
                return

    def send(self, packet: packets.FromWorker, deadline: float, fds: Sequence[int] = ()) -> None:
        """Send, waiting for room until ``deadline``.

        Raises:
            AgentTimeout: the agent does not read.
            AgentGone, ClientClosed, ForkedClient: nothing can be sent any more.
        """
        data = encode(packet)
        while True:
            self.require_usable()
            try:
                self._flush()
                wire.send(self._sock, data, fds)
                return
            except BlockingIOError:
                self._wait_for_room(deadline)
            except OSError as error:
                if error.errno not in _GONE:
                    raise SystemLimit(
                        f"a packet of {len(data)} bytes cannot be sent: {error.strerror}.",
                        resource="packet",
                        remedy="See that memory and descriptors are free, and names short.",
                    ) from error
                raise self._lost() from error

    def _flush(self) -> None:
        while self._unsent:
            try:
                data = self._unsent[0]
                wire.send(self._sock, data)
                self._unsent.remove(data)
            except (IndexError, ValueError):
                continue  # another thread sent it too

    def _wait_for_room(self, deadline: float) -> None:
        if clock.now() >= deadline:
            raise self._silent()
        poll = select.poll()
        try:
            poll.register(self._sock, select.POLLOUT)
        except ValueError:
            return  # another thread has closed it, and the next attempt to send says so
        if poll.poll(clock.remaining(deadline) * 1000):
            # Room, and yet refused: too many descriptors of this user are in flight. Nothing tells when they have
            # landed.
            time.sleep(0.001)

    # -- receiving --------------------------------------------------------------------------------

    def expect(self, key: int) -> Pending:
        """Announce that a reply will be waited for; to be done before the request is sent."""
        pending = self._pending[key] = Pending(key)
        return pending

    def forget(self, pending: Pending) -> None:
        """Wait for this reply no more."""
        with self._lock:
            self._pending.pop(pending.key, None)
            if pending.reply is None:
                self._given_up.add(pending.key)

    def wait(self, pending: Pending, deadline: float) -> packets.FromAgent:
        """The reply.

        Raises:
            AgentTimeout: none by ``deadline``.
            AgentGone, ClientClosed, ForkedClient: none will come.
        """
        try:
            while True:
                with self._lock:
                    if pending.lost:
                        raise _out_of_descriptors()
                    if pending.reply is not None:
                        return pending.reply
                    self.require_usable()
                    pending.waiting = True
                    pending.wake.clear()
                    if self._receiver is None:
                        self._receiver = pending
                if clock.now() >= deadline:
                    raise self._silent()
                if self._receiver is pending:
                    self._receive_for(pending, deadline)
                else:
                    pending.wake.wait(min(clock.remaining(deadline), _TAKE_OVER_SECONDS))
        finally:
            # Before the lock, whose taking can be interrupted. Two receivers do no harm, one that has left would.
            pending.waiting = False
            if self._receiver is pending:
                self._receiver = None
            with self._lock:
                if self._receiver is None:
                    if self._closed:
                        self._sock.close()
                    self._wake_one()

    def drain(self) -> None:
        """Take in what has arrived, without waiting."""
        with self._lock:
            if self._receiver is not None or self._end is not None:
                return
            try:
                while True:
                    self._take_one()
            except BlockingIOError:
                return
            except (AgentGone, ClientClosed):
                return

    def _receive_for(self, pending: Pending, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while pending.reply is None and not pending.lost:
            left = clock.remaining(deadline)
            if left <= 0:
                return
            if poll.poll(left * 1000 + 1):
                with self._lock:
                    try:
                        self._take_one()
                    except BlockingIOError:
                        continue

    def _take_one(self) -> None:
        self.require_usable()
        if not self._mail:
            try:
                self._mail.collect(self._sock)
            except BlockingIOError:
                raise
            except OSError as error:
                raise self._lost() from error
        if not self._mail[0][0]:
            raise self._lost()
        try:
            packet = packets.FROM_AGENT.decode(self._mail[0][0])
        except InvalidRecord:
            self._mail.close()
            raise
        if wire.is_whole(self._mail[0]):
            self._dispatch(packet)
        else:
            self._lose(packet)

    def _dispatch(self, packet: packets.FromAgent) -> None:
        if isinstance(packet, packets.Outcome):
            key = -packet.sequence
            pending = self._pending.get(key)
            if pending is None and packet.failure is not None and key not in self._given_up:
                self.unasked[packet.generation] = packet.failure.error()
        elif isinstance(packet, packets.Welcome):
            key, pending = 0, None
        else:
            key = packet.number
            pending = self._pending.get(key)
        if pending is None:
            self._given_up.discard(key)
            self._mail.close()
            return
        self._mail.move_first(pending.mail)
        if pending.reply is not None:
            pending.wake.set()

    def _lose(self, packet: packets.FromAgent) -> None:
        """The packet came without some of its descriptors: whoever waits for them is told, and no one else."""
        self._mail.close()
        pending = self._pending.get(packet.number) if isinstance(packet, packets.Descriptors) else None
        if pending is not None:
            pending.lost = True
            pending.wake.set()

    def _wake_one(self) -> None:
        for pending in list(self._pending.values()):
            if pending.waiting:
                pending.wake.set()
                return

    # -- ends -------------------------------------------------------------------------------------

    def require_usable(self) -> None:
        """Raise what makes this connection unusable, if anything does."""
        if self._end is not None:
            raise Failure.of(self._end).error()

    def require_own_process(self) -> None:
        """Raise `ForkedClient` in a child that inherited this; an agent that is gone is no matter here."""
        if self.forked:
            self.require_usable()

    def require_agent_alive(self) -> None:
        """Raise `AgentGone` when the agent is dead: what its state says may be out of date."""
        self.require_usable()
        if not self._agent_lives():
            raise self._lost()

    @property
    def forked(self) -> bool:
        """True in a child that inherited this."""
        return isinstance(self._end, ForkedClient)

    @property
    def usable(self) -> bool:
        """False once the agent is gone, the client closed, or the process a forked child."""
        return self._end is None

    def close(self) -> None:
        """Say goodbye and close. Calls that wait raise `ClientClosed`."""
        if self.forked:
            return
        # The reason first: whatever the agent's end does from now on, that is why other threads' calls fail.
        before, self._end = self._end, ClientClosed("the client is closed.", remedy="Make another: bootstrap_client().")
        if before is None:
            self._say_goodbye(clock.now() + _GOODBYE_SECONDS)
        self._finish()

    def _say_goodbye(self, deadline: float) -> None:
        self._unsent.append(encode(packets.Goodbye()))
        while self._unsent:
            try:
                self._flush()
            except BlockingIOError:
                if clock.now() >= deadline:
                    return  # it does not read: it keeps what this client held until this process ends
                self._wait_for_room(deadline)
            except OSError:
                return

    def _finish(self) -> None:
        with self._lock:
            self._closed = True
            try:
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the agent's end is closed already
            for pending in list(self._pending.values()):
                pending.wake.set()
            if self._receiver is None:
                self._sock.close()
            self.agent.close()

    def _lost(self) -> EthaError:
        if self._end is not None:
            return Failure.of(self._end).error()
        label = self.agent.label
        what = "has closed the connection" if self._agent_lives() else "is gone"
        self._end = error = AgentGone(
            f"the agent, {label}, {what}.",
            resource=label,
            holder=label,
            remedy="See what it says on stderr, start one (etha agent) if there is none, and make a new client.",
        )
        for pending in list(self._pending.values()):
            pending.wake.set()
        return error

    def _agent_lives(self) -> bool:
        try:
            return self.agent.alive()
        except ValueError:
            return True  # another thread closes this connection: that says nothing of the agent

    def _silent(self) -> AgentTimeout:
        state = self.agent.state() if self._agent_lives() else "dead"
        return AgentTimeout(
            f"the agent, {self.agent.label} ({state}), did not answer in time.",
            resource=self.agent.label,
            holder=self.agent.label,
            remedy=f"Let it go on: kill -CONT {self.agent.pid}" if state == "stopped" else "See: etha status",
        )

    def forget_in_child(self) -> None:
        """In a forked child: close what was inherited, and refuse every use."""
        self._lock = threading.Lock()
        self._end = ForkedClient(
            "this client belongs to the parent process.",
            remedy="Make one in the child: bootstrap_client().",
        )
        wire.close_all(self.bells)
        self._sock.close()
        self.agent.close()


def _out_of_descriptors() -> SystemLimit:
    return SystemLimit(
        "the agent sent more descriptors than this process may open.",
        resource="RLIMIT_NOFILE",
        remedy="Raise the limit (ulimit -n); run: etha doctor",
    )


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _forget_in_child() -> None:
    for connection in list(_connections):
        connection.forget_in_child()


os.register_at_fork(after_in_child=_forget_in_child)
