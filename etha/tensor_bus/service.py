"""What the agent does with what its workers say: packets and commands in, registry calls, replies out.

One turn of the control loop is: take in what has arrived (`packet`, `commands`, `died`, ...), then `settle`, which
records all changes in one transaction and only then carries out the effects. Everything a worker sent is checked
here, and what is wrong fails that worker alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Final

from etha.errors import EthaError
from etha.tensor_bus import claims, packets, verdicts
from etha.tensor_bus.claim_table import AskUnmap, CloseMemory, Effect, Failed, Granted, MoveMemory, OpenMemory, Ring
from etha.tensor_bus.claims import Import, Lease, Publication, Rebinding, Registration, Update
from etha.tensor_bus.command_queue import CommandQueue
from etha.tensor_bus.fencing import Fencing
from etha.tensor_bus.ipc.backend import Backend
from etha.tensor_bus.ipc.observation import Observation, observe
from etha.tensor_bus.journal import Journal
from etha.tensor_bus.memory import Backstage, Memory
from etha.tensor_bus.orders import Answer, Orders
from etha.tensor_bus.records import Failure
from etha.tensor_bus.registry import Registry
from etha.tensor_bus.requests import Requests
from etha.tensor_bus.sessions import Session
from etha.tensor_bus.state import MemoryRecord, OutcomeRecord, memory_key

logger = logging.getLogger(__name__)

_VERDICTS: Final = (Granted, Failed)


class Service:
    """The agent's behaviour towards its workers. Used by the control loop only.

    Attributes:
        registry: the rules.
        fencing: the slots of its clients, where it serves a device.
        counters: what was refused, dropped, served; shown by ``etha status``.
    """

    def __init__(
        self,
        queue: CommandQueue,
        journal: Journal,
        registry: Registry,
        backstage: Backstage,
        fencing: Fencing,
        backend: Callable[[], Backend],
    ) -> None:
        self.registry = registry
        self.fencing = fencing
        self.counters: Counter[str] = Counter()
        self._queue = queue
        self._journal = journal
        self._backstage = backstage
        self._memory = Memory(backstage, backend, self._memory_opened, self._memory_moved, self._memory_closed)
        self._sessions: dict[bytes, Session] = {}
        self._orders = Orders(registry, journal, self._memory, self.counters)
        self._requests = Requests(registry, journal, self._memory, fencing)
        self._unrecorded: tuple[list[Effect], list[Answer]] = ([], [])
        self._newcomers: list[tuple[Session, packets.Welcome]] = []
        self._now = 0.0

    def turn(self, now: float) -> None:
        """A turn of the control loop begins."""
        self._now = now

    # -- workers come and go ----------------------------------------------------------------------

    def joined(self, session: Session, now: float, welcome: packets.Welcome) -> None:
        """A session has been given its client id; it is told once that is on record, so that a successor knows it."""
        self._newcomers.append((session, welcome))
        self._sessions[session.client] = session
        peer = session.peer
        self.registry.client_joined(session.client, peer.pid, peer.label, now, peer.started, welcome.slot)

    def adopted(self, session: Session, now: float) -> None:
        """A predecessor's client: the registry knows it, and its process lives. What it committed is served.

        So are commands that were served and have no outcome on record: their caller still waits, and each is safe to
        run twice.
        """
        self._sessions[session.client] = session
        outcomes = self._journal.outcomes(session.client)
        mine = (each for each in self.registry.publications.values() if each.owner == session.client)
        recovering = [(each.generation, each.sequence, each.manifest) for each in mine if each.recovering]
        if self.fencing.needed:
            self._memory.await_owner(session.client, recovering)
        else:
            self._memory.recover(session.client, session.peer, recovering)
        for sequence, data in self._queue.commands_of(session.client, 0):
            if sequence <= session.served and sequence not in outcomes:
                self._orders.serve(session, sequence, data, now, again=True)
        self.serve(session, now)

    def client(self, client: bytes) -> Session | None:
        """The session of a client that is not gone."""
        return self._sessions.get(client)

    def rejoined(self, session: Session, now: float) -> None:
        """A client whose connection had ended has another one: ask for what died with the first."""
        self.registry.client_rejoined(session.client)
        self.serve(session, now)
        for sequence in self._memory.wanting(session.client):
            session.send(packets.Wanted(sequence))
        for publication in self.registry.publications.values():
            self._tell_fault(session, publication)

    def orphaned(self, session: Session, now: float) -> None:
        """Its connection has ended; its process lives."""
        self.registry.client_orphaned(session.client, now)

    def holds(self, session: Session, now: float) -> bool:
        """Whether it holds, waits for or owns anything."""
        self.serve(session, now)
        return self.registry.table.clients[session.client].busy

    def left(self, session: Session, now: float) -> None:
        """It said goodbye."""
        self.serve(session, now)
        del self._sessions[session.client]
        self.let_go(session.client)
        self.registry.client_left(session.client, now)
        self._memory.retract(session.client)

    def died(self, session: Session, now: float) -> None:
        """Its process is dead: what it committed is served first, then everything of it goes."""
        self.serve(session, now)
        del self._sessions[session.client]
        self.let_go(session.client)
        self.registry.client_died(session.client, now)
        self._memory.retract(session.client)
        self.counters["deaths"] += 1

    def let_go(self, client: bytes) -> None:
        """The client's process is dead, or it has waited for its own work: no stream waits for it any more."""
        self.fencing.release(self.registry.table.clients[client].slot)

    @property
    def clients(self) -> set[bytes]:
        """Every client that is not gone."""
        return set(self._sessions)

    def sessions(self) -> list[Session]:
        """Every session of a client that is not gone."""
        return list(self._sessions.values())

    # -- commands ---------------------------------------------------------------------------------

    def serve(self, session: Session, now: float) -> None:
        """Serve the commands of one worker that are committed and not served yet."""
        if self._queue.last_transaction() == session.queue_seen:
            return
        read, found = self._queue.news_of(session.client, session.served)
        for sequence, data in found:
            session.served = sequence
            self._journal.served(session.client, sequence)
            self.counters["commands"] += 1
            self._orders.serve(session, sequence, data, now)
        session.queue_seen = read

    # -- packets ----------------------------------------------------------------------------------

    def packet(self, session: Session, packet: packets.FromWorker, fds: list[int], now: float) -> None:
        """Act on one packet of a worker that has been welcomed.

        Raises:
            InvalidRecord: it makes no sense; the connection is to be cut. Its descriptors are closed.
        """
        self.serve(session, now)
        self._requests.take(session, packet, fds, now)

    def descriptors_lost(self, session: Session, error: EthaError) -> None:
        """A packet with descriptors was cut short."""
        self._memory.lost(session.client, error)

    # -- settling ---------------------------------------------------------------------------------

    def settle(self, now: float, *, unjudged: bool = False) -> None:
        """Record what has changed, then tell those whom it concerns; until nothing is left to do.

        Args:
            now: of this turn.
            unjudged: another turn follows at once, which judges what has begun to wait in this one. Where nobody is to
                be told anything, what has changed is recorded there, with the verdict: one transaction, not two.

        What cannot be recorded (a full disk) is not done either: it waits, and so do those whom it concerns, for the
        first turn that can record it.
        """
        table = self.registry.table
        while (
            table.effects
            or self._orders.refused
            or self._newcomers
            or any(self._unrecorded)
            or (table.dirty and not unjudged)
        ):
            effects = table.take_effects()
            answers, self._orders.refused = self._orders.refused, []
            for effect in effects:
                answer = self._answer(effect)
                if answer is not None:
                    answers.append(answer)
            for session, sequence, record in answers:
                if session.client in self._sessions:
                    self._journal.outcome(session.client, sequence, record)
            self._unrecorded[0].extend(effects)
            self._unrecorded[1].extend(answers)
            if not self._journal.record(now):
                return
            (effects, answers), self._unrecorded = self._unrecorded, ([], [])
            newcomers, self._newcomers = self._newcomers, []
            for session, welcome in newcomers:
                session.send(welcome, self.fencing.fds())
            for effect in effects:
                try:
                    self._carry_out(effect)
                except Exception:  # as in the control loop: a mistake of ours, and the others are still to be told
                    self.counters["mistakes"] += 1
                    logger.exception("a mistake of etha's in %r", effect)
            for session, sequence, record in answers:
                session.send(packets.Outcome(sequence, record.generation, record.failure, session.served))
        if not unjudged:
            self._journal.record(now)

    def _answer(self, effect: object) -> Answer | None:
        """The outcome that an effect means for a command, if it is about one."""
        if not isinstance(effect, _VERDICTS):
            return None
        claim = effect.claim
        sequence = claims.command_sequence(claim.number)
        session = self._sessions.get(claim.client)
        if sequence is None or session is None:
            return None
        failure = Failure.of(effect.error) if isinstance(effect, Failed) else None
        if isinstance(claim, Registration | Rebinding) and failure is not None:
            self._memory.retract(claim.client, sequence)
        return session, sequence, OutcomeRecord(claim.generation, failure)

    def _carry_out(self, effect: object) -> None:
        if isinstance(effect, _VERDICTS):
            session = self._sessions.get(effect.claim.client)
            if session is not None and claims.command_sequence(effect.claim.number) is None:
                self._reply(session, effect)
        elif isinstance(effect, OpenMemory):
            self._open_memory(self.registry.publications[effect.generation])
        elif isinstance(effect, MoveMemory):
            moved = self.registry.publications.get(effect.generation)  # one that was suspended may be over already
            moving = None if moved is None else moved.moving
            if isinstance(moving, Rebinding):
                self._memory.move(effect.generation, moving.client, claims.command_sequence(moving.number) or 0)
        elif isinstance(effect, CloseMemory):
            self._memory.close(effect.generation)
        elif isinstance(effect, AskUnmap):
            session = self._sessions.get(effect.claim.client)
            if session is not None:
                session.send(packets.Unmap(effect.claim.number))
        elif isinstance(effect, Ring):
            session = self._sessions.get(effect.claim.client)
            if session is not None:
                session.ring(effect.claim.number)

    def _reply(self, session: Session, effect: Granted | Failed) -> None:
        claim = effect.claim
        if isinstance(effect, Failed):
            session.send(packets.Refused(claim.number, Failure.of(effect.error)))
            return
        publication = self.registry.publications.get(claim.generation)
        if publication is None:
            return
        if isinstance(claim, Lease):
            self.counters["leases"] += 1
            layout = publication.layout
            owner = self.registry.table.clients.get(publication.owner)
            slot, fence = (owner.slot, publication.fence) if owner is not None else (0, 0)
            session.send(
                packets.Leased(claim.number, claim.version or 0, claim.writes, claim.guarded, layout, slot, fence)
            )
        elif isinstance(claim, Update):
            clients = self.registry.table.clients
            after = tuple((clients[each].slot, fence) for each, fence in publication.after.items() if each in clients)
            session.send(packets.MayWrite(claim.number, session.served, publication.oldest_layout, after))
        elif isinstance(claim, Import) and not publication.live:
            self.registry.release(claim.client, claim.number, self._now)
            session.send(packets.Refused(claim.number, Failure.of(verdicts.over(claim.generation))))
        elif isinstance(claim, Import):
            fds = self._memory.fds(claim.generation)
            for first in range(0, len(fds), packets.FDS_PER_PACKET):
                some = fds[first : first + packets.FDS_PER_PACKET]
                session.send(packets.Descriptors(claim.number, first), some)
            session.send(packets.Imported(claim.number, claim.generation, publication.version, publication.layout))

    # -- memory -----------------------------------------------------------------------------------

    def _open_memory(self, publication: Publication) -> None:
        if not publication.recovering:
            sequence = claims.command_sequence(publication.number) or 0
            self._memory.expect(publication.generation, publication.owner, sequence, publication.manifest)
            return
        session = self._sessions.get(publication.owner)
        if session is not None and self._memory.try_again(publication.generation, session.peer):
            session.send(packets.Wanted(publication.sequence))

    def _not_recovered(self, publication: Publication, error: EthaError) -> None:
        known, fault = publication.fault, verdicts.unopened(publication.name, error)
        self.registry.unrecovered(publication.generation, fault)
        if known is None:
            logger.error("%s", fault.message)
            session = self._sessions.get(publication.owner)
            if session is not None:
                self._tell_fault(session, publication)

    def _tell_fault(self, session: Session, publication: Publication) -> None:
        """The owner hears at its next call that a publication's memory could not be recovered, if it could not."""
        if publication.owner == session.client and publication.fault is not None and publication.live:
            failure = Failure.of(publication.fault)
            session.send(packets.Outcome(0, publication.generation, failure, session.served))

    def _memory_opened(self, generation: int, error: EthaError | None) -> None:
        publication = self.registry.publications.get(generation)
        if publication is None:
            return
        if publication.recovering:
            if error is None:
                self.registry.recovered(generation, self._now)
                self._look_at_owner(generation)
            else:
                self._not_recovered(publication, error)
            return
        if error is not None:
            self.registry.open_failed(generation, error, self._now)
            return
        self.registry.opened(generation, self._now)
        self._look_at_owner(generation)

    def _memory_moved(self, generation: int, error: EthaError | None) -> None:
        publication = self.registry.publications.get(generation)
        moving = None if publication is None else publication.moving
        if publication is None or not isinstance(moving, Rebinding):
            return  # it is over, and what was opened for it is being closed
        if error is not None:
            self.registry.rebind_failed(generation, error, self._now)
            return
        self._memory.replace(generation, moving.client, claims.command_sequence(moving.number) or 0)
        self.registry.rebound(generation, self._now)
        self._look_at_owner(generation)

    def _look_at_owner(self, generation: int) -> None:
        publication = self.registry.publications[generation]
        session = self._sessions.get(publication.owner)
        if session is not None:
            peer, manifest = session.peer, publication.manifest
            publications = self.registry.publications

            def look() -> Observation | None:
                # By now it may be over, and its owner about other things, which the look would slow down.
                return observe(peer, manifest) if generation in publications else None

            self._backstage.chore(look, lambda seen: self._observed(generation, seen))

    def _observed(self, generation: int, seen: object) -> None:
        if generation not in self.registry.publications or not isinstance(seen, Observation):
            return
        record = MemoryRecord(seen.mappings, seen.descriptors, seen.gate)
        self._journal.put(memory_key(generation), record)

    def _memory_closed(self, generation: int) -> None:
        if generation in self.registry.publications:
            self.registry.memory_closed(generation, self._now)
