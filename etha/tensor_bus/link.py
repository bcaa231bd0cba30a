"""What a client's publications and subscriptions share: one connection, one command queue, one view of the state.

Commands go through the queue (durable, in order), requests over the connection (answered at once). Whoever gives up
waiting, for whatever reason, undoes what was asked for: `Release` follows a request, `Cancel` a command.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from etha.errors import AgentGone, AgentTimeout, EthaError, InvalidArgument
from etha.tensor_bus import clock, packets
from etha.tensor_bus.command_queue import CommandQueue, take
from etha.tensor_bus.commands import Cancel, Command, Leave, Release
from etha.tensor_bus.connection import Connection
from etha.tensor_bus.endings import Endings
from etha.tensor_bus.paths import AgentPaths
from etha.tensor_bus.pending import Pending
from etha.tensor_bus.records import encode
from etha.tensor_bus.state import StateReader
from etha.tensor_bus.wire import Mail

if TYPE_CHECKING:
    from etha.tensor_bus.ipc.descriptors import SharedFd
    from etha.tensor_bus.ipc.export import Export

logger = logging.getLogger(__name__)

_RING: Final = encode(packets.RingForCommands())
_WORK_SECONDS: Final = 1.0
"""How long a client that closes waits for device work of its own that others may wait for."""

_CANCEL_SECONDS: Final = 0.05
"""How long a caller that gives up waits to say so. Then it is said at its client's next call."""


class Ticket:
    """A command on its way.

    Attributes:
        sequence: its number, 0 until it is known; set before it is committed.
        pending: its expected outcome, or None.
    """

    __slots__ = ("pending", "sequence")

    def __init__(self) -> None:
        self.sequence = 0
        self.pending: Pending | None = None


class Link:
    """One client's way to its agent. Safe across threads.

    Attributes:
        patience: seconds that a call without a timeout of its own waits for the queue.
        device: what it shares memory on.
        endings: what is over and not told yet.
        exports: sequence of the command that brought it to what this client shares.
    """

    _made = False

    def __init__(self, connection: Connection, paths: AgentPaths, patience: float) -> None:
        self.connection = connection
        self.device = connection.device
        self.queue = CommandQueue(paths)
        try:
            self.state = _state_of(connection, paths)
        except BaseException:
            self.queue.close()
            raise
        self.patience = patience
        self._numbers = itertools.count(1)
        self._sequences = itertools.count(1)
        self._order = threading.Lock()
        self._committed = connection.commands
        self._served = 0
        self._owed: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self.endings = Endings(connection)
        self.exports: dict[int, Export] = {}
        me = weakref.ref(self)  # which the connection must not keep alive
        connection.on_wanted = lambda sequence: (link := me()) is None or link._send_again(sequence)
        connection.shares = lambda: () if (link := me()) is None else tuple(link.exports)
        self._finishing = threading.Lock()
        self._made = True

    def number(self) -> int:
        """A fresh claim number."""
        return next(self._numbers)

    # -- requests ---------------------------------------------------------------------------------

    def request(
        self, number: int, packet: packets.Read | packets.Write | packets.Subscribe, timeout: float
    ) -> tuple[packets.FromAgent, Mail]:
        """Ask for a claim; the reply, and what it came in, which owns its descriptors.

        Raises:
            EthaError: refused, or not answered in time. Then, and when interrupted, the claim is given back.
        """
        connection = self.connection
        deadline, pending = packet.deadline + clock.grace(timeout), Pending(number, encode(packet))
        try:
            connection.claims.add(number)
            connection.expect(pending)
            connection.send_encoded(pending.asked, deadline)
            reply = connection.wait(pending, deadline)
            if isinstance(reply, packets.Refused):
                raise reply.failure.error()
            return reply, pending.mail
        except BaseException:
            connection.tell(packets.Release(number))
            raise
        finally:
            connection.forget(pending)

    def release(self, number: int, fence: int = 0) -> None:
        """Give a claim back, behind a point of this client's work.

        While there is no agent, its successor finds that in the queue: it would hold on to the claim until this process
        calls again, and who waits for it with it."""
        self.connection.tell(packets.Release(number, fence))
        if self.connection.lost and self.connection.usable:
            try:
                self.command(Ticket(), Release(number, fence), clock.now() + _CANCEL_SECONDS, answered=False)
            except EthaError:
                return  # a neighbour stands still with the queue in hand: the successor hears it at the next call

    # -- commands ---------------------------------------------------------------------------------

    def command(
        self, ticket: Ticket, record: Command, deadline: float, *, answered: bool, voids: int = 0, ring: bool = True
    ) -> None:
        """Commit a command, then ring.

        Args:
            ticket: gets the sequence.
            record: the command.
            deadline: ``CLOCK_BOOTTIME`` seconds until which to wait for the queue.
            answered: an outcome will be waited for.
            voids: sequence of an earlier command that this one makes needless, or 0.
            ring: False where `send_descriptors` follows: any packet rings.

        Raises:
            AgentTimeout: another worker held the queue until the deadline.
            QueueFull: the queue is full, and stayed so until the deadline.
        """
        data = encode(record)
        taken: list[bool] = []
        try:
            take(self._order, deadline, taken)
            if not taken[0]:
                raise AgentTimeout(
                    "another thread of this process held the command queue until the deadline.",
                    resource=self.queue.path,
                    remedy="Give a longer timeout.",
                )
            sequence = ticket.sequence = next(self._sequences)
            if answered:
                ticket.pending = Pending(-sequence)
                self.connection.expect(ticket.pending)
            done = {old for old in self._committed if old <= self._served and not self.connection.awaits(old)}
            if voids:
                done.add(voids)
            self._committed.add(sequence)
            self.queue.put(self.connection.client, sequence, data, deadline, done)
            self._committed -= done
        finally:
            if taken and taken[0]:
                self._order.release()
        if ring:
            self.connection.hint(_RING)

    def outcome(self, ticket: Ticket, deadline: float, timeout: float) -> packets.Outcome:
        """Wait for what became of a command.

        Raises:
            EthaError: it failed, or was not answered in time.
        """
        if ticket.pending is None:
            raise ValueError("the command is not one that is answered")
        reply = self.connection.wait(ticket.pending, deadline + clock.grace(timeout))
        if not isinstance(reply, packets.Outcome):
            raise TypeError(f"an outcome was expected, not {type(reply).__name__}")
        self.note_served(reply.served)
        if reply.failure is not None:
            raise reply.failure.error()
        return reply

    def give_up(self, ticket: Ticket, error: BaseException, pin: Any) -> None:
        """The caller of a command gets ``error``. Unless that is the agent's own answer, the command is undone."""
        answered = ticket.pending is not None and ticket.pending.reply is not None
        if answered and isinstance(error, EthaError) and not isinstance(error, TimeoutError | AgentGone):
            self.settle(ticket)
        else:
            self.undo(ticket, pin)

    def settle(self, ticket: Ticket) -> None:
        """Wait for this command no more."""
        if ticket.pending is not None:
            self.connection.forget(ticket.pending)

    def undo(self, ticket: Ticket, pin: Any) -> None:
        """Undo a command whose caller gives up; ``pin`` is kept until the agent has done so, or is gone."""
        sequence, client = ticket.sequence, self.connection.client
        # Only what was served is ever deleted while its client is there: what is neither was never committed.
        if sequence and self.connection.usable and (sequence <= self._served or self.queue.holds(client, sequence)):
            self._owed[sequence] = pin
            self._cancel_owed(clock.now() + _CANCEL_SECONDS)
        self.settle(ticket)

    def _cancel_owed(self, deadline: float) -> None:
        for sequence, pin in list(self._owed.items()):
            cancel = Ticket()
            try:
                # Instead of the command, so that no successor of the agent serves that again.
                self.command(cancel, Cancel(sequence), deadline, answered=True, voids=sequence)
            except EthaError:
                self.settle(cancel)  # somebody stands still with the queue in hand: at the next call, then
                return
            self._pinned[cancel.sequence] = (cancel.pending, pin)
            self._owed.pop(sequence, None)

    def note_served(self, sequence: int) -> None:
        """The agent has served every command up to ``sequence``; they are deleted with the next put."""
        self._served = max(self._served, sequence)

    # -- memory -----------------------------------------------------------------------------------

    def reap(self) -> None:
        """Settle what is over: unmap what nobody views, tell the agent, let go of pins. Every call of etha does so."""
        self.endings.settle(self.release)
        if self._owed:
            self._cancel_owed(clock.now())
        if self._pinned:
            self.connection.drain()
            self._release_pins()
        for link in list(_lingering):
            try:
                link.endings.settle(link.release)
            except EthaError as error:
                logger.debug("a client that was closed cannot settle yet: %s", error)
                continue  # it is tried again with the next call, which is another client's, as this one
            if not link.endings and link.device.done(0.0):
                _lingering.discard(link)
                link._finish()

    def _send_again(self, sequence: int) -> bool:
        """An agent has no descriptors of what this client shares; whether it got them, or nothing can be done."""
        export = self.exports.get(sequence)
        if export is None:
            return True
        try:
            fds = export.reopen()
        except EthaError as error:
            logger.warning("an agent that has restarted cannot be given memory again: %s", error)
            return True
        try:
            self.send_descriptors(sequence, fds, 0.0)
        except EthaError:
            return False  # no room: at the next call
        finally:
            for fd in fds:
                fd.close()
        return True

    def send_descriptors(self, sequence: int, fds: Sequence[SharedFd | None], deadline: float) -> None:
        """Send an export's descriptors, those that are None left out; if there are none, ring.

        Raises:
            EthaError: see `Connection.send`.
        """
        if not any(fds):
            self.connection.hint(_RING)
        first = 0
        while first < len(fds):
            some = list(itertools.takewhile(lambda fd: fd is not None, fds[first : first + packets.FDS_PER_PACKET]))
            if some:
                numbers = [fd.fileno() for fd in some if fd is not None]
                self.connection.send(packets.Descriptors(sequence, first), deadline, numbers)
            first += max(len(some), 1)

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Say goodbye; leave nothing in the queue.

        While tensors of an import are still kept, or device work that others wait for is not done, the connection stays
        open behind the scenes: the agent must not take that memory for closed, nor that work for done. The first call
        of etha after that closes it.
        """
        self.reap()
        busy = self.endings or not self.device.done(clock.now() + _WORK_SECONDS)
        if busy and self.connection.usable:
            _lingering.add(self)
        else:
            self._finish()

    def __del__(self) -> None:
        if self._made and self.connection.usable:
            _lingering.add(self)

    def _finish(self) -> None:
        if not self._finishing.acquire(blocking=False):
            return  # done, or another thread is about it
        self.connection.close()
        try:
            if self.connection.lost:
                self._leave_word()
            elif self._committed:
                self.queue.delete(self.connection.client, sorted(self._committed), clock.now() + 1.0)
        except EthaError:
            pass  # a neighbour stands still with the queue in hand: the agent's helper deletes them
        finally:
            self._owed.clear()
            self._pinned.clear()
            self.queue.close()
            self.state.close()
            self.device.close()

    def _leave_word(self) -> None:
        """There is no agent to say goodbye to: its successor finds it in the queue, behind what else stands there."""
        self.queue.put(self.connection.client, next(self._sequences), encode(Leave()), clock.now() + 1.0)

    def _release_pins(self) -> None:
        for sequence, (pending, _) in list(self._pinned.items()):
            if pending.reply is not None:
                self.connection.forget(pending)
                self._pinned.pop(sequence, None)


def _state_of(connection: Connection, paths: AgentPaths) -> StateReader:
    """The state at the path, if it is that of the agent at the other end, or of one that has followed it meanwhile.

    Raises:
        InvalidArgument: it is another agent's.
    """
    state = StateReader(paths.state)
    record = state.agent()
    follows = record is not None and os.path.realpath(record.command) == os.path.realpath(paths.command)
    if record is not None and record.epoch != connection.epoch and not follows:
        state.close()
        raise InvalidArgument(
            f"{paths.state} is the state of pid {record.pid}, {paths.command} the queue of {connection.agent.label}.",
            resource=paths.state,
            holder=f"pid {record.pid}",
            remedy="Give the paths of one agent.",
        )
    return state


_lingering: set[Link] = set()
"""Links that are to be closed as soon as no import of theirs is viewed any more: closed ones, and those that were
dropped with everything made of them. (A finaliser may take no locks, so it leaves the closing to the next call of
etha.)"""


def _forget_in_child() -> None:
    _lingering.clear()


os.register_at_fork(after_in_child=_forget_in_child)
