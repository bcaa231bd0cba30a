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
import select
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Final

import msgspec

from etha.errors import EthaError, InvalidArgument, InvalidRecord, SystemLimit
from etha.tensor_bus import clock, packets, wire
from etha.tensor_bus.command_queue import CLIENT_ID_BYTES, CommandQueue
from etha.tensor_bus.fencing import Fencing
from etha.tensor_bus.front_door import FrontDoor
from etha.tensor_bus.ipc import devices
from etha.tensor_bus.ipc.backend import HOST, Backend
from etha.tensor_bus.ipc.cuda_backend import CudaBackend, device_of
from etha.tensor_bus.journal import Journal
from etha.tensor_bus.lockfile import AgentLock
from etha.tensor_bus.memory import Backstage, raise_descriptor_limit
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.premises import Premises
from etha.tensor_bus.reception import Reception
from etha.tensor_bus.recovery import Recovered, recover
from etha.tensor_bus.registry import Registry
from etha.tensor_bus.service import Service
from etha.tensor_bus.sessions import Session
from etha.tensor_bus.state import AGENT_KEY, AgentRecord, StateReader
from etha.tensor_bus.state_writer import StateWriter
from etha.tensor_bus.switchboard import Switchboard

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
        """Take the path, and what an agent before left there: its workers where any live, else nothing.

        Args:
            rank: of this agent, >= 0.
            device: what it serves: ``"cpu"``, torch's shared memory; ``"cuda:0"``, as this process counts them.
            lmdb_command_queue_path, agent_state_lmdb_path: its files, where not those of the convention.

        Raises:
            AgentRunning: another agent serves this path, or has this state; ``holder`` names it.
            VersionMismatch: an agent of another record schema has left workers there. Nothing was touched.
            UnsafePath: a file or directory that others could have planted, or that is no agent's. It is untouched.
            InvalidArgument: the device is none that this process sees, or not that of the workers there, or two files
                would be one.
            DriverError: there is no CUDA driver, or it refuses.
            SystemLimit: the files cannot be made.
        """
        identity = devices.identity_of(device)
        self.rank = rank
        self.paths = agent_paths(rank, lmdb_command_queue_path, agent_state_lmdb_path)
        raise_descriptor_limit()
        self._premises = Premises(self.paths)
        with ExitStack() as undo:
            self._lock = AgentLock(self.paths.lock, rank, identity)
            undo.callback(self._give_up_lock)
            inherits = self._premises.take_over(self._lock.previous)
            undo.callback(self._premises.leave, remove=not inherits)
            self._require_same_device(inherits)
            self._queue = CommandQueue(self.paths, create=True)
            undo.callback(self._queue.close)
            self._premises.hold(self.paths.command)
            self._writer = StateWriter(self.paths.state)
            undo.callback(self._writer.close)
            self._premises.hold(self.paths.state)
            self._started = clock.now()
            self._registry = Registry()
            self._journal = Journal(self._writer, self._registry)
            self._backstage = Backstage()
            undo.callback(self._backstage.close)
            uuid = devices.uuid_of(identity)
            self._fencing = Fencing(device=uuid is not None)
            undo.callback(self._fencing.close)
            backend = partial(_backend, uuid)
            self._service = Service(self._queue, self._journal, self._registry, self._backstage, self._fencing, backend)
            self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._stop)
            self._stopping = False
            self._board = Switchboard()
            undo.callback(self._board.close)
            self._next_heartbeat = self._next_look = self._started
            self._accepting = True
            self._reception = Reception(
                self.paths.command,
                self._lock.text,
                self._board,
                self._service,
                self._queue,
                self._writer,
                self._backstage,
            )
            if inherits:
                self._reception.adopt(self._recover(), self._started)
            self._door = FrontDoor(self.paths.socket)  # last: who comes in meets all that the predecessor knew
            undo.pop_all()
        for fd in (self._door.fileno(), self._backstage.fileno(), self._stop):
            self._board.watch(fd)

    def _give_up_lock(self) -> None:
        """Give the path up again. Where a predecessor's lock file stood, one stays: its workers may live."""
        self._lock.release(remove=self._lock.previous is None)

    def _require_same_device(self, inherits: bool) -> None:
        previous = self._lock.previous
        if inherits and previous is not None and previous.device != self._lock.text.device:
            raise InvalidArgument(
                f"the workers at {self.paths.command} share memory of {previous.device}, not of"
                f" {self._lock.text.device}.",
                resource="device",
                remedy="Serve that device, use another rank, or end those workers.",
            )

    def _recover(self) -> Recovered:
        """What the predecessor recorded, and that there is a successor, before any worker can ask."""
        reader = StateReader(self.paths.state)
        try:
            found = recover(reader.everything(), self._registry, self._journal, self._started)
        finally:
            reader.close()
        for client in self._registry.table.clients.values():
            self._fencing.keep(client.slot)
            client.fenced = not self._fencing.needed
        self._journal.put(AGENT_KEY, self._record(self._started, {}))
        self._journal.commit(self._started)
        return found

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
        events = self._board.wait(0 if beginners else self._patience())
        now = clock.now()
        service.turn(now)
        for fd, _ in events:
            if fd in self._board.by_pidfd:
                self._reception.guarded(self._board.by_pidfd[fd], self._reception.died, now)
        for fd, mask in events:
            session = self._board.by_socket.get(fd)
            if session is not None:
                if mask & select.EPOLLOUT:
                    self._reception.guarded(session, self._send_on, now)
                self._reception.guarded(session, self._talk, now)
            elif fd == self._door.fileno():
                self._admit(now)
            elif fd == self._backstage.fileno():
                self._backstage.results()
            elif fd == self._stop:
                self._stopping = True
        if now >= self._next_look:
            self._look(now)
        if now >= self._next_heartbeat:
            self._heartbeat(now)
        service.registry.judge(beginners, now)
        service.registry.expire(now)
        # Put off once only: else workers that begin to wait in every turn would keep the others' news from the state.
        service.settle(now, unjudged=service.registry.table.beginning and not beginners)
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
            self._board.unwatch(self._door.fileno())
            return
        for session in sessions:
            if len(self._board.strangers) >= _MAX_STRANGERS:
                self._reception.cut(next(iter(self._board.strangers.values())), now)
            self._board.admit(session)

    def _send_on(self, session: Session, _: float) -> None:
        session.flush()
        self._board.arm(session)

    def _talk(self, session: Session, now: float) -> None:
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
                self._reception.cut(session, now)
                return
            if not data:
                wire.close_all(fds)
                self._reception.cut(session, now)
                return
            try:
                self._take(session, data, fds, now)
            except EthaError as error:
                self._service.counters["refused packets"] += 1
                logger.warning("%s sent what makes no sense: %s", session.peer.label, error)
                self._reception.cut(session, now)
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
        if isinstance(packet, packets.Hello):
            wire.close_all(fds)
            self._reception.welcome(session, packet, now)
        elif isinstance(packet, packets.Goodbye):
            wire.close_all(fds)
            self._reception.left(session, now)
        else:
            self._service.packet(session, packet, fds, now)

    def _watch_backlogs(self, now: float) -> None:
        for session in [each for each in self._board.by_socket.values() if each.failed or each.backlog]:
            if session.stuck:
                if not session.failed:
                    logger.warning("%s does not read; its connection is cut", session.peer.label)
                self._reception.guarded(session, self._reception.cut, now)
            else:
                if session.choked:
                    self._next_look = min(self._next_look, now + _CHOKED_SECONDS)
                self._board.arm(session)

    # -- the heartbeat ----------------------------------------------------------------------------

    def _heartbeat(self, now: float) -> None:
        self._next_heartbeat = now + HEARTBEAT_SECONDS
        for session in self._service.sessions():
            self._reception.guarded(session, self._service.serve, now)
            if session.leaving:
                self._reception.guarded(session, self._reception.left, now)
        for session in [s for s in self._board.strangers.values() if now - s.since > _GREETING_SECONDS]:
            self._reception.cut(session, now)
        if not self._accepting:
            self._accepting = True
            self._board.watch(self._door.fileno())
        self._backstage.chore(self._sweep, self._reception.cleared)
        counters = {**self._service.counters, "refused connections": self._door.refused}
        self._journal.put(AGENT_KEY, self._record(now, counters))

    def _record(self, now: float, counters: dict[str, int]) -> AgentRecord:
        return AgentRecord(
            **msgspec.structs.asdict(self._lock.text),
            command=self.paths.command,
            started=self._started,
            heartbeat=now,
            counters=counters,
        )

    def _look(self, now: float) -> None:
        self._next_look = now + _LOOK_SECONDS
        for session in self._board.by_socket.values():
            if session.choked:
                session.flush()
        if self._fencing.needed:
            self._registry.look_for_readers(self._fencing.reached, now)
        if not self._lock.still_ours():
            logger.error("%s was removed under this agent; it stops", self.paths.lock)
            self._stopping = True

    def _sweep(self) -> int:
        """Beside the loop: drop what nobody will serve, and the reader slots of the dead."""
        self._reception.free_slots()
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
        self._board.close()
        if self._backstage.close():  # else a thread may be inside them: they end with the process
            self._queue.close()
            self._writer.close()
        if self._lock.still_ours():
            self._premises.leave(remove=not workers)
        self._premises.close()
        self._fencing.close()
        self._lock.release(remove=not workers)
        stop, self._stop = self._stop, -1  # last: until here a second signal may come
        os.close(stop)


def _backend(uuid: bytes | None) -> Backend:
    """How this process opens memory. On a device that makes a context, so it is asked for off the loop, with the first
    tensor; the agent owns no memory of its own."""
    return HOST if uuid is None else CudaBackend(device_of(uuid), bytes(CLIENT_ID_BYTES))
