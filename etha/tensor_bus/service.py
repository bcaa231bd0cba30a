"""What the agent does with what its workers say: packets and commands in, registry calls, replies out.

One turn of the control loop is: take in what has arrived (`packet`, `commands`, `died`, ...), then `settle`, which
records all changes in one transaction and only then carries out the effects. Everything a worker sent is checked
here, and what is wrong fails that worker alone.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Final, TypedDict

from etha.errors import AgentTimeout, EthaError, InvalidArgument, InvalidRecord, QueueFull
from etha.tensor_bus import claims, commands, packets, verdicts, wire
from etha.tensor_bus.claim_table import CloseMemory, Effect, Failed, Granted, OpenMemory, Ring
from etha.tensor_bus.claims import Closing, Import, Lease, Registration, Update
from etha.tensor_bus.command_queue import CommandQueue
from etha.tensor_bus.ipc.manifest import validate
from etha.tensor_bus.ipc.observation import Observation, observe
from etha.tensor_bus.journal import Journal
from etha.tensor_bus.memory import Backstage, Memory
from etha.tensor_bus.records import Failure
from etha.tensor_bus.registry import Registry
from etha.tensor_bus.sessions import Session
from etha.tensor_bus.state import MemoryRecord, OutcomeRecord, memory_key

logger = logging.getLogger(__name__)

_NUMBER_LIMIT: Final = 1 << 63
"""Versions, sequences and claim numbers are smaller: one more still fits into 64 bits, on either side."""


class Who(TypedDict):
    """What every claim says of its claimant."""

    client: bytes
    number: int
    actor: claims.Actor
    label: str
    deadline: float
    since: float


class Service:
    """The agent's behaviour towards its workers. Used by the control loop only.

    Attributes:
        registry: the rules.
        counters: what was refused, dropped, served; shown by ``etha status``.
    """

    def __init__(self, queue: CommandQueue, journal: Journal, registry: Registry, backstage: Backstage) -> None:
        self.registry = registry
        self.counters: Counter[str] = Counter()
        self._queue = queue
        self._journal = journal
        self._backstage = backstage
        self._memory = Memory(backstage, self._memory_opened, self._memory_closed)
        self._sessions: dict[bytes, Session] = {}
        self._answers: list[tuple[Session, int, OutcomeRecord]] = []
        self._unrecorded: tuple[list[Effect], list[tuple[Session, int, OutcomeRecord]]] = ([], [])
        self._now = 0.0

    def turn(self, now: float) -> None:
        """A turn of the control loop begins."""
        self._now = now

    # -- workers come and go ----------------------------------------------------------------------

    def joined(self, session: Session, now: float) -> None:
        """A session has been given its client id."""
        self._sessions[session.client] = session
        self.registry.client_joined(session.client, session.peer.pid, session.peer.label, now)

    def orphaned(self, session: Session, now: float) -> None:
        """Its connection has ended; its process lives."""
        self.registry.client_orphaned(session.client, now)
        self._memory.retract(session.client)

    def holds(self, session: Session, now: float) -> bool:
        """Whether it holds, waits for or owns anything."""
        self.serve(session, now)
        return self.registry.table.clients[session.client].busy

    def left(self, session: Session, now: float) -> None:
        """It said goodbye."""
        self.serve(session, now)
        del self._sessions[session.client]
        self.registry.client_left(session.client, now)
        self._memory.retract(session.client)

    def died(self, session: Session, now: float) -> None:
        """Its process is dead: what it committed is served first, then everything of it goes."""
        self.serve(session, now)
        del self._sessions[session.client]
        self.registry.client_died(session.client, now)
        self._memory.retract(session.client)
        self.counters["deaths"] += 1

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
        seen = self._queue.last_transaction()
        if seen == session.queue_seen:
            return
        for sequence, data in self._queue.commands_of(session.client, session.served):
            session.served = sequence
            self._journal.served(session.client, sequence)
            self.counters["commands"] += 1
            try:
                _require_number("sequence", sequence)
                self._command(session, sequence, commands.CODEC.decode(data), len(data), now)
            except EthaError as error:
                self.counters["failed commands"] += 1
                self._answers.append((session, sequence, OutcomeRecord(0, Failure.of(error))))
        session.queue_seen = seen

    def _command(self, session: Session, sequence: int, command: commands.Command, size: int, now: float) -> None:
        registry, client = self.registry, session.client
        if isinstance(command, commands.Publish):
            try:
                _require_number("version", command.version)
                registry.publish(client, command.generation, command.version, command.update, now)
                self.counters["versions"] += 1
            except EthaError as error:
                record = OutcomeRecord(command.generation, Failure.of(error))
                self._answers.append((session, sequence, record))
        elif isinstance(command, commands.Abandon):
            registry.abandon(client, command.generation, command.update, now)
        elif isinstance(command, commands.Register):
            _require_in_time(f'the registration of "{command.name}"', command.name, command.deadline, now)
            _require_number("version", command.version)
            validate(command.manifest)
            self._memory.announce(client, sequence, command.manifest)
            try:
                self._journal.reserve((client, claims.command_number(sequence)), command.name, size)
            except QueueFull:
                self._memory.retract(client, sequence)
                raise
            registry.register(
                Registration(
                    **self._who(session, claims.command_number(sequence), command.thread, command.deadline, now),
                    name=command.name,
                    generation=0,
                    manifest=command.manifest,
                    version=command.version,
                    replace=command.replace,
                ),
                now,
            )
        elif isinstance(command, commands.Close):
            closing = self._closing(session, sequence, command.generation, command.thread, command.deadline, now)
            name = closing.name or f"generation {command.generation}"
            _require_in_time(f'the closing of "{name}"', name, command.deadline, now)
            registry.claim(closing, now)
        else:
            answer = self._closing(session, sequence, 0, 0, math.inf, now)
            self._memory.retract(client, command.sequence)
            registry.undo(claims.command_number(command.sequence), answer, now)

    def _closing(
        self, session: Session, sequence: int, generation: int, thread: int, deadline: float, now: float
    ) -> Closing:
        publication = self.registry.publications.get(generation)
        return Closing(
            **self._who(session, claims.command_number(sequence), thread, deadline, now),
            name=publication.name if publication is not None else "",
            generation=generation,
        )

    # -- packets ----------------------------------------------------------------------------------

    def packet(self, session: Session, packet: packets.FromWorker, fds: list[int], now: float) -> None:
        """Act on one packet of a worker that has been welcomed.

        Raises:
            InvalidRecord: it makes no sense; the connection is to be cut. Its descriptors are closed.
        """
        self.serve(session, now)
        if isinstance(packet, packets.Descriptors):
            self._memory.arrived(session.client, packet.number, packet.first, fds)
            return
        if isinstance(packet, packets.Bell):
            self._bell(session, packet, fds)
            return
        if fds:
            wire.close_all(fds)
            raise InvalidRecord("descriptors came with a packet that carries none.", resource="packet")
        if isinstance(packet, packets.Read):
            self._require_fresh(session, packet.number)
            try:
                _require_number("version", max(packet.minimum, packet.exact or 0))
            except InvalidArgument as error:
                session.send(packets.Refused(packet.number, Failure.of(error)))
                return
            lease = Lease(
                **self._who(session, packet.number, packet.thread, packet.deadline, now),
                name=packet.name,
                generation=packet.generation,
                exact=packet.exact,
                minimum=packet.minimum,
            )
            self.registry.claim(lease, now)
        elif isinstance(packet, packets.Write):
            self._require_fresh(session, packet.number)
            update = Update(
                **self._who(session, packet.number, packet.thread, packet.deadline, now),
                name=packet.name,
                generation=packet.generation,
                revoke=packet.revoke,
            )
            self.registry.claim(update, now)
        elif isinstance(packet, packets.Subscribe):
            self._require_fresh(session, packet.number)
            wanted = Import(
                **self._who(session, packet.number, packet.thread, packet.deadline, now),
                name=packet.name,
                generation=0,
            )
            self.registry.subscribe(wanted, now)
        elif isinstance(packet, packets.Release):
            session.remove_bell(packet.number)
            self.registry.release(session.client, packet.number, now)

    def descriptors_lost(self, session: Session, error: EthaError) -> None:
        """A packet with descriptors was cut short."""
        self._memory.lost(session.client, error)

    def _bell(self, session: Session, packet: packets.Bell, fds: list[int]) -> None:
        claim = self.registry.table.claims.get((session.client, packet.number))
        if len(fds) != 1 or not isinstance(claim, Import) or not claim.granted:
            wire.close_all(fds)
            if len(fds) != 1:
                raise InvalidRecord("a bell carries one descriptor.", resource="Bell")
            return
        session.add_bell(packet.number, fds[0])
        publication = self.registry.publications[claim.generation]
        if publication.version > packet.seen or not publication.live or publication.wanted:
            # Not now: what it is rung for may not be recorded yet.
            self.registry.table.effects.append(Ring(claim))

    # -- settling ---------------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """Record what has changed, then tell those whom it concerns; until nothing is left to do.

        What cannot be recorded (a full disk) is not done either: it waits, and so do those whom it concerns, for the
        first turn that can record it.
        """
        table = self.registry.table
        while table.effects or table.dirty or self._answers or any(self._unrecorded):
            effects = table.take_effects()
            answers, self._answers = self._answers, []
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
            for effect in effects:
                try:
                    self._carry_out(effect)
                except Exception:  # as in the control loop: a mistake of ours, and the others are still to be told
                    self.counters["mistakes"] += 1
                    logger.exception("a mistake of etha's in %r", effect)
            for session, sequence, record in answers:
                session.send(packets.Outcome(sequence, record.generation, record.failure, session.served))
        self._journal.record(now)

    def _answer(self, effect: object) -> tuple[Session, int, OutcomeRecord] | None:
        """The outcome that an effect means for a command, if it is about one."""
        if not isinstance(effect, Granted | Failed):
            return None
        claim = effect.claim
        sequence = claims.command_sequence(claim.number)
        session = self._sessions.get(claim.client)
        if sequence is None or session is None:
            return None
        failure = Failure.of(effect.error) if isinstance(effect, Failed) else None
        if isinstance(claim, Registration) and failure is not None:
            self._memory.retract(claim.client, sequence)
        return session, sequence, OutcomeRecord(claim.generation, failure)

    def _carry_out(self, effect: object) -> None:
        if isinstance(effect, OpenMemory):
            publication = self.registry.publications[effect.generation]
            sequence = claims.command_sequence(publication.number) or 0
            self._memory.expect(effect.generation, publication.owner, sequence, publication.manifest)
        elif isinstance(effect, CloseMemory):
            self._memory.close(effect.generation)
        elif isinstance(effect, Ring):
            session = self._sessions.get(effect.claim.client)
            if session is not None:
                session.ring(effect.claim.number)
        elif isinstance(effect, Granted | Failed):
            session = self._sessions.get(effect.claim.client)
            if session is not None and claims.command_sequence(effect.claim.number) is None:
                self._reply(session, effect)

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
            session.send(packets.Leased(claim.number, claim.version or 0, claim.writes, claim.guarded))
        elif isinstance(claim, Update):
            session.send(packets.MayWrite(claim.number, session.served))
        elif isinstance(claim, Import) and not publication.live:
            self.registry.release(claim.client, claim.number, self._now)
            session.send(packets.Refused(claim.number, Failure.of(verdicts.over(claim.generation))))
        elif isinstance(claim, Import):
            fds = self._memory.fds(claim.generation)
            for first in range(0, len(fds), packets.FDS_PER_PACKET):
                some = fds[first : first + packets.FDS_PER_PACKET]
                session.send(packets.Descriptors(claim.number, first), some)
            session.send(packets.Imported(claim.number, claim.generation, publication.version))

    # -- memory -----------------------------------------------------------------------------------

    def _memory_opened(self, generation: int, error: EthaError | None) -> None:
        publication = self.registry.publications.get(generation)
        if publication is None:
            return
        if error is not None:
            self.registry.open_failed(generation, error, self._now)
            return
        self.registry.opened(generation, self._now)
        session = self._sessions.get(publication.owner)
        if session is not None:
            peer, manifest = session.peer, publication.manifest
            self._backstage.chore(lambda: observe(peer, manifest), lambda seen: self._observed(generation, seen))

    def _observed(self, generation: int, seen: Observation | BaseException) -> None:
        if generation not in self.registry.publications or isinstance(seen, BaseException):
            return
        record = MemoryRecord(seen.mappings, seen.descriptors, seen.gate)
        self._journal.put(memory_key(generation), record)

    def _memory_closed(self, generation: int) -> None:
        if generation in self.registry.publications:
            self.registry.memory_closed(generation, self._now)

    # -- checks -----------------------------------------------------------------------------------

    @staticmethod
    def _who(session: Session, number: int, thread: int, deadline: float, now: float) -> Who:
        if math.isnan(deadline):
            raise InvalidRecord("a deadline is no number.", resource="deadline")
        return {
            "client": session.client,
            "number": number,
            "actor": (session.peer.pid, thread),
            "label": session.peer.label,
            "deadline": deadline,
            "since": now,
        }

    def _require_fresh(self, session: Session, number: int) -> None:
        if not 0 < number < _NUMBER_LIMIT or (session.client, number) in self.registry.table.claims:
            raise InvalidRecord(f"claim number {number} is in use or out of range.", resource="number")


def _require_number(what: str, number: int) -> None:
    if not 0 <= number < _NUMBER_LIMIT:
        raise InvalidArgument(
            f"{what} {number} is out of range.", resource=what, remedy=f"Give a {what} from 0 to 2**63 - 1."
        )


def _require_in_time(what: str, name: str, deadline: float, now: float) -> None:
    if deadline <= now:
        raise AgentTimeout(
            f"{what} came after its deadline and was dropped.",
            resource=name,
            remedy="Is the agent overloaded, or was it stopped? Try again.",
        )
