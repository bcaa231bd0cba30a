"""The agent: one process per device that knows who publishes, who reads, and who has died.

`TensorBusAgent` owns the path's lock, its two LMDB files, its socket and its control loop. The loop waits in
``epoll`` for connections, packets, deaths (pidfds) and what the threads beside it have done; it never waits for a
worker. Deaths are taken before anything else in a turn, so that a request never meets a claim of the dead.

Called by ``etha agent``. One agent per process; `run` belongs to one thread, `stop` may be called from any and from a
signal handler.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Final

import msgspec

from etha.errors import EthaError, InvalidArgument, InvalidRecord, SystemLimit
from etha.tensor_bus import clock, packets, wire
from etha.tensor_bus.command_queue import CLIENT_ID_BYTES, CommandQueue
from etha.tensor_bus.front_door import FrontDoor, mismatch
from etha.tensor_bus.ipc.leftovers import remove_leftovers
from etha.tensor_bus.journal import Journal
from etha.tensor_bus.lockfile import AgentLock
from etha.tensor_bus.memory import Backstage, raise_descriptor_limit
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.premises import Premises
from etha.tensor_bus.records import Failure
from etha.tensor_bus.registry import Registry
from etha.tensor_bus.service import Service
from etha.tensor_bus.sessions import Session
from etha.tensor_bus.state import AGENT_KEY, AgentRecord, StateWriter

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.25
"""How often an agent looks whether its path is still its own."""

_CHOKED_SECONDS: Final = 0.02
"""How soon to try again where too many descriptors of this user are on their way."""

_PACKETS_PER_TURN: Final = 64
_GREETING_SECONDS: Final = 5.0
_MAX_STRANGERS: Final = 256
"""Connections that have not said hello yet; beyond this the oldest is cut."""


class TensorBusAgent:
    """Serves one path until it is told to stop."""

    def __init__(
        self,
        rank: int = 0,
        device: str = "cpu",
        lmdb_command_queue_path: str | None = None,
        agent_state_lmdb_path: str | None = None,
    ) -> None:
        """Take the path, and clear away what a dead agent left there.

        Args:
            rank: of this agent, >= 0.
            device: what it serves: ``"cpu"``, torch's shared memory.
            lmdb_command_queue_path, agent_state_lmdb_path: its files, where not those of the convention.

        Raises:
            AgentRunning: another agent serves this path, or has this state; ``holder`` names it.
            UnsafePath: a file or directory that others could have planted, or that is no agent's. It is untouched.
            InvalidArgument: the device is not one that this build serves, or two files would be one.
            SystemLimit: the files cannot be made.
        """
        if device != "cpu":
            raise InvalidArgument(
                f"this build has the host backend only; it cannot serve {device!r}.",
                resource="device",
                remedy="Say --device cpu.",
            )
        self.rank = rank
        self.paths = agent_paths(rank, lmdb_command_queue_path, agent_state_lmdb_path)
        raise_descriptor_limit()
        self._premises = Premises(self.paths)
        with ExitStack() as undo:
            self._lock = AgentLock(self.paths.lock, rank, device)
            undo.callback(self._lock.release, remove=True)
            self._premises.clear()
            undo.callback(self._premises.leave, remove=True)
            self._queue = CommandQueue(self.paths, create=True)
            undo.callback(self._queue.close)
            self._premises.hold(self.paths.command)
            self._writer = StateWriter(self.paths.state)
            undo.callback(self._writer.close)
            self._premises.hold(self.paths.state)
            self._door = FrontDoor(self.paths.socket)
            undo.pop_all()
        self._started = clock.now()
        self._backstage = Backstage()
        registry = Registry()
        self._journal = Journal(self._writer, registry)
        self._service = Service(self._queue, self._journal, registry, self._backstage)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._epoll = select.epoll()
        self._strangers: dict[int, Session] = {}
        self._by_socket: dict[int, Session] = {}
        self._by_pidfd: dict[int, Session] = {}
        self._next_heartbeat = self._next_look = self._started
        self._accepting = True
        for fd in (self._door.fileno(), self._backstage.fileno(), self._stop):
            self._epoll.register(fd, select.EPOLLIN)

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`; ``ready`` is called once workers can connect.

        When it returns, the agent's files are gone, or, if a worker is still registered, left for a successor.
        """
        try:
            self._turn()
            ready()
            while not self._stopping:
                self._turn()
        finally:
            self._close()

    def stop(self) -> None:
        """Make `run` return after its turn; once it has, this does nothing."""
        if self._stop >= 0:
            os.eventfd_write(self._stop, 1)

    # -- the loop ---------------------------------------------------------------------------------

    def _turn(self) -> None:
        service = self._service
        # Judged behind this turn's events: whatever was sent before them has been taken in then.
        beginners = service.registry.table.take_beginners()
        events = self._epoll.poll(0 if beginners else self._patience())
        now = clock.now()
        service.turn(now)
        for fd, _ in events:
            if fd in self._by_pidfd:
                self._guarded(self._by_pidfd[fd], self._died, now)
        for fd, mask in events:
            if fd == self._door.fileno():
                self._admit(now)
            elif fd == self._backstage.fileno():
                self._backstage.results()
            elif fd == self._stop:
                self._stopping = True
            elif fd in self._by_socket:
                self._guarded(self._by_socket[fd], partial(self._talk, mask), now)
        if now >= self._next_look:
            self._look(now)
        if now >= self._next_heartbeat:
            self._heartbeat(now)
        service.registry.judge(beginners, now)
        service.registry.expire(now)
        service.settle(now)
        self._watch_backlogs(now)

    def _patience(self) -> float:
        deadline = min(self._next_heartbeat, self._next_look)
        first = self._service.registry.table.next_deadline()
        if first is not None and first < deadline:
            deadline = first
        return clock.remaining(deadline)

    def _admit(self, now: float) -> None:
        try:
            sessions = self._door.admit(now)
        except SystemLimit as error:
            logger.warning("%s; trying again in a second", error)
            self._accepting = False
            self._epoll.unregister(self._door)
            return
        for session in sessions:
            if session.sock is None:
                continue
            if len(self._strangers) >= _MAX_STRANGERS:
                self._cut(next(iter(self._strangers.values())), now)
            self._strangers[session.sock.fileno()] = session
            self._by_socket[session.sock.fileno()] = session
            self._epoll.register(session.sock, select.EPOLLIN)

    def _guarded(self, session: Session, handle: Callable[[Session, float], None], now: float) -> None:
        try:
            handle(session, now)
        except Exception:  # whatever it is: a mistake of ours about one worker must not end everyone's service
            self._service.counters["mistakes"] += 1
            logger.exception("%s met a mistake of etha's; its connection is cut", session.peer.label)
            session.failed = True

    def _talk(self, mask: int, session: Session, now: float) -> None:
        if mask & select.EPOLLOUT:
            session.flush()
            self._arm(session)
        for _ in range(_PACKETS_PER_TURN):
            if session.sock is None:
                return
            try:
                data, fds = wire.receive(session.sock)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it left replies unread when it closed; what it had sent before, its goodbye too, comes now
            except InvalidRecord as error:
                self._service.descriptors_lost(session, error)
                continue
            except OSError:
                self._cut(session, now)
                return
            if not data:
                wire.close_all(fds)
                self._cut(session, now)
                return
            try:
                self._take(session, data, fds, now)
            except EthaError as error:
                self._service.counters["refused packets"] += 1
                logger.warning("%s sent what makes no sense: %s", session.peer.label, error)
                self._cut(session, now)
                return

    def _take(self, session: Session, data: bytes, fds: list[int], now: float) -> None:
        try:
            packet = packets.FROM_WORKER.decode(data)
        except InvalidRecord:
            wire.close_all(fds)
            raise
        if isinstance(packet, packets.Hello) != (session.client == b""):
            wire.close_all(fds)
            raise InvalidRecord("a greeting comes first, and once.", resource="Hello")
        if not isinstance(packet, packets.Hello | packets.Goodbye):
            self._service.packet(session, packet, fds, now)
            return
        wire.close_all(fds)
        self._welcome(session, packet, now) if isinstance(packet, packets.Hello) else self._left(session, now)

    def _welcome(self, session: Session, hello: packets.Hello, now: float) -> None:
        text = self._lock.text
        error = mismatch(hello, text, self.paths.command)
        if error is not None:
            logger.info("refused %s: %s: %s", session.peer.label, type(error).__name__, error.message)
            session.send(packets.Refused(0, Failure.of(error)))
            self._cut(session, now)
            return
        if session.sock is not None:
            self._strangers.pop(session.sock.fileno(), None)
        session.client = secrets.token_bytes(CLIENT_ID_BYTES)
        self._by_pidfd[session.peer.fileno()] = session
        self._epoll.register(session.peer.fileno(), select.EPOLLIN)
        self._service.joined(session, now)
        session.send(packets.Welcome(session.client, text.epoch))

    # -- ends -------------------------------------------------------------------------------------

    def _cut(self, session: Session, now: float) -> None:
        """The connection is over. What the worker holds stays until it dies; if it holds nothing, it has left."""
        if session.client and not session.peer.alive():
            self._died(session, now)
        elif session.client and not self._service.holds(session, now):
            self._left(session, now)
        else:
            self._leave_socket(session)
            session.hang_up()
            if session.client:
                self._service.orphaned(session, now)
            else:
                session.close()

    def _left(self, session: Session, now: float) -> None:
        self._part(session)
        logger.info("%s left", session.peer.label)
        self._service.left(session, now)
        self._clear_after(session)
        session.close()

    def _died(self, session: Session, now: float) -> None:
        self._part(session)
        logger.info("%s died", session.peer.label)
        self._service.died(session, now)
        self._clear_after(session)
        pid, uid, started = session.peer.pid, session.peer.uid, session.peer.started
        self._backstage.chore(lambda: remove_leftovers(pid, uid, started), self._removed)
        session.close()

    def _part(self, session: Session) -> None:
        self._leave_socket(session)
        self._by_pidfd.pop(session.peer.fileno(), None)
        self._epoll.unregister(session.peer.fileno())

    def _leave_socket(self, session: Session) -> None:
        if session.sock is not None:
            fd = session.sock.fileno()
            self._strangers.pop(fd, None)
            if self._by_socket.pop(fd, None) is not None:
                self._epoll.unregister(fd)

    def _clear_after(self, session: Session) -> None:
        client, queue = session.client, self._queue
        self._backstage.chore(lambda: queue.delete_client(client, clock.now() + HEARTBEAT_SECONDS), self._cleared)

    def _cleared(self, result: object) -> None:
        if isinstance(result, int):
            self._service.counters["commands deleted"] += result

    def _removed(self, result: object) -> None:
        if isinstance(result, list) and result:
            self._service.counters["files removed"] += len(result)
            logger.info("removed what a dead worker left: %s", ", ".join(map(str, result)))

    def _watch_backlogs(self, now: float) -> None:
        for session in list(self._by_socket.values()):
            if session.stuck:
                if not session.failed:
                    logger.warning("%s does not read; its connection is cut", session.peer.label)
                self._guarded(session, self._cut, now)
            elif session.backlog:
                if session.choked:
                    self._next_look = min(self._next_look, now + _CHOKED_SECONDS)
                self._arm(session)

    def _arm(self, session: Session) -> None:
        if session.sock is not None and session.sock.fileno() in self._by_socket:
            mask = select.EPOLLIN | (select.EPOLLOUT if session.backlog and not session.choked else 0)
            self._epoll.modify(session.sock, mask)

    # -- the heartbeat ----------------------------------------------------------------------------

    def _heartbeat(self, now: float) -> None:
        self._next_heartbeat = now + HEARTBEAT_SECONDS
        for session in self._service.sessions():
            self._guarded(session, self._service.serve, now)
        for session in [s for s in self._strangers.values() if now - s.since > _GREETING_SECONDS]:
            self._cut(session, now)
        if not self._accepting:
            self._accepting = True
            self._epoll.register(self._door, select.EPOLLIN)
        self._backstage.chore(self._sweep, self._cleared)
        self._journal.put(
            AGENT_KEY,
            AgentRecord(
                **msgspec.structs.asdict(self._lock.text),
                command=self.paths.command,
                started=self._started,
                heartbeat=now,
                counters={**self._service.counters, "refused connections": self._door.refused},
            ),
        )

    def _look(self, now: float) -> None:
        self._next_look = now + _LOOK_SECONDS
        for session in self._by_socket.values():
            if session.choked:
                session.flush()
        if not self._lock.still_ours():
            logger.error("%s was removed under this agent; it stops", self.paths.lock)
            self._stopping = True

    def _sweep(self) -> int:
        """Beside the loop: drop what nobody will serve, and the reader slots of the dead."""
        self._queue.reader_check()
        self._writer.reader_check()
        found = self._queue.clients()  # before asking who is known: a client joins before it commands
        strangers = found - self._service.clients
        return sum(self._queue.delete_client(client, clock.now() + HEARTBEAT_SECONDS) for client in strangers)

    # -- files ------------------------------------------------------------------------------------

    def _close(self) -> None:
        """Stop taking connections, serve what is committed, leave nothing behind that nobody needs."""
        self._door.close()
        now = clock.now()
        self._service.turn(now)
        try:
            for session in self._service.sessions():
                self._service.serve(session, now)
            self._service.settle(now)
        finally:
            self._leave()

    def _leave(self) -> None:
        workers = bool(self._service.clients)
        for session in [*self._by_socket.values(), *self._by_pidfd.values()]:
            session.close()
        if self._backstage.close():  # else a thread may be inside them: they end with the process
            self._queue.close()
            self._writer.close()
        self._epoll.close()
        if self._lock.still_ours():
            self._premises.leave(remove=not workers)
        self._premises.close()
        self._lock.release(remove=not workers)
        stop, self._stop = self._stop, -1  # last: until here a second signal may come
        os.close(stop)
