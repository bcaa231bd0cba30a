"""The owner's side: tensors under a name, version after version.

A `Publication` pins what it shares (`shared`): the storages stay allocated and in place until every importer, the agent
included, has closed its mapping. That pin is a reference, which a ``param.data = ...`` goes round, so each publish
compares address and size of every storage with what was exported. What has moved is exported again by `rebind`; the
memory is had back for a while by `suspend`.

Versions are the owner's to assign, and only grow.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from etha.errors import AgentGone, AgentTimeout, EthaError, InvalidArgument, LeaseReleased, StaleHandle
from etha.tensor_bus import clock
from etha.tensor_bus.commands import Abandon, Close, Publish, Rebind, Suspend
from etha.tensor_bus.ipc.export import Export
from etha.tensor_bus.link import Link, Ticket
from etha.tensor_bus.shared import Shared
from etha.tensor_bus.state import ClaimRecord
from etha.tensor_bus.update import Update

if TYPE_CHECKING:
    import torch


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

    def __init__(self, link: Link, name: str, generation: int, shared: Shared, version: int) -> None:
        self.name = name
        self.generation = generation
        self._link = link
        self._shared = shared
        self._suspended: Update | None = None
        self._version = version
        self._closed = False
        self._writing = 0
        self._writer = 0
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
            AgentTimeout: another worker stands still with the queue in hand; ``holder`` names it.
            QueueFull: the command queue has reached its size.
        """
        self._require_open()
        with self._lock:
            self._require_memory()
            if self._writing:
                raise InvalidArgument(
                    f'"{self.name}" is being updated: leaving the update publishes.',
                    resource=self.name,
                    remedy="Call publish() outside of update().",
                )
            self._shared.check()
            chosen = self._next_version(version)
            ticket = Ticket()
            fence = self._link.device.order.mark()
            self._commit(ticket, Publish(self.generation, chosen, 0, fence), voids=self._unguarded)
            self._unguarded = ticket.sequence
            return chosen

    def rebind(self, tensors: Mapping[str, torch.Tensor], timeout: float = 30.0) -> None:
        """Share these tensors from now on, under the same names: for parameters that were moved.

        What has not moved is not exported again. Outside of an update this waits for leases, as an update does, and
        publishes the next version; within one (``with policy.update(): ...; policy.rebind(...)``) leaving it does.
        Readers follow at their next `read`. What was shared before stays allocated until they have.

        Args:
            tensors: the same names, dtypes and shapes as before.
            timeout: seconds to wait for leases, and for the agent.

        Raises:
            InvalidArgument: other names, dtypes or shapes; ``resource`` names the first. Nothing has changed.
            NotShareable: a tensor cannot be shared as it is now. Nothing has changed.
            LeaseTimeout, DeadlockError: see `update`.
            SystemLimit: out of descriptors or mappings, on either side. What was shared before still is.
            AgentTimeout, AgentGone: it may have been done or not. Until a rebind succeeds, publishing is refused.
        """
        self._require_open()
        self._require_memory()
        export = self._shared.export_anew(tensors)
        if self._writing and self._writer == threading.get_native_id():
            self._move(export, timeout)
            return
        deadline = clock.deadline_after(timeout)
        try:
            with self.update(timeout=timeout):
                self._move(export, clock.remaining(deadline))
        finally:
            export.close_fds()

    def suspend(self, timeout: float = 30.0) -> None:
        """Have the memory back for a while: every mapping of it, the readers' and the agent's, is closed. A second time
        does nothing.

        Subscriptions go on, and their reads wait until `resume`. etha itself drops its references to the tensors, so
        that ``storage.resize_(0)``, moving them elsewhere, or dropping them frees the memory. A reader unmaps when it
        calls `read`, or while it waits in it; ``fileno()`` wakes it.

        Args:
            timeout: seconds to wait for leases and for mappings.

        Raises:
            LeaseTimeout, DeadlockError: see `update`. Nothing has changed.
            MappingTimeout: ``holder`` names who still has it mapped: a tensor that was kept, or no `read` in all that
                time. Nothing has changed.
            AgentTimeout, AgentGone: it may be suspended or not. The memory is still in use; `resume` makes it whole.
        """
        self._require_open()
        if self._suspended is not None:
            return
        link, ticket, deadline = self._link, Ticket(), clock.deadline_after(timeout)
        update = self.update(timeout=timeout)
        update.__enter__()
        record = Suspend(self.generation, self._writing, threading.get_native_id(), deadline)
        try:
            link.command(ticket, record, deadline, answered=True)
            link.outcome(ticket, deadline, timeout)
            link.settle(ticket)
        except BaseException as error:
            if isinstance(error, EthaError) and not isinstance(error, AgentTimeout | AgentGone):
                update.give_back()
            else:
                self._suspended = update
                self._shared.doubt_memory()
            link.give_up(ticket, error, self._shared)
            raise
        self._suspended = update
        self._shared.suspend()

    def resume(self, tensors: Mapping[str, torch.Tensor] | None = None, timeout: float = 30.0) -> None:
        """Share memory again after `suspend`, and publish it as the next version.

        Args:
            tensors: the same names, dtypes and shapes as before; None for the same tensor objects, as they lie now.
            timeout: seconds to wait for the agent.

        Raises:
            InvalidArgument: it is not suspended, a tensor object is gone, or one differs in name, dtype or shape.
            NotShareable: a tensor cannot be shared as it is now. It is still suspended.
            SystemLimit, AgentTimeout, AgentGone: it is still suspended; call this again.
        """
        self._require_open()
        if self._suspended is None:
            raise InvalidArgument(
                f'"{self.name}" is not suspended.', resource=self.name, remedy="Use rebind() for tensors that moved."
            )
        deadline = clock.deadline_after(timeout)
        if not self._suspended.held:  # a close() that failed has given it back
            self._suspended = self.update(timeout=timeout).begin()
        self._move(self._shared.export_anew(tensors), clock.remaining(deadline))
        update, self._suspended = self._suspended, None
        update.__exit__(None, None, None)

    def close(self, timeout: float = 30.0) -> None:
        """End the publication and have the memory back. A second time does nothing.

        New reads are refused at once; then this waits until every lease and every mapping of it is gone.

        Raises:
            LeaseTimeout, MappingTimeout: ``holder`` names who still has one. The publication is what it was, open or
                suspended.
            DeadlockError: this thread itself holds a lease on it.
            AgentTimeout, AgentGone: no answer; the publication is what it was. Call this again.
        """
        if self._closed:
            return
        self._link.connection.require_own_process()
        deadline = clock.deadline_after(timeout)
        ticket = Ticket()
        record = Close(self.generation, threading.get_native_id(), deadline)
        self._link.reap()
        try:
            if self._suspended is not None and self._suspended.held:
                self._suspended.give_back()  # a closing waits behind updates
            self._tell_torn(deadline)
            self._link.command(ticket, record, deadline, answered=True)
            self._link.outcome(ticket, deadline, timeout)
        except StaleHandle:
            self._link.settle(ticket)  # closed already: by another thread, or by a call that was interrupted
        except BaseException as error:
            self._link.give_up(ticket, error, self._shared)
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
            self._link.connection.claims.discard(number)
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
            self._shared.doubt_memory()  # it may be that a new agent has not got it: a rebind() leaves nothing out
            raise failure

    def _require_memory(self) -> None:
        if self._suspended is not None:
            raise InvalidArgument(
                f'"{self.name}" is suspended: it has no memory that could be a version.',
                resource=self.name,
                remedy="Call resume() first.",
            )

    def _move(self, export: Export, timeout: float) -> None:
        """Within the update that writes: share this instead of what is shared now."""
        link, ticket, deadline = self._link, Ticket(), clock.deadline_after(timeout)
        record = Rebind(self.generation, self._writing, export.manifest, threading.get_native_id(), deadline)
        try:
            link.command(ticket, record, deadline, answered=True, ring=False)
            link.exports[ticket.sequence] = export
            link.send_descriptors(ticket.sequence, self._shared.moved(export), deadline + clock.grace(timeout))
            link.outcome(ticket, deadline, timeout)
            link.settle(ticket)
            self._shared.replace(export, ticket.sequence, link.state.publication(self.generation).layout)
        except BaseException as error:
            if not isinstance(error, EthaError) or isinstance(error, AgentTimeout | AgentGone):
                # The agent may have done it, and may not: neither memory may go.
                self._shared.doubt(export, ticket.sequence)
            else:
                link.exports.pop(ticket.sequence, None)
            link.give_up(ticket, error, export)
            raise
        finally:
            export.close_fds()

    def _forget(self) -> None:
        self._closed = True
        self._suspended = None
        self._shared.clear()
