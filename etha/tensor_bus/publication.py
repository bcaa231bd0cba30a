"""The owner's side: tensors under a name, version after version.

A `Publication` pins what it shares: the storages stay allocated and in place until every importer, the agent
included, has closed its mapping. That pin is a reference, which a ``param.data = ...`` goes round, so each publish
compares address and size of every storage with what was exported.

Versions are the owner's to assign, and only grow.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from etha.errors import EthaError, InvalidArgument, LeaseReleased, StaleHandle
from etha.tensor_bus import clock, packets
from etha.tensor_bus.commands import Abandon, Close, Publish
from etha.tensor_bus.ipc.host import Export
from etha.tensor_bus.link import Link, Ticket
from etha.tensor_bus.state import ClaimRecord


@dataclass(frozen=True)
class Reader:
    """Who has a publication mapped, or leased.

    Attributes:
        pid: of the process.
        label: for people.
        version: the version leased, or None for a mapping alone.
        age: seconds since the lease was granted, or the memory mapped.
    """

    pid: int
    label: str
    version: int | None
    age: float


class Publication:
    """Tensors that others may use in place. Made by `TensorBusClient.register_tensors`; safe across threads.

    Attributes:
        name: its name.
        generation: its number at the agent; a new owner, or a new registration, has a new one.
    """

    def __init__(self, link: Link, name: str, generation: int, export: Export, version: int) -> None:
        self.name = name
        self.generation = generation
        self._link = link
        self._export: Export | None = export
        self._version = version
        self._closed = False
        self._writing = 0
        self._torn: list[int] = []
        self._unguarded = 0
        self._lock = threading.Lock()

    @property
    def version(self) -> int:
        """The newest version that this owner has published."""
        return self._version

    @property
    def closed(self) -> bool:
        """True once `close` has succeeded, or the client was closed."""
        return self._closed

    def update(
        self,
        version: int | None = None,
        timeout: float = 30.0,
        on_timeout: Literal["raise", "revoke"] = "raise",
    ) -> Update:
        """Write, while no reader holds a lease; to be used as ``with publication.update():``.

        Entering waits until no lease is out and marks the publication as being written; leaving publishes. If the
        body raises, the version is torn and readers are told so until the next good update.

        Args:
            version: the version to publish; None for the next one.
            timeout: seconds to wait for leases to be released.
            on_timeout: ``"revoke"`` ends the leases that are still out then (their `Lease.check` raises `TornError`).

        Raises:
            LeaseTimeout: on entering: a lease was still out; ``holder`` names who holds it.
            DeadlockError: on entering: waiting would close a cycle, such as a lease of this very thread.
            AgentTimeout, AgentGone: on entering. On leaving, an agent that is gone is no error.
            StorageMoved: on leaving: a tensor no longer lies where it was exported. The version is torn.
            InvalidArgument: a version that does not grow, or an argument out of range.
        """
        if on_timeout not in ("raise", "revoke"):
            raise InvalidArgument(
                f'on_timeout={on_timeout!r} is neither "raise" nor "revoke".',
                resource="on_timeout",
                remedy='Say "raise" or "revoke".',
            )
        clock.deadline_after(timeout)
        return Update(self, version, timeout, on_timeout == "revoke")

    def publish(self, version: int | None = None) -> int:
        """Declare that the tensors, as they are, are the next version. Waits for no reader, and for no agent.

        No byte may have changed while a lease was out; etha cannot check that, and says ``guarded == False`` of such
        a version. Publishes that a stopped agent has not served yet are conflated: only the newest is kept.

        Returns:
            The version published.

        Raises:
            StorageMoved: a tensor no longer lies where it was exported; nothing was published.
            InvalidArgument: the version does not grow, or an update is under way.
            AgentGone: there is no agent any more.
            AgentTimeout: another worker stands still with the queue in hand; ``holder`` names it.
            QueueFull: the command queue has reached its size.
        """
        self._require_open()
        with self._lock:
            if self._writing:
                raise InvalidArgument(
                    f'"{self.name}" is being updated: leaving the update publishes.',
                    resource=self.name,
                    remedy="Call publish() outside of update().",
                )
            self._check_storages()
            chosen = self._next_version(version)
            ticket = Ticket()
            self._commit(ticket, Publish(self.generation, chosen, 0), voids=self._unguarded)
            self._unguarded = ticket.sequence
            return chosen

    def close(self, timeout: float = 30.0) -> None:
        """End the publication and have the memory back. A second time does nothing.

        New reads are refused at once; then this waits until every lease and every mapping of it is gone.

        Raises:
            LeaseTimeout, MappingTimeout: ``holder`` names who still has one. The publication is open again.
            DeadlockError: this thread itself holds a lease on it.
            AgentTimeout: no answer; the publication is open.
        """
        if self._closed:
            return
        self._link.connection.require_own_process()
        deadline = clock.deadline_after(timeout)
        ticket = Ticket()
        record = Close(self.generation, threading.get_native_id(), deadline)
        self._link.reap()
        try:
            self._tell_torn(deadline)
            self._link.command(ticket, record, deadline, answered=True)
            self._link.outcome(ticket, deadline, timeout)
        except StaleHandle:
            self._link.settle(ticket)  # closed already: by another thread, or by a call that was interrupted
        except BaseException as error:
            self._link.give_up(ticket, error, self._export)
            raise
        self._forget()
        self._link.settle(ticket)

    def readers(self) -> list[Reader]:
        """Who has it mapped or leased at this moment, as the agent's state says."""
        self._require_open()
        now = clock.now()
        claims = self._link.state.all(ClaimRecord).values()
        return [
            Reader(claim.pid, claim.label, claim.version if claim.kind == "lease" else None, now - claim.since)
            for claim in claims
            if claim.generation == self.generation and claim.granted and claim.kind in ("lease", "import")
        ]

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"version {self._version}"
        return f'<Publication "{self.name}", {state}>'

    def _next_version(self, version: int | None) -> int:
        chosen = self._version + 1 if version is None else version
        if not isinstance(chosen, int) or isinstance(chosen, bool) or not self._version < chosen < 1 << 63:
            raise InvalidArgument(
                f'"{self.name}" is at version {self._version}; {chosen!r} is no larger version.',
                resource=self.name,
                remedy="Versions only grow; leave the argument out for the next one.",
            )
        return chosen

    def _commit(self, ticket: Ticket, record: Publish, voids: int = 0) -> None:
        """Publish, under the lock. An interrupt leaves the version taken: it may have been published."""
        before, self._version = self._version, record.version
        try:
            self._link.command(ticket, record, clock.now() + self._link.patience, answered=False, voids=voids)
        except EthaError:
            self._version = before
            raise

    def _tell_torn(self, deadline: float) -> None:
        """Tell the agent of updates that ended half-way; what cannot be said now, the next call says."""
        while self._torn and self._link.connection.usable:
            number = self._torn[0]
            self._link.command(Ticket(), Abandon(self.generation, number), deadline, answered=False)
            if number in self._torn:
                self._torn.remove(number)

    def _require_open(self) -> None:
        if self._closed:
            raise LeaseReleased(f'"{self.name}" is closed.', resource=self.name, remedy="Register the tensors again.")
        connection = self._link.connection
        connection.require_own_process()
        self._link.reap()
        connection.drain()
        connection.require_usable()
        if self._torn:
            self._tell_torn(clock.now() + self._link.patience)
        failure = connection.unasked.pop(self.generation, None)
        if failure is not None:
            raise failure

    def _check_storages(self) -> None:
        if self._export is not None:
            self._export.check()

    def _forget(self) -> None:
        self._closed = True
        self._export = None


class Update:
    """One exclusive write, as a context manager. Made by `Publication.update`; entered once."""

    _held = False

    def __init__(self, publication: Publication, version: int | None, timeout: float, revoke: bool) -> None:
        self._publication = publication
        self._asked = version
        self._timeout = timeout
        self._revoke = revoke
        self._number = 0
        self.version: int | None = None
        """The version that was published, once it was."""

    def __enter__(self) -> Update:
        publication = self._publication
        publication._require_open()
        if self._number:
            raise InvalidArgument(
                "an update is entered once.", resource=publication.name, remedy="Call update() again."
            )
        with publication._lock:
            publication._next_version(self._asked)
        link = publication._link
        deadline = clock.deadline_after(self._timeout)
        publication._tell_torn(deadline)
        self._number = link.number()
        packet = packets.Write(
            number=self._number,
            generation=publication.generation,
            name=publication.name,
            revoke=self._revoke,
            thread=threading.get_native_id(),
            deadline=deadline,
        )
        try:
            reply, _ = link.request(self._number, packet, self._timeout)
            self._held = True
            publication._writing = self._number
            if isinstance(reply, packets.MayWrite):
                link.note_served(reply.served)
        except BaseException:
            self._give_back()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._held:
            return
        if error is not None:
            try:
                self._abandon(self._publication._link.patience)
            except EthaError:
                pass  # the body's exception is the one that matters; what could not be said, the next call says
            return
        try:
            self._publish()
        except BaseException:
            self._abandon(0.0)
            raise

    def __del__(self) -> None:
        if self._held:
            try:
                self._abandon(0.0)
            except EthaError:
                return  # the next call says it

    def _publish(self) -> None:
        publication = self._publication
        publication._check_storages()
        with publication._lock:
            version = publication._next_version(self._asked)
            if publication._link.connection.usable:
                publication._commit(Ticket(), Publish(publication.generation, version, self._number))
            publication._version = version
            self.version = version
            self._done()

    def _abandon(self, patience: float) -> None:
        publication = self._publication
        publication._torn.append(self._number)
        self._done()
        publication._tell_torn(clock.now() + patience)

    def _give_back(self) -> None:
        self._publication._link.connection.tell(packets.Release(self._number))
        self._done()

    def _done(self) -> None:
        self._held = False
        if self._publication._writing == self._number:
            self._publication._writing = 0
