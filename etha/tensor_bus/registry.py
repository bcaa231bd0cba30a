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

from collections.abc import Callable, Collection

from etha.errors import DeadlockError, EthaError
from etha.tensor_bus import verdicts
from etha.tensor_bus.access import concerned, made_by, may_follow, owned, written_by
from etha.tensor_bus.claim_table import AskUnmap, MoveMemory
from etha.tensor_bus.claims import (
    Claim,
    Client,
    Closing,
    Event,
    Import,
    Lease,
    Phase,
    Publication,
    Rebinding,
    Registration,
    Suspending,
    Update,
    command_sequence,
)
from etha.tensor_bus.settling import Settling
from etha.tensor_bus.waiting import refuse_cycle


class Registry(Settling):
    """All workers, publications and claims of one agent."""

    # -- workers ----------------------------------------------------------------------------------

    def client_joined(self, client: bytes, pid: int, label: str, now: float, started: int = 0, slot: int = 0) -> None:
        """A worker has an authenticated connection."""
        self.table.clients[client] = Client(client, pid, label, now, started, slot=slot)
        self.table.dirty.clients.add(client)

    def client_orphaned(self, client: bytes, now: float) -> None:
        """The connection ended and the process lives: what it holds stays, and so do its commands, which are durable.
        Its requests go: if it comes back, it asks again."""
        self.table.clients[client].connected = False
        self.table.dirty.clients.add(client)
        for claim in self.table.of_client(client):
            if not claim.granted and command_sequence(claim.number) is None:
                self._drop(claim, now)

    def client_rejoined(self, client: bytes) -> None:
        """A worker whose connection had ended has another one."""
        self.table.clients[client].connected = True
        self.table.dirty.clients.add(client)

    def fenced(self, client: bytes, now: float) -> None:
        """The points of a worker's work that were told before are to be found in this agent's fences."""
        self.table.clients[client].fenced = True
        for publication in list(self.publications.values()):
            if client in publication.after:
                self._settle(publication, now)

    def look_for_readers(self, reached: Callable[[int, int], bool], now: float) -> None:
        """A predecessor's clients that have not come back: whose work is done need not be waited for.

        Args:
            reached: whether a slot has reached a point.
            now: ``CLOCK_BOOTTIME`` seconds.
        """
        for publication in list(self.publications.values()):
            done = [each for each in self._unheard(publication) if reached(each.slot, publication.after[each.id])]
            for reader in done:
                del publication.after[reader.id]
            if done:
                self.table.dirty.publications.add(publication.generation)
                self._settle(publication, now)

    def reassert(self, client: bytes, numbers: Collection[int], now: float) -> None:
        """A worker that came back says which claims are still its own: what else it held, it has given back."""
        for claim in self.table.of_client(client):
            if command_sequence(claim.number) is None and claim.number not in numbers:
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
        publication.memory_open = publication.memory_closing = False
        if publication.live:
            publication.suspended = True
            publication.recovered()
            self._changed(publication)
        if isinstance(publication.moving, Suspending):
            claim, publication.moving = publication.moving, None
            self.table.finish(claim, now)
        self._forget_if_over(publication, now)

    def recovered(self, generation: int, now: float) -> None:
        """The agent has opened the memory of a publication that its predecessor knew."""
        publication = self.publications[generation]
        publication.recovered()
        self.table.dirty.publications.add(generation)  # and no bell: who has it mapped missed nothing
        self._settle_name(publication.name, now)

    def unrecovered(self, generation: int, error: EthaError) -> None:
        """The agent could not open that memory. Who waits for it is told, and whoever asks next has it tried again."""
        publication = self.publications[generation]
        publication.fault, publication.retrying = error, False
        if self.names.get(publication.name) is publication:
            for claim in self._wanting.of(publication.name):
                if isinstance(claim, Import):
                    self._detach(claim)
                    self.table.fail(claim, error)

    def rebind(self, claim: Rebinding, now: float) -> None:
        """Within an update: the tensors lie elsewhere, or have memory again."""
        publication = self._to_be_moved(claim)
        if publication is None:
            return
        publication.moving = claim
        self.table.effects.append(MoveMemory(publication.generation))
        self.table.begin(claim)

    def rebound(self, generation: int, now: float) -> None:
        """The agent has opened what a rebinding names, and has let go of what was open."""
        publication = self.publications[generation]
        claim = publication.moving
        if isinstance(claim, Rebinding):
            publication.moving = None
            publication.manifest = claim.manifest
            publication.sequence = command_sequence(claim.number) or 0
            publication.layout += 1
            publication.suspended = False
            publication.recovered()
            publication.memory_open = True
            self.table.finish(claim, now)
            self._changed(publication)
            self._settle_name(publication.name, now)

    def rebind_failed(self, generation: int, error: EthaError, now: float) -> None:
        """The agent could not open it: everything is where it was."""
        claim = self.publications[generation].moving
        if isinstance(claim, Rebinding):
            self.publications[generation].moving = None
            self.table.fail(claim, error)

    def suspend(self, claim: Suspending, now: float) -> None:
        """Within an update: the owner wants its memory back for a while."""
        publication = self._to_be_moved(claim)
        if publication is None:
            return
        if publication.suspended:
            self.table.finish(claim, now)
            return
        publication.moving = claim
        for read in publication.waiting_reads():
            if self._in_the_way(read, publication):
                publication.queue.remove(read)
                self._ask_unmap(read)
        self.table.begin(claim)
        self._settle(publication, now)

    def unmapped(self, client: bytes, number: int, now: float) -> None:
        """A subscriber has nothing of the memory mapped any more; its subscription goes on."""
        claim = self.table.claims.get((client, number))
        publication = self.publications.get(claim.generation) if claim is not None else None
        if isinstance(claim, Import) and publication is not None and claim.granted:
            claim.layout = 0
            self.table.dirty.claims.add(claim.id)
            self._settle(publication, now)
            self._forget_if_over(publication, now)

    def publish(self, client: bytes, generation: int, version: int, update: int, now: float, fence: int = 0) -> None:
        """The tensors are a new version, whole behind the point ``fence`` of the owner's work; ``update`` is the number
        of the update that this ends, or 0.

        Raises:
            EthaError: refused; nothing has changed.
        """
        publication = owned(self.publications, self.table, client, generation)
        error = verdicts.unpublishable(publication, version, update)
        if error is not None:
            raise error
        publication.version = version
        publication.fence = fence
        publication.guarded = update != 0
        if update:
            publication.after.clear()  # this update's work comes after theirs, and what comes after this, too
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
        claim.name = publication.name  # whatever the claimant calls it: waits are compared by name
        if (
            publication.moving is not None
            and isinstance(claim, Lease)
            and self._in_the_way(claim, publication)
            and not claim.patient
        ):
            self._ask_unmap(claim)
            return
        publication.queue.append(claim)
        if not isinstance(claim, Closing):  # which has an effect on others, even if it is refused afterwards
            self._settle(publication, now)
        self.table.begin(claim)

    def subscribe(self, claim: Import, now: float) -> None:
        """A worker wants a publication's memory mapped, once there is one of that name."""
        self.table.add(claim)
        self._want_name(claim, now)

    def release(self, client: bytes, number: int, now: float, fence: int = 0) -> None:
        """A claim is over: what waits is dropped, what is held is given back, what is unknown was given back before.

        An update given back this way was never written in: the publication is as whole as before. ``fence`` is the
        point of a reader's work behind which it reads no more.
        """
        claim = self.table.claims.get((client, number))
        if claim is None:
            return
        publication = self.publications.get(claim.generation)
        if fence and publication is not None and isinstance(claim, Lease) and claim.granted:
            publication.after[client] = max(fence, publication.after.get(client, 0))
            self.table.dirty.publications.add(publication.generation)
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
        answer.generation = publication.generation
        publication.closings.append(answer)
        if publication.live:
            self._end(publication, Event.END, now)
        else:
            self._forget_if_over(publication, now)

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

    def _to_be_moved(self, claim: Rebinding | Suspending) -> Publication | None:
        """The publication in whose update the claim comes; where it may not, it has failed."""
        self.table.add(claim)
        try:
            return written_by(self.publications, self.table, claim)
        except EthaError as error:
            self.table.fail(claim, error)
            return None

    @staticmethod
    def _in_the_way(claim: Lease, publication: Publication) -> bool:
        """Whether its reader has memory mapped that the owner wants back; by an import that is not over meanwhile."""
        through = publication.imports.get((claim.client, claim.through))
        return isinstance(publication.moving, Suspending) and through is not None and through.layout > 0

    def _ask_unmap(self, claim: Lease) -> None:
        self.table.forget(claim)
        self.table.effects.append(AskUnmap(claim))
