"""A client's conversation with its agent: requests and their replies, descriptors, and what comes unasked.

No thread is started, and no lock is held while waiting. Whichever thread waits for a reply first becomes the
*receiver*: it reads the socket and hands each packet to the request that it answers. When its own has come, another
waiting thread takes over. While there is no agent, the receiver looks for its successor (`line`), to whom all requests
are made again.

A reply that nobody waits for any more is dropped, and descriptors with it are closed: its request has been followed
by a `Release`, so the agent has taken the claim back already. An interrupt between two bytecodes loses no packet.

After a fork the child's copy is closed and every use of it raises `ForkedClient`.
"""

from __future__ import annotations

import os
import select
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from etha.errors import EthaError, ForkedClient, InvalidRecord, SystemLimit
from etha.tensor_bus import clock, packets, wire
from etha.tensor_bus.channel import Channel
from etha.tensor_bus.client_device import ClientDevice
from etha.tensor_bus.line import Line
from etha.tensor_bus.pending import Pending

_GOODBYE_SECONDS: Final = 1.0
"""How long a client that closes waits for room, so that what it gave back is heard."""

_TAKE_OVER_SECONDS: Final = 0.25
"""How often a waiting thread looks whether the receiver left without handing over (an interrupt can do that)."""


class Connection(Line):
    """An authenticated connection, from one agent to the next. Safe across threads.

    Attributes:
        device: what the client shares memory on.
        unasked: generation to failure of a command that nobody waited for.
        on_wanted: sends the descriptors of a command of this client again, as an agent that has none asks for; returns
            whether that is done with.
        shares: sequences of the commands of which descriptors may be asked for.
    """

    def __init__(
        self,
        channel: Channel,
        welcome: packets.Welcome,
        dial: Callable[[bytes], Channel],
        device: ClientDevice,
    ) -> None:
        super().__init__(channel, welcome, dial)
        self.device = device
        self.unasked: dict[int, EthaError] = {}
        self.on_wanted: Callable[[int], bool] = lambda sequence: True
        self.shares: Callable[[], Iterable[int]] = tuple
        self._unasked_for: set[int] = set()
        self._sent_anew: set[int] = set()
        self._pending: dict[int, Pending] = {}
        self._given_up: set[int] = set()
        self._receiver: Pending | None = None
        self._wanted: deque[int] = deque()
        self._heard: deque[int] = deque(maxlen=64)
        self._mail = wire.Mail()
        self._closed = False
        _connections.add(self)

    # -- receiving --------------------------------------------------------------------------------

    def expect(self, pending: Pending) -> None:
        """Announce that a reply will be waited for; to be done before the request is sent, and undone by `forget`."""
        self._pending[pending.key] = pending

    def awaits(self, sequence: int) -> bool:
        """Whether somebody waits for the outcome of a command, and it has not come."""
        pending = self._pending.get(-sequence)
        return pending is not None and pending.reply is None

    def forget(self, pending: Pending) -> None:
        """Wait for this reply no more."""
        if pending.reply is not None:
            self._pending.pop(pending.key, None)
            return
        with self._lock:
            self._pending.pop(pending.key, None)
            if pending.reply is None:
                self._given_up.add(pending.key)

    def wait(self, pending: Pending, deadline: float) -> packets.FromAgent:
        """The reply.

        Raises:
            AgentTimeout: none by ``deadline``.
            AgentGone: there is no agent, and none has followed by ``deadline``.
            ClientClosed, ForkedClient, StaleHandle: none will come.
        """
        try:
            while True:
                if pending.lost:
                    raise _out_of_descriptors()
                reply = pending.reply
                if reply is not None:
                    return reply
                with self._lock:
                    self.require_usable()
                    pending.waiting = True
                    if self._receiver is None:
                        self._receiver = pending
                    if self._receiver is not pending:
                        pending.listen()
                left = deadline - clock.now()
                if left <= 0:
                    raise self._silent()
                if self._receiver is not pending:
                    # Looked at again: its reply may have come before it listened.
                    if pending.reply is None and not pending.lost:
                        pending.sleep(min(left, _TAKE_OVER_SECONDS))
                elif self._lost:
                    self.restore(deadline)
                else:
                    self._receive(left)
        finally:
            # Before the lock, whose taking can be interrupted. Two receivers do no harm, one that has left would.
            pending.waiting = False
            if self._receiver is pending:
                self._receiver = None
            with self._lock:
                if self._receiver is None:
                    self._close_channels(current=self._closed)
                    if len(self._pending) > 1:
                        self._wake_one()

    def drain(self) -> None:
        """Take in what has arrived, and look for a successor of an agent that is gone; without waiting."""
        with self._lock:
            if self._receiver is not None or self._end is not None:
                return
            try:
                # Asked first: on the way of publish(), an exception for "nothing there" costs more than the question.
                while not self._lost and (self._mail or self._channel.readable()):
                    self._take_one()
            except BlockingIOError:
                pass
            self._close_channels(current=False)
        if self._lost and self._end is None:
            self.restore(0.0)
        self._answer_wanted()

    def _receive(self, seconds: float) -> None:
        """Wait for one packet, and take it in."""
        poll = select.poll()
        poll.register(self._channel.sock, select.POLLIN)
        if poll.poll(seconds * 1000 + 1):
            try:
                with self._lock:
                    self._take_one()
            except BlockingIOError:
                return
            if self._wanted or self.device.unheard:
                self._answer_wanted()

    def _take_one(self) -> None:
        self.require_usable()
        channel = self._channel
        if not self._mail:
            try:
                self._mail.collect(channel.sock)
            except BlockingIOError:
                raise
            except OSError:
                self._lose(channel)
                return
        if not self._mail[0][0]:
            self._mail.close()
            self._lose(channel)
            return
        try:
            packet = packets.FROM_AGENT.decode(self._mail[0][0])
        except InvalidRecord:
            self._mail.close()
            raise
        if wire.is_whole(self._mail[0]):
            self._dispatch(packet)
        else:
            self._lose_descriptors(packet)

    def _dispatch(self, packet: packets.FromAgent) -> None:
        if isinstance(packet, packets.Outcome):
            key = -packet.sequence
            pending = self._pending.get(key)
            again = packet.sequence in self._heard  # a successor tells what its predecessor told
            if packet.sequence and not again:
                self._heard.append(packet.sequence)
            if pending is None and packet.failure is not None and key not in self._given_up and not again:
                self.unasked[packet.generation] = packet.failure.error()
        elif isinstance(packet, packets.Welcome):
            key, pending = 0, None
            self.epoch = packet.epoch
            self.device.offer(packet, self._mail.descriptors())
            self.on_return(self.agent.pid)
        elif isinstance(packet, packets.Wanted):
            key, pending = 0, None
            self._wanted.append(packet.sequence)
        elif isinstance(packet, packets.Refused) and packet.number == 0:
            key, pending = 0, None
            self._end = packet.failure.error()
            self._wake_all()
        else:
            key = packet.number
            pending = self._pending.get(key)
        if pending is None or pending.reply is not None:
            self._given_up.discard(key)
            self._mail.close()
            return
        self._mail.move_first(pending.mail)
        pending.heard(packet)
        if pending.reply is not None:
            pending.wake()

    def _lose_descriptors(self, packet: packets.FromAgent) -> None:
        """The packet came without some of its descriptors: whoever waits for them is told, and no one else."""
        self._mail.close()
        pending = self._pending.get(packet.number) if isinstance(packet, packets.Descriptors) else None
        if pending is not None:
            pending.lost = True
            pending.wake()

    def _wake_one(self) -> None:
        for pending in list(self._pending.values()):
            if pending.waiting:
                pending.wake()
                return

    def _answer_wanted(self) -> None:
        """Outside of the lock: the agent is new, has fences of its own, and has asked for descriptors again."""
        self.device.carry_on(lambda packet, fds: self.send(packet, 0.0, fds))
        while self._wanted and self._end is None:
            try:
                sequence = self._wanted[0]
                if sequence in self._sent_anew:
                    self._sent_anew.discard(sequence)  # asked before it had come; once more, and it has been lost
                elif not self.on_wanted(sequence):
                    return
                elif sequence in self._unasked_for:
                    self._unasked_for.discard(sequence)
                    self._sent_anew.add(sequence)
                self._wanted.remove(sequence)
            except (IndexError, ValueError):
                return  # another thread sent them too

    # -- from one agent to the next ---------------------------------------------------------------

    def _asked(self) -> Iterable[bytes]:
        return [pending.asked for _, pending in sorted(self._pending.items()) if pending.asked and not pending.reply]

    def _awaited(self) -> Iterable[int]:
        return [-key for key, pending in list(self._pending.items()) if key < 0 and not pending.reply]

    def _begin_anew(self) -> None:
        self._mail.close()
        # Sent before they are asked for: for long, the only caller may be one that waits for nothing, as publish().
        self._sent_anew.clear()
        self._wanted.clear()
        self._wanted.extend(self.shares())
        self._unasked_for = set(self._wanted)
        for pending in list(self._pending.values()):
            if pending.reply is None:
                pending.mail.close()

    def _wake_all(self) -> None:
        for pending in list(self._pending.values()):
            pending.wake()

    # -- ends -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Say goodbye and close. Calls that wait raise `ClientClosed`."""
        if self.forked:
            return
        self._close_line(clock.now() + _GOODBYE_SECONDS)
        with self._lock:
            self._closed = True
            self._channel.shut()
            self._wake_all()
            if self._receiver is None:
                self._close_channels(current=True)

    def forget_in_child(self) -> None:
        """In a forked child: close what was inherited, and refuse every use."""
        self._lock = threading.Lock()
        self._end = ForkedClient(
            "this client belongs to the parent process.",
            remedy="Make one in the child: bootstrap_client().",
        )
        for bell in self.bells.values():
            bell.close()
        self._close_channels(current=True)


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
