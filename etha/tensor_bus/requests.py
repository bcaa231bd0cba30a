"""What a packet means: one packet of a worker in, registry calls out. Used by the agent's control loop only."""

from __future__ import annotations

from typing import Final

from etha.errors import InvalidArgument, InvalidRecord
from etha.tensor_bus import packets, wire
from etha.tensor_bus.claim_table import Granted, Ring
from etha.tensor_bus.claimants import NUMBER_LIMIT, is_request, require_fence, require_name, require_number, who
from etha.tensor_bus.claims import Import, Lease, Update
from etha.tensor_bus.fencing import Fencing
from etha.tensor_bus.journal import Journal
from etha.tensor_bus.memory import Memory
from etha.tensor_bus.records import Failure
from etha.tensor_bus.registry import Registry
from etha.tensor_bus.sessions import Session

_REQUESTS: Final = (packets.Read, packets.Write, packets.Subscribe)


class Requests:
    """Takes packets, one at a time."""

    def __init__(self, registry: Registry, journal: Journal, memory: Memory, fencing: Fencing) -> None:
        self._registry = registry
        self._fencing = fencing
        self._journal = journal
        self._memory = memory

    # -- packets ----------------------------------------------------------------------------------

    def take(self, session: Session, packet: packets.FromWorker, fds: list[int], now: float) -> None:
        """Act on one packet of a worker that has been welcomed.

        Raises:
            InvalidRecord: it makes no sense; the connection is to be cut. Its descriptors are closed.
        """
        if isinstance(packet, packets.Descriptors):
            self._memory.arrived(session.client, packet.number, packet.first, fds)
            return
        if isinstance(packet, packets.Bell):
            self._bell(session, packet, fds)
            return
        if isinstance(packet, packets.Fenced):
            self._fenced(session, fds, now)
            return
        if fds:
            wire.close_all(fds)
            raise InvalidRecord("descriptors came with a packet that carries none.", resource="packet")
        if isinstance(packet, _REQUESTS) and self._asked_before(session, packet.number, now):
            return
        if isinstance(packet, packets.Read):
            try:
                require_number("version", max(packet.minimum, packet.exact or 0))
            except InvalidArgument as error:
                session.send(packets.Refused(packet.number, Failure.of(error)))
                return
            lease = Lease(
                **who(session, packet.number, packet.thread, packet.deadline, now),
                name=packet.name,
                generation=packet.generation,
                exact=packet.exact,
                minimum=packet.minimum,
                through=packet.through,
                patient=packet.patient,
            )
            self._registry.claim(lease, now)
        elif isinstance(packet, packets.Write):
            update = Update(
                **who(session, packet.number, packet.thread, packet.deadline, now),
                name=packet.name,
                generation=packet.generation,
                revoke=packet.revoke,
            )
            self._registry.claim(update, now)
        elif isinstance(packet, packets.Subscribe):
            try:
                require_name(packet.name)
            except InvalidArgument as error:
                session.send(packets.Refused(packet.number, Failure.of(error)))
                return
            wanted = Import(
                **who(session, packet.number, packet.thread, packet.deadline, now),
                name=packet.name,
                generation=0,
                follows=packet.follows,
            )
            self._registry.subscribe(wanted, now)
        elif isinstance(packet, packets.Release):
            session.remove_bell(packet.number)
            fence = require_fence(packet.fence)
            if is_request(packet.number):
                self._registry.release(session.client, packet.number, now, fence)
        elif isinstance(packet, packets.Unmapped):
            self._registry.unmapped(session.client, packet.number, now)
        elif isinstance(packet, packets.Reassert):
            self._reasserted(session, packet, now)

    def _fenced(self, session: Session, fds: list[int], now: float) -> None:
        try:
            self._fencing.adopt(fds)
        finally:
            wire.close_all(fds)
        self._registry.fenced(session.client, now)
        self._registry.look_for_readers(self._fencing.reached, now)
        self._memory.owner_is_back(session.client)

    def _reasserted(self, session: Session, packet: packets.Reassert, now: float) -> None:
        # What is not there is not kept: a worker may name as many numbers as it likes, and as often.
        claims = self._registry.table.claims
        session.reasserted.update(number for number in packet.claims if (session.client, number) in claims)
        if not packet.more:
            self._registry.reassert(session.client, session.reasserted, now)
            session.keep_bells(session.reasserted)
            session.reasserted.clear()
        asked = set(packet.commands)
        for sequence, record in self._journal.outcomes(session.client).items():
            if sequence in asked:
                session.send(packets.Outcome(sequence, record.generation, record.failure, session.served))

    def _bell(self, session: Session, packet: packets.Bell, fds: list[int]) -> None:
        claim = self._registry.table.claims.get((session.client, packet.number))
        if len(fds) != 1 or not isinstance(claim, Import) or not claim.granted:
            wire.close_all(fds)
            if len(fds) != 1:
                raise InvalidRecord("a bell carries one descriptor.", resource="Bell")
            return
        session.add_bell(packet.number, fds[0])
        publication = self._registry.publications[claim.generation]
        if publication.version > packet.seen or not publication.live or publication.wanted:
            # Not now: what it is rung for may not be recorded yet.
            self._registry.table.effects.append(Ring(claim))

    def _asked_before(self, session: Session, number: int, now: float) -> bool:
        """Whether this request is known: asked again by a worker that came back. A grant is told again.

        But not that of an import whose memory this agent, which is new, has not opened yet: nobody has heard of it, so
        nothing is mapped, and it waits like any other.
        """
        if not 0 < number < NUMBER_LIMIT:
            raise InvalidRecord(f"claim number {number} is out of range.", resource="number")
        claim = self._registry.table.claims.get((session.client, number))
        if claim is None:
            return False
        if isinstance(claim, Import) and claim.granted and self._registry.publications[claim.generation].recovering:
            self._registry.release(session.client, number, now)
            return False
        if claim.granted:
            self._registry.table.effects.append(Granted(claim))
        return True
