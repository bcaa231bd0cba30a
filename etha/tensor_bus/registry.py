"""Every rule about versions, claims, waiting and death: a state machine with no I/O.

The agent tells it what happened (a command, a request, a death, the time). It then records what changed
(`ClaimTable.dirty`) and carries out the effects (`ClaimTable.effects`), in that order. The registry knows no clock,
no socket and no file, so it can be run through a million interleavings without a process.

* A publication that rests (READY, TORN) may be updated when no lease is out. WRITING is entered before the grant.
* A read is granted when the version satisfies it and no update was waiting when it came, unless its thread already
  holds a lease on the version that it would get: holding that one up could only deadlock. The thread and not the
  client, whose threads' leases may overlap without an end: they would starve the writer.
* A torn publication fails its reads, except those behind an update that will mend it.
* A closing fails its reads at once and ends when no lease and no import is left; at its deadline the publication is
open again.
* A dead owner's publication fails its reads; its name is free at once. A connection that ended without a death
changes nothing.

Called by the agent's control loop alone; not safe across threads.
"""

from __future__ import annotations

import itertools
from typing import Final

from etha.errors import DeadlockError, EthaError
from etha.tensor_bus import verdicts
from etha.tensor_bus.access import concerned, made_by, may_follow, may_replace, owned
from etha.tensor_bus.claim_table import ClaimTable, CloseMemory, OpenMemory, Ring
from etha.tensor_bus.claims import (
    RESTING,
    Claim,
    Client,
    Closing,
    Event,
    Import,
    Lease,
    Phase,
    Publication,
    Registration,
    Update,
)
from etha.tensor_bus.naming import NameQueue
from etha.tensor_bus.waiting import refuse_cycle


class Registry:
    """All workers, publications and claims of one agent."""

    def __init__(self) -> None:
        self.table: Final = ClaimTable()
        self.publications: Final[dict[int, Publication]] = {}
        self.names: Final[dict[str, Publication]] = {}
        self._wanting = NameQueue()
        self._generations = itertools.count(1)

    # -- workers ----------------------------------------------------------------------------------

    def client_joined(self, client: bytes, pid: int, label: str, now: float) -> None:
        """A worker has an authenticated connection."""
        self.table.clients[client] = Client(client, pid, label, now)
        self.table.dirty.clients.add(client)

    def client_orphaned(self, client: bytes, now: float) -> None:
        """The connection ended and the process lives: what it holds stays, what it waits for goes."""
        self.table.clients[client].connected = False
        self.table.dirty.clients.add(client)
        for claim in self.table.of_client(client):
            if not claim.granted:
                self._drop(claim, now)

    def client_left(self, client: bytes, now: float) -> None:
        """The worker said goodbye: it holds nothing any more."""
        self._end_client(client, Event.END, now)

    def client_died(self, client: bytes, now: float) -> None:
        """The worker's process is dead."""
        self._end_client(client, Event.OWNER_DIED, now)

    # -- owners and readers ------------------------------------------------------------------------

    def register(self, claim: Registration, now: float) -> None:
        """A worker wants to publish under a name."""
        self.table.add(claim)
        holder = self.names.get(claim.name)
        if holder is not None and not may_follow(claim, holder, self.table):
            self.table.fail(claim, verdicts.taken(claim.name, self.table.label(holder.owner)))
            return
        self._want_name(claim, now)

    def opened(self, generation: int, now: float) -> None:
        """The agent has opened the publication's memory."""
        publication = self.publications[generation]
        if publication.registration is None:
            return
        registration, publication.registration = publication.registration, None
        self.table.finish(registration, now)
        self._move(publication, Event.OPENED, now)

    def open_failed(self, generation: int, error: EthaError, now: float) -> None:
        """The agent could not open the publication's memory: it never existed."""
        publication = self.publications[generation]
        if publication.registration is not None:
            registration, publication.registration = publication.registration, None
            self.table.fail(registration, error)
            self._end(publication, Event.END, now)

    def memory_closed(self, generation: int, now: float) -> None:
        """The agent has closed its own mappings of the publication."""
        publication = self.publications[generation]
        publication.memory_open = False
        self._forget_if_over(publication, now)

    def publish(self, client: bytes, generation: int, version: int, update: int, now: float) -> None:
        """The tensors are a new version; ``update`` is the number of the update that this ends, or 0.

        Raises:
            EthaError: refused; nothing has changed.
        """
        publication = owned(self.publications, self.table, client, generation)
        error = verdicts.unpublishable(publication, version, update)
        if error is not None:
            raise error
        publication.version = version
        publication.guarded = update != 0
        self._end_update(publication)
        if publication.phase is Phase.CLOSING:
            publication.rest = Phase.READY
            self._changed(publication)
        else:
            self._move(publication, Event.PUBLISH, now)

    def abandon(self, client: bytes, generation: int, update: int, now: float) -> None:
        """An update ended half-way: what the tensors hold is no version.

        Raises:
            EthaError: the publication is not the client's.
        """
        publication = owned(self.publications, self.table, client, generation)
        if publication.update is not None and publication.update.number == update:
            self._end_update(publication)
            self._move(publication, Event.ABANDON, now)

    def claim(self, claim: Lease | Update | Closing, now: float) -> None:
        """A subscriber wants to read, or an owner to write, or to have its memory back."""
        self.table.add(claim)
        try:
            publication = concerned(self.publications, self.table, claim)
        except EthaError as error:
            self.table.fail(claim, error)
            return
        publication.queue.append(claim)
        if not isinstance(claim, Closing):  # which has an effect on others, even if it is refused afterwards
            self._settle(publication, now)
        self.table.begin(claim)

    def subscribe(self, claim: Import, now: float) -> None:
        """A worker wants a publication's memory mapped, once there is one of that name."""
        self.table.add(claim)
        self._want_name(claim, now)

    def release(self, client: bytes, number: int, now: float) -> None:
        """A claim is over: what waits is dropped, what is held is given back, what is unknown was given back before.

        An update given back this way was never written in: the publication is as whole as before.
        """
        claim = self.table.claims.get((client, number))
        if claim is not None:
            self._drop(claim, now)

    def undo(self, number: int, answer: Closing, now: float) -> None:
        """Undo a registration or a closing whose caller was told that it failed.

        ``answer`` is granted when nothing is left of it, every mapping included, the agent's own and the readers'.
        """
        self.table.add(answer)
        self.release(answer.client, number, now)
        publication = made_by(self.publications, answer.client, number)
        if publication is None:
            self.table.finish(answer, now)
            return
        if publication.live:
            self._end(publication, Event.END, now)
        answer.generation = publication.generation
        publication.closings.append(answer)

    def expire(self, now: float) -> None:
        """Fail every wait whose deadline has passed; an update that may revoke does so."""
        while (claim := self.table.due(now)) is not None:
            self._expire(claim, now)

    def judge(self, beginners: list[Claim], now: float) -> None:
        """Let what `ClaimTable.take_beginners` gave wait, or fail it: a poll, and what would close a cycle.

        To be called when all has been taken in that was sent before these claims, by whatever connection: a thread
        that gave up its lease through one client must not be told through another that it still holds it.
        """
        for claim in filter(self.table.waits, beginners):
            claim.judged = True
            try:
                if claim.deadline > now:
                    refuse_cycle(claim, self.table.waiting, self.names)
            except DeadlockError as error:
                self._drop(claim, now)
                self.table.fail(claim, error)
                continue
            if isinstance(claim, Closing):
                self._settle(self.publications[claim.generation], now)
            elif isinstance(claim, Registration):
                self._settle_name(claim.name, now)
            if self.table.waits(claim):
                self.table.wait(claim) if claim.deadline > now else self._expire(claim, now)

    # -- waiting ----------------------------------------------------------------------------------

    def _expire(self, claim: Claim, now: float) -> None:
        publication = self.publications.get(claim.generation) or self.names.get(claim.name)
        if isinstance(claim, Update) and claim.revoke and publication is not None:
            writers = publication.waiting_updates()
            if publication.phase in RESTING and writers[0] is claim:
                for lease in list(publication.leases.values()):
                    self._detach(lease)
                    self.table.forget(lease)
                self._settle(publication, now)
                return
        if isinstance(claim, Closing) and publication is not None and not publication.live:
            return  # it has what it wants, but for the agent's own mapping, which is being closed
        error = verdicts.expired(claim, publication, self.table.clients, now)
        self._drop(claim, now)
        self.table.fail(claim, error)

    def _settle(self, publication: Publication, now: float) -> None:
        """Grant or fail what can be, in the order of arrival."""
        writer_ahead = False
        for claim in list(publication.queue):
            if claim not in self.table:
                continue
            if isinstance(claim, Lease):
                self._settle_read(claim, publication, writer_ahead, now)
                continue
            if isinstance(claim, Update):
                self._settle_update(claim, publication, writer_ahead, now)
            elif isinstance(claim, Closing) and (claim.judged or not publication.live):
                self._settle_closing(claim, publication, writer_ahead, now)
            writer_ahead = True
        if publication.phase is Phase.CLOSING and not publication.leases and not publication.imports:
            self._end(publication, Event.END, now)
        if publication.wanted_changed():
            self.table.dirty.publications.add(publication.generation)
            if publication.wanted:
                self._ring(publication)

    def _settle_read(self, claim: Lease, publication: Publication, writer_ahead: bool, now: float) -> None:
        error = verdicts.unreadable(claim, publication, writer_ahead, self.table.label(publication.owner))
        if error is not None:
            publication.queue.remove(claim)
            self.table.fail(claim, error)
        elif verdicts.readable(claim, publication, writer_ahead):
            publication.lend(claim)
            self.table.grant(claim, now)

    def _settle_update(self, claim: Update, publication: Publication, writer_ahead: bool, now: float) -> None:
        if publication.phase is Phase.CLOSING or not publication.live:
            publication.queue.remove(claim)
            self.table.fail(claim, verdicts.closing(publication.name))
        elif not writer_ahead and publication.phase in RESTING and not publication.leases:
            publication.hand_over(claim)
            self.table.dirty.publications.add(publication.generation)
            self.table.grant(claim, now)

    def _settle_closing(self, claim: Closing, publication: Publication, writer_ahead: bool, now: float) -> None:
        if publication.live and (writer_ahead or publication.phase not in RESTING):
            return
        publication.queue.remove(claim)
        publication.closings.append(claim)
        if publication.live:
            self._begin_closing(publication, now)

    # -- the life of a publication ----------------------------------------------------------------

    def _want_name(self, claim: Registration | Import, now: float) -> None:
        self._wanting.add(claim)
        if not (isinstance(claim, Registration) and claim.replace):
            self._settle_name(claim.name, now)
        self.table.begin(claim)

    def _settle_name(self, name: str, now: float) -> None:
        """Hand a free name to the first that wants it, and a ready publication to all who wait for it."""
        for claim in self._wanting.of(name):
            publication = self.names.get(name)
            if isinstance(claim, Registration):
                if publication is None:
                    self._detach(claim)
                    self._create(claim, now)
                elif claim.judged and publication.phase in RESTING and may_replace(claim, publication, self.table):
                    self._begin_closing(publication, now)
                    self._settle(publication, now)
            elif isinstance(claim, Import) and publication is not None and publication.open:
                self._detach(claim)
                claim.generation = publication.generation
                publication.imports[claim.id] = claim
                self.table.grant(claim, now)

    def _create(self, claim: Registration, now: float) -> None:
        generation = claim.generation = next(self._generations)
        publication = Publication(
            generation, claim.name, claim.client, claim.number, claim.manifest, claim.version, now
        )
        publication.registration = claim
        self.publications[generation] = self.names[claim.name] = publication
        self.table.clients[claim.client].publications.add(generation)
        self.table.dirty.publications.add(generation)
        self.table.effects.append(OpenMemory(generation))

    def _begin_closing(self, publication: Publication, now: float) -> None:
        publication.move(Event.CLOSE)
        self._changed(publication)
        for claim in publication.waiting_reads():
            self._settle_read(claim, publication, False, now)

    def _move(self, publication: Publication, event: Event, now: float) -> None:
        publication.move(event)
        self._changed(publication)
        self._settle(publication, now)
        if publication.phase in RESTING:
            self._settle_name(publication.name, now)

    def _changed(self, publication: Publication) -> None:
        self.table.dirty.publications.add(publication.generation)
        self._ring(publication)

    def _ring(self, publication: Publication) -> None:
        self.table.effects.extend(Ring(claim) for claim in publication.imports.values())

    def _end(self, publication: Publication, event: Event, now: float) -> None:
        """The publication is over. Its importers are told, its name is free, the agent's mapping goes."""
        publication.move(event)
        self._end_update(publication)
        if publication.registration is not None:
            self.table.forget(publication.registration)
            publication.registration = None
        self.table.clients[publication.owner].publications.discard(publication.generation)
        del self.names[publication.name]
        self._changed(publication)
        self._settle(publication, now)
        self.table.effects.append(CloseMemory(publication.generation))
        self._settle_name(publication.name, now)

    def _end_client(self, client: bytes, event: Event, now: float) -> None:
        record = self.table.clients[client]
        for generation in list(record.publications):
            self._end(self.publications[generation], event, now)
        for claim in self.table.of_client(client):
            self._drop(claim, now)
        del self.table.clients[client]
        self.table.dirty.clients.add(client)

    def _end_update(self, publication: Publication) -> None:
        if publication.update is not None:
            update, publication.update = publication.update, None
            self.table.forget(update)

    def _drop(self, claim: Claim, now: float) -> None:
        """Take a claim away, waiting or held, and see who can go on."""
        if claim not in self.table:
            return
        publication = self.publications.get(claim.generation) or self.names.get(claim.name)
        self._detach(claim)
        self.table.forget(claim)
        if publication is None:
            return
        if publication.registration is claim:
            self._end(publication, Event.END, now)
        elif publication.update is claim:
            publication.update = None
            self._move(publication, Event.WITHDRAW, now)
        elif publication.phase is Phase.CLOSING and not self._wants_end(publication):
            self._move(publication, Event.REOPEN, now)
        else:
            self._settle(publication, now)
        self._forget_if_over(publication, now)

    def _wants_end(self, publication: Publication) -> bool:
        wanting = self._wanting.registrations(publication.name)
        return bool(publication.closings) or any(may_replace(claim, publication, self.table) for claim in wanting)

    def _detach(self, claim: Claim) -> None:
        """Take a claim out of every list it may stand in, its publication's and its name's."""
        publication = self.publications.get(claim.generation)
        if publication is not None:
            publication.detach(claim)
        self._wanting.remove(claim)

    def _forget_if_over(self, publication: Publication, now: float) -> None:
        if publication.over and publication.generation in self.publications:
            del self.publications[publication.generation]
            self.table.dirty.publications.add(publication.generation)
            while publication.closings:
                self.table.finish(publication.closings.pop(0), now)
