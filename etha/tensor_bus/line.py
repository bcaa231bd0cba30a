"""The way from a client to whichever agent serves it: sending, noticing that the agent has gone, finding its successor.

A `Line` goes through several channels. When one ends, the line is *lost*: what has to arrive is kept, and whoever needs
an agent tries to reach one, with pauses that grow. A new channel begins with `Hello`, which names the client, and with
all that the client still holds or waits for; so what was lost with the old one is made up for, whichever side lost it.
All of that is sent before any other thread sees the channel, and without waiting for the welcome. Where the socket has
no room for all of it (hundreds of bells), the next attempt goes on where this one had to stop: one that began anew each
time might never come to the end.

No lock is held while waiting, and no thread is started.
"""

from __future__ import annotations

import errno
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from etha.errors import (
    AgentGone,
    AgentStopped,
    AgentTimeout,
    ClientClosed,
    EthaError,
    ForkedClient,
    InvalidRecord,
    NoAgent,
    SystemFault,
    SystemLimit,
)
from etha.tensor_bus import clock, packets, wire
from etha.tensor_bus.bell import Bell
from etha.tensor_bus.channel import Channel
from etha.tensor_bus.command_queue import take
from etha.tensor_bus.ipc.peer import Peer
from etha.tensor_bus.records import Failure, encode

_GONE: Final = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF)
_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 0.25
_NUMBERS_PER_PACKET: Final = 6000
"""Of nine bytes each: a packet has 64 KiB."""

_Opening = tuple[bytes, Bell | None]
"""What is said on a new channel: a packet, and the bell whose pipe goes with it."""


class Line:
    """One client's way to its agents. Safe across threads.

    Attributes:
        client: the client id, 16 bytes.
        epoch: of the agent that has welcomed it last.
        claims: numbers of the requests that were made and not released.
        commands: sequences of the commands that were committed and not heard of.
        bells: import number to bell.
        on_return: called when a successor has welcomed this client, with its pid.
    """

    def __init__(self, channel: Channel, welcome: packets.Welcome, dial: Callable[[bytes], Channel]) -> None:
        self.client = welcome.client
        self.epoch = welcome.epoch
        self.claims: set[int] = set()
        self.commands: set[int] = set()
        self.bells: dict[int, Bell] = {}
        self.on_return: Callable[[int], object] = lambda pid: None
        self._dial = dial
        self._channel = channel
        self._retired: list[Channel] = []
        self._lost = False
        self._end: EthaError | None = None
        self._lock = threading.Lock()
        self._unsent: deque[bytes] = deque()
        self._restoring = threading.Lock()
        self._pause = _FIRST_PAUSE
        self._next_try = 0.0
        self._half_begun: Channel | None = None
        self._unsaid: deque[_Opening] = deque()

    # -- what the upper half adds -----------------------------------------------------------------

    def _asked(self) -> Iterable[bytes]:
        """The requests that are not answered yet."""
        return ()

    def _awaited(self) -> Iterable[int]:
        """Sequences of the commands whose outcome is waited for."""
        return ()

    def _begin_anew(self) -> None:
        """What has come half over the old channel will come again over the new one."""

    def _wake_all(self) -> None:
        """Something has happened that whoever waits must see."""

    # -- state ------------------------------------------------------------------------------------

    @property
    def agent(self) -> Peer:
        """The process at the other end, or the last that was."""
        return self._channel.agent

    @property
    def usable(self) -> bool:
        """False once the client is closed, its agent's successor does not know it, or this is a forked child."""
        return self._end is None

    @property
    def lost(self) -> bool:
        """True while there is no agent."""
        return self._lost

    @property
    def forked(self) -> bool:
        """True in a child that inherited this."""
        return isinstance(self._end, ForkedClient)

    def require_usable(self) -> None:
        """Raise what makes this line unusable for good, if anything does."""
        if self._end is not None:
            raise Failure.of(self._end).error()

    def require_own_process(self) -> None:
        """Raise `ForkedClient` in a child that inherited this; an agent that is gone is no matter here."""
        if self._end is not None and self.forked:
            self.require_usable()

    # -- sending ----------------------------------------------------------------------------------

    def hint(self, data: bytes) -> None:
        """Send an encoded packet that may be lost. Never waits, never raises for an agent that is gone."""
        if self._end is None and not self._lost:
            channel = self._channel
            try:
                wire.send(channel.sock, data)
            except BlockingIOError:
                return
            except OSError:
                self._lose(channel)

    def tell(self, packet: packets.FromWorker) -> None:
        """Send what must arrive and is not answered: now, or with the next call. May be called by a finaliser."""
        if self._end is None:
            if isinstance(packet, packets.Release):
                self.claims.discard(packet.number)  # before it is sent: a successor is told what is held
            # Kept first, so that an interrupt can only make it arrive twice, which is no error.
            self._unsent.append(encode(packet))
            if not self._lost:
                channel = self._channel
                try:
                    self._flush(channel)
                except BlockingIOError:
                    return
                except OSError:
                    self._lose(channel)

    def send(self, packet: packets.FromWorker, deadline: float, fds: Sequence[int] = ()) -> None:
        """Send, waiting for room, and for an agent, until ``deadline``.

        Raises:
            AgentTimeout: the agent does not read.
            AgentGone: there is none.
            ClientClosed, ForkedClient, StaleHandle: nothing can be sent any more.
        """
        self._send(encode(packet), deadline, lambda: fds)

    def send_encoded(self, data: bytes, deadline: float) -> None:
        """`send`, of a packet that was encoded for another reason too."""
        self._send(data, deadline, None)

    def send_bell(self, number: int, bell: Bell, deadline: float) -> None:
        """Give the agent the bell of an import, through a pipe of its own for each agent; and its successors.

        Raises:
            EthaError: see `send`.
        """
        self.bells[number] = bell
        try:
            self._send(encode(packets.Bell(number, bell.seen)), deadline, lambda: [bell.renew()])
        finally:
            bell.hand_over()

    def _send(self, data: bytes, deadline: float, fds: Callable[[], Sequence[int]] | None) -> None:
        while True:
            if self._end is not None:
                self.require_usable()
            if self._lost:
                if clock.now() >= deadline:
                    raise self._silent()
                self.restore(deadline)
                continue
            channel = self._channel
            try:
                if self._unsent:
                    self._flush(channel)
                wire.send(channel.sock, data, () if fds is None else fds())
                return
            except BlockingIOError:
                self._wait_for_room(channel, deadline)
            except OSError as error:
                if error.errno not in _GONE:
                    raise SystemLimit(
                        f"a packet of {len(data)} bytes cannot be sent: {error.strerror}.",
                        resource="packet",
                        remedy="See that memory and descriptors are free, and names short.",
                    ) from error
                self._lose(channel)

    def _flush(self, channel: Channel) -> None:
        while self._unsent:
            try:
                data = self._unsent[0]
                wire.send(channel.sock, data)
                self._unsent.remove(data)
            except (IndexError, ValueError):
                continue  # another thread sent it too

    def _wait_for_room(self, channel: Channel, deadline: float) -> None:
        if clock.now() >= deadline:
            raise self._silent()
        poll = select.poll()
        try:
            poll.register(channel.sock, select.POLLOUT)
        except ValueError:
            return  # another thread has closed it, and the next attempt to send says so
        if poll.poll(clock.remaining(deadline) * 1000):
            # Room, and yet refused: too many descriptors of this user are in flight. Nothing tells when they have
            # landed.
            time.sleep(0.001)

    # -- from one agent to the next ---------------------------------------------------------------

    def _lose(self, channel: Channel) -> None:
        """This channel is over; whoever needs an agent looks for another."""
        if channel is self._channel and self._end is None and not self._lost:
            self._lost = True
            self._wake_all()

    def restore(self, deadline: float) -> None:
        """Try once to reach a successor. Before `deadline`, pause until it may make sense; else do not wait.

        Raises:
            OtherUser, OtherNamespace, VersionMismatch: what serves there can never be talked to.
        """
        pause = min(self._next_try, deadline) - clock.now()
        if pause > 0:
            time.sleep(pause)
        if clock.now() < self._next_try:
            return
        taken: list[bool] = []
        made: list[Channel] = []
        try:
            take(self._restoring, 0.0, taken)
            if not taken[0]:
                time.sleep(min(_FIRST_PAUSE, clock.remaining(deadline)))
            elif self._lost and self._end is None:
                self._try_successor(made)
        finally:
            try:
                while made:
                    made.pop().close()
            finally:  # an interrupt of that, too, must leave the next attempt possible
                if taken and taken[0]:
                    self._restoring.release()

    def _try_successor(self, made: list[Channel]) -> None:
        self._next_try = clock.now() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        try:
            if self._half_begun is None:
                self._unsaid.clear()
                made.extend(map(self._dial, (self.client,)))
            else:
                made.append(self._half_begun)
                self._half_begun = None
            self._swap(made)
        except (NoAgent, AgentStopped, AgentGone, InvalidRecord, SystemFault, OSError):
            return
        except EthaError as error:
            self._end = error
            self._wake_all()
            raise
        self._pause = _FIRST_PAUSE

    def _swap(self, made: list[Channel]) -> None:
        """Say on the new channel what is to be said first, or what is left of that; once all is said, go on with it."""
        with self._lock:
            if self._end is not None:
                return
            if not self._unsaid:
                self._unsaid.extend(self._beginning())
            try:
                self._begin(made[0])
            except BlockingIOError:
                self._half_begun = made.pop()
                return
            for bell in list(self.bells.values()):
                bell.hand_over()
            self._begin_anew()
            self._retired.append(self._channel)
            self._channel = made.pop()
            self._lost = False
        self._wake_all()

    def _begin(self, channel: Channel) -> None:
        while self._unsaid:
            data, bell = self._unsaid[0]
            try:
                wire.send(channel.sock, data, () if bell is None else (bell.renew(),))
            except ValueError:  # another thread has just closed the bell
                pass
            self._unsaid.popleft()
            self._pause = _FIRST_PAUSE  # the agent reads: the next attempt, if one is needed, will come further

    def _beginning(self) -> Iterator[_Opening]:
        claims = sorted(self.claims)
        commands = sorted({*self.commands, *self._awaited()})
        longest = max(len(claims), len(commands), 1)
        for first in range(0, longest, _NUMBERS_PER_PACKET // 2):
            last = first + _NUMBERS_PER_PACKET // 2
            some = packets.Reassert(tuple(claims[first:last]), tuple(commands[first:last]), last < longest)
            yield encode(some), None
        for data in self._asked():
            yield data, None
        for number, bell in list(self.bells.items()):
            yield encode(packets.Bell(number, bell.seen)), bell

    def ensure_agent(self, deadline: float) -> None:
        """Wait until there is an agent.

        Raises:
            AgentGone: there was none by ``deadline``.
        """
        while True:
            self.require_usable()
            channel = self._channel
            if not self._lost and not channel.agent_lives():
                self._lose(channel)
            if not self._lost:
                return
            if clock.now() >= deadline:
                raise self._silent()
            self.restore(deadline)

    def _silent(self) -> EthaError:
        label = self.agent.label
        if self._lost:
            return AgentGone(
                f"the agent, {label}, is gone, and none has followed in time.",
                resource=label,
                holder=label,
                remedy="Start one: etha agent. What this client holds is kept until then.",
            )
        state = self.agent.state() if self._channel.agent_lives() else "dead"
        return AgentTimeout(
            f"the agent, {label} ({state}), did not answer in time.",
            resource=label,
            holder=label,
            remedy=f"Let it go on: kill -CONT {self.agent.pid}" if state == "stopped" else "See: etha status",
        )

    # -- ends -------------------------------------------------------------------------------------

    def _close_line(self, goodbye_until: float) -> None:
        """The client is closed: say goodbye, if there is someone to hear it."""
        # The reason first: whatever the agent's end does from now on, that is why other threads' calls fail.
        # Under the lock: a thread that is greeting a successor goes on to the end, and the goodbye comes behind that.
        with self._lock:
            before = self._end
            self._end = ClientClosed("the client is closed.", remedy="Make another: bootstrap_client().")
        if before is None and not self._lost:
            self._say_goodbye(goodbye_until)

    def _say_goodbye(self, deadline: float) -> None:
        self._unsent.append(encode(packets.Goodbye()))
        while self._unsent:
            try:
                self._flush(self._channel)
            except BlockingIOError:
                if clock.now() >= deadline:
                    return  # it does not read: it keeps what this client held until this process ends
                self._wait_for_room(self._channel, deadline)
            except OSError:
                self._lost = True
                return

    def _close_channels(self, *, current: bool) -> None:
        """Close those that no thread can be polling any more."""
        while self._retired:
            self._retired.pop().close()
        if current:
            self._channel.close()
            if self._half_begun is not None:
                self._half_begun.close()
