"""Who is granted what, once something has changed: the inner half of the registry. Pure.

`Settling` goes through the claims that wait at a publication, or for a name, in the order of their arrival, and grants
or fails what can be. It also holds the life of a publication: how it is made, closed, and ended. What happens to it
from outside is told to `etha.tensor_bus.registry.Registry`, which is one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final

from etha.tensor_bus import verdicts
from etha.tensor_bus.access import is_up, may_replace
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
    Suspending,
    Update,
    command_sequence,
)
from etha.tensor_bus.naming import NameQueue


class Settling:
    """Claims, publications and names, and the rules that settle them.

    Attributes:
        table: all claims, and what is to be done about them.
        publications: by generation, the ended ones that somebody still holds included.
        names: the live ones.
    """

    def __init__(self) -> None:
        self.table: Final = ClaimTable()
        self.publications: Final[dict[int, Publication]] = {}
        self.names: Final[dict[str, Publication]] = {}
        self._wanting = NameQueue()
        self.generations: Iterator[int] = itertools.count(1)

    # -- waiting ----------------------------------------------------------------------------------

    def _expire(self, claim: Claim, now: float) -> None:
        publication = self.publications.get(claim.generation) or self.names.get(claim.name)
        if isinstance(claim, Update) and claim.revoke and publication is not None:
            writers = publication.waiting_updates()
            if publication.phase in RESTING and writers[0] is claim:
                for lease in list(publication.leases.values()):
                    self._detach(lease)
                    self.table.forget(lease)
                for reader in self._unheard(publication):
                    del publication.after[reader.id]
                self._settle(publication, now)
                return
        if isinstance(claim, Closing) and publication is not None and not publication.live:
            return  # it has what it wants, but for the agent's own mapping, which is being closed
        if isinstance(claim, Suspending) and publication is not None and publication.memory_closing:
            return  # likewise
        unheard = [] if publication is None else self._unheard(publication)
        error = verdicts.expired(claim, publication, self.table.clients, now, unheard)
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
        if publication.phase is Phase.CLOSING and not publication.leases and not publication.mapped:
            self._end(publication, Event.END, now)
        if isinstance(publication.moving, Suspending) and not publication.mapped:
            self._close_memory(publication, now)
        if publication.wanted_changed():
            self.table.dirty.publications.add(publication.generation)
            if publication.wanted:
                self._ring(publication)

    def _settle_read(self, claim: Lease, publication: Publication, writer_ahead: bool, now: float) -> None:
        if verdicts.readable(claim, publication, writer_ahead):
            publication.lend(claim)
            self.table.grant(claim, now)
            return
        error = verdicts.unreadable(claim, publication, writer_ahead, self.table.label(publication.owner))
        if error is not None:
            publication.queue.remove(claim)
            self.table.fail(claim, error)

    def _settle_update(self, claim: Update, publication: Publication, writer_ahead: bool, now: float) -> None:
        if publication.phase is Phase.CLOSING or not publication.live:
            publication.queue.remove(claim)
            self.table.fail(claim, verdicts.closing(publication.name))
        elif not writer_ahead and publication.phase in RESTING and not self._still_read(publication):
            publication.hand_over(claim)
            self.table.dirty.publications.add(publication.generation)
            self.table.grant(claim, now)

    def _still_read(self, publication: Publication) -> bool:
        return bool(publication.leases or (publication.after and self._unheard(publication)))

    def _unheard(self, publication: Publication) -> list[Client]:
        """Readers whose work cannot be waited for yet: a predecessor's clients that have not come back."""
        readers = (self.table.clients.get(client) for client in publication.after)
        return [reader for reader in readers if reader is not None and not reader.fenced]

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
            elif isinstance(claim, Import) and claim.follows and not is_up(publication, claim.follows):
                self._detach(claim)
                self.table.fail(claim, verdicts.ended(claim, self.publications, self.table.clients))
            elif isinstance(claim, Import) and publication is not None and publication.open:
                self._detach(claim)
                claim.generation = publication.generation
                claim.layout = publication.layout
                publication.imports[claim.id] = claim
                self.table.grant(claim, now)
            elif publication is not None and publication.fault is not None and not publication.retrying:
                publication.retrying = True
                self.table.effects.append(OpenMemory(publication.generation))

    def _create(self, claim: Registration, now: float) -> None:
        generation = claim.generation = next(self.generations)
        publication = Publication(
            generation, claim.name, claim.client, claim.number, claim.manifest, claim.version, now
        )
        publication.registration = claim
        publication.fence = claim.fence
        publication.sequence = command_sequence(claim.number) or 0
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
        self._close_memory(publication, now)
        self._settle_name(publication.name, now)

    def _close_memory(self, publication: Publication, now: float) -> None:
        if publication.memory_open and not publication.memory_closing:
            publication.memory_closing = True
            self.table.effects.append(CloseMemory(publication.generation))
        elif not publication.memory_open:
            self._forget_if_over(publication, now)

    def _end_client(self, client: bytes, event: Event, now: float) -> None:
        record = self.table.clients[client]
        for generation in list(record.publications):
            self._end(self.publications[generation], event, now)
        for claim in self.table.of_client(client):
            self._drop(claim, now)
        del self.table.clients[client]
        self.table.dirty.clients.add(client)
        for publication in list(self.publications.values()):
            if publication.after.pop(client, 0):
                self.table.dirty.publications.add(publication.generation)
                self._settle(publication, now)

    def _end_update(self, publication: Publication) -> None:
        if publication.update is not None:
            update, publication.update = publication.update, None
            self.table.forget(update)
        if publication.moving is not None:
            moving, publication.moving = publication.moving, None
            self.table.fail(moving, verdicts.not_writing(publication.name))

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
            self._end_update(publication)
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
        if publication.given_back:
            while publication.closings:
                self.table.finish(publication.closings.pop(0), now)
        if publication.over and publication.generation in self.publications:
            del self.publications[publication.generation]
            self.table.dirty.publications.add(publication.generation)
