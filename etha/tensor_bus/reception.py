"""How workers come, come back, and go: by a greeting, by a goodbye, by the end of a connection, by death.

A client is a process and the id that it was given. Its connection may end and another may follow, to this agent or from
the one before; the process is watched all the while.

Used by the agent's control loop only.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from typing import Final

from etha.errors import SystemLimit
from etha.tensor_bus import clock, packets
from etha.tensor_bus.command_queue import CLIENT_ID_BYTES, CommandQueue
from etha.tensor_bus.front_door import mismatch, same_process, unknown_client
from etha.tensor_bus.ipc.leftovers import remove_leftovers
from etha.tensor_bus.lockfile import LockText
from etha.tensor_bus.memory import Backstage
from etha.tensor_bus.records import Failure
from etha.tensor_bus.recovery import Recovered
from etha.tensor_bus.service import Service
from etha.tensor_bus.sessions import Session
from etha.tensor_bus.state_writer import StateWriter
from etha.tensor_bus.switchboard import Switchboard

logger = logging.getLogger(__name__)

_QUEUE_SECONDS: Final = 1.0
"""How long a chore waits for the turn to write the queue."""


class Reception:
    """Lets workers in and out."""

    def __init__(
        self,
        path: str,
        text: LockText,
        board: Switchboard,
        service: Service,
        queue: CommandQueue,
        state: StateWriter,
        backstage: Backstage,
    ) -> None:
        self._path = path
        self._text = text
        self._board = board
        self._service = service
        self._queue = queue
        self._state = state
        self._backstage = backstage

    def welcome(self, session: Session, hello: packets.Hello, now: float) -> None:
        """A connection says who it is."""
        text = self._text
        error = mismatch(hello, text, self._path)
        if error is not None:
            logger.info("refused %s: %s: %s", session.peer.label, type(error).__name__, error.message)
            session.send(packets.Refused(0, Failure.of(error)))
            self.cut(session, now)
            return
        self._board.greeted(session)
        if hello.client:
            self._welcome_back(session, hello.client, now)
            return
        try:
            slot = self._service.fencing.take()
        except SystemLimit as limit:
            session.send(packets.Refused(0, Failure.of(limit)))
            self.cut(session, now)
            return
        session.client = secrets.token_bytes(CLIENT_ID_BYTES)
        self._board.watch_process(session)
        self._service.joined(session, now, packets.Welcome(session.client, text.epoch, slot=slot))

    def _welcome_back(self, stranger: Session, client: bytes, now: float) -> None:
        """A client has another connection: its claims are its own again, if it is the process that it says."""
        known = self._service.client(client)
        if known is None or not same_process(known, stranger):
            logger.warning("refused %s: it is no client of this agent's, nor of the one before", stranger.peer.label)
            stranger.send(packets.Refused(0, Failure.of(unknown_client(self._path, stranger.peer.label))))
            self.cut(stranger, now)
            return
        if known.sock is not None:  # its end has not been seen yet
            self._board.leave_socket(known)
            self._service.orphaned(known, now)
        known.take_over(stranger)
        self._board.move_socket(known)
        fencing, slot = self._service.fencing, self._service.registry.table.clients[client].slot
        known.send(packets.Welcome(client, self._text.epoch, known.served, slot), fencing.fds())
        self._service.rejoined(known, now)

    def adopt(self, found: Recovered, now: float) -> None:
        """Watch the workers of a predecessor that live, serve what they committed, and end those that died."""
        if found.living or found.dead:
            logger.info("took over %d workers that live, and %d that died", len(found.living), len(found.dead))
        for session in found.living:
            self._board.watch_process(session)
            self.guarded(session, self._service.adopted, now)
            if session.leaving:
                self.guarded(session, self.left, now)
        for client, record in found.dead.items():
            logger.info("%s died while there was no agent", record.label)
            self._service.let_go(client)
            self._service.registry.client_died(client, now)
            self._service.counters["deaths"] += 1
            self._remove_leftovers(record.pid, os.geteuid(), record.started)
        self._service.settle(now)

    def guarded(self, session: Session, handle: Callable[[Session, float], None], now: float) -> None:
        """Do something about one worker; if that is a mistake of ours, its connection is to be cut."""
        try:
            handle(session, now)
        except Exception:  # whatever it is: a mistake of ours about one worker must not end everyone's service
            self._service.counters["mistakes"] += 1
            logger.exception("%s met a mistake of etha's; its connection is cut", session.peer.label)
            session.failed = True

    def cut(self, session: Session, now: float) -> None:
        """The connection is over. What the worker holds stays until it dies; if it holds nothing, it has left."""
        if session.client and not session.peer.alive():
            self.died(session, now)
        elif session.client and not self._service.holds(session, now):
            self.left(session, now)
        else:
            self._board.leave_socket(session)
            session.hang_up()
            if session.client:
                self._service.orphaned(session, now)
            else:
                session.close()

    def left(self, session: Session, now: float) -> None:
        """It holds nothing any more, by its own word."""
        self._board.part(session)
        logger.info("%s left", session.peer.label)
        self._service.left(session, now)
        self._clear_after(session)
        session.close()

    def died(self, session: Session, now: float) -> None:
        """Its process is dead."""
        self._board.part(session)
        logger.info("%s died", session.peer.label)
        self._service.died(session, now)
        self._clear_after(session)
        self._backstage.chore(self.free_slots, lambda _: None)
        self._remove_leftovers(session.peer.pid, session.peer.uid, session.peer.started)
        session.close()

    def free_slots(self) -> None:
        """Beside the loop: give the slots that the dead have in LMDB's tables of readers to the living."""
        self._queue.reader_check()
        self._state.reader_check()

    def _remove_leftovers(self, pid: int, uid: int, started: int) -> None:
        self._backstage.chore(lambda: remove_leftovers(pid, uid, started), self._removed)

    def _clear_after(self, session: Session) -> None:
        client, queue = session.client, self._queue
        self._backstage.chore(lambda: queue.delete_client(client, clock.now() + _QUEUE_SECONDS), self.cleared)

    def cleared(self, result: object) -> None:
        """So many commands of the dead were deleted."""
        if isinstance(result, int):
            self._service.counters["commands deleted"] += result

    def _removed(self, result: object) -> None:
        if isinstance(result, list) and result:
            self._service.counters["files removed"] += len(result)
            logger.info("removed what a dead worker left: %s", ", ".join(map(str, result)))
