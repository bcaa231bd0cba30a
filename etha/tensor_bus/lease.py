"""A lease: one version of a publication, in place, until it is given back.

It is a context manager and a mapping from name to tensor. The tensors alias the owner's memory. That of the host is
mapped read-only: a write through them ends the process with SIGSEGV. They stay valid memory after the lease, for as
long as anyone keeps them, but from then on the owner may write while they are read.

A lease ends at ``with``'s end, at `release`, or when it is collected (then with a `ResourceWarning`). It belongs to
the thread that took it as far as the search for deadlocks goes; any thread may release it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from etha.errors import LeaseReleased, LeaseTimeout, OwnerDiedError, StaleHandle, TornError
from etha.tensor_bus import clock, packets
from etha.tensor_bus.claims import Phase
from etha.tensor_bus.copying import copy_tensors
from etha.tensor_bus.ipc.order import wait_until_reached
from etha.tensor_bus.link import Link

if TYPE_CHECKING:
    import torch


class Lease(Mapping[str, "torch.Tensor"]):
    """One version, in place. Made by `Subscription.read` and by iterating over a `Subscription`.

    Attributes:
        name: the publication's name.
        version: the version that is held.
        guarded: False when the owner published it without waiting for readers, and so without excluding a write
            under an older lease.
    """

    _held = False

    def __init__(self, link: Link, name: str, generation: int, number: int) -> None:
        self.name = name
        self.version = -1
        self.guarded = True
        self._link = link
        self._generation = generation
        self._number = number
        self._writes = 0
        self._slot = 0
        self._stream = 0
        self._tensors: Mapping[str, torch.Tensor] = {}

    def _hold(self, reply: packets.Leased, tensors: Mapping[str, torch.Tensor]) -> None:
        self._held = True
        self.version = reply.version
        self.guarded = reply.guarded
        self._writes = reply.writes
        self._slot = reply.slot
        self._tensors = tensors
        if self._link.device.ordered:
            self._stream = self._link.device.order.stream()

    def _give_back(self) -> None:
        """Before anybody has seen a tensor of it."""
        self._link.connection.tell(packets.Release(self._number))
        self._held = False
        self._tensors = {}

    # -- the mapping ------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> torch.Tensor:
        self._require_held()
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        self._require_held()
        return iter(self._tensors)

    def __len__(self) -> int:
        self._require_held()
        return len(self._tensors)

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    # -- the lease --------------------------------------------------------------------------------

    @property
    def wanted(self) -> bool:
        """True when someone waits for this lease, an update or the owner's closing; and when the agent knows nothing of
        it any more. Costs a look at the state."""
        self._require_held()
        record = None if self._link.state.superseded() else self._link.state.version(self._generation)
        return record is None or record.wanted or record.writes != self._writes

    def check(self) -> None:
        """Make sure that what was read until now was one version.

        Waits for this process's own work on the lease, as far as it was given to the stream on which that was taken,
        and to this thread's current one. On host memory it is done when its call returns.

        Raises:
            LeaseTimeout: that work is not done within the client's ``connection_timeout``. Nothing is known yet.
            TornError: a write began since the lease was granted: it was revoked, or its owner died writing.
            OwnerDiedError: the publication is gone, and whether it was whole cannot be told.
            AgentGone: so is the agent, and none has followed within the client's ``connection_timeout``.
            StaleHandle: one has followed that knows nothing of the lease: whether it was whole cannot be told.
            LeaseReleased: the lease is over.
        """
        self._require_held()
        if self._link.device.ordered:
            self._await_own_work()
        self._link.connection.ensure_agent(clock.now() + self._link.patience)
        if self._link.state.superseded():
            raise StaleHandle(
                f'the agent that granted the lease on "{self.name}" has gone, and what it knew is lost.',
                resource=self.name,
                remedy="Discard what was read, make a new client, and subscribe again.",
            )
        record = self._link.state.version(self._generation)
        if record is None:
            raise OwnerDiedError(
                f'"{self.name}" is gone.', resource=self.name, remedy="Discard what was read, and subscribe again."
            )
        if record.writes != self._writes or record.phase == Phase.CLOSED:
            # A close waits for leases: one that did not was the owner leaving, who may write as it likes.
            raise TornError(
                f'version {self.version} of "{self.name}" was written over while it was read.',
                resource=self.name,
                remedy="Discard what was read, and read again.",
            )

    def copy_into(
        self,
        targets: torch.nn.Module | Mapping[str, torch.Tensor],
        *,
        names: Iterable[str] | None = None,
        strict: bool = True,
    ) -> None:
        """Copy tensors of this version into ``targets``, cast where dtypes differ.

        From device to device it is queued on the current stream, as the lease's end will be, and returns at once.

        Args:
            targets: a module (its parameters and buffers), or name to tensor: any view to be written.
            names: only these; None for all.
            strict: refuse names that only one side has.

        Raises:
            InvalidArgument: a name is missing or unexpected, a shape differs, or a target is expanded or not strided;
                ``resource`` names the tensor. Nothing has been copied then.
            LeaseReleased: the lease is over.
        """
        self._require_held()
        copy_tensors(self._tensors, targets, names=names, strict=strict)

    def release(self) -> None:
        """Give the version back. A second time does nothing."""
        if self._held:
            # Before it is forgotten here: an interrupt in between lets it be told again.
            self._link.release(self._number, self._link.device.order.mark(self._stream))
            self._held = False
            self._tensors = {}

    def __enter__(self) -> Lease:
        self._require_held()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if self._held and self._link.connection.usable:
            self._link.endings.lease_dropped(self._number, self._stream)
            warnings.warn(
                f'a lease on version {self.version} of "{self.name}" was collected, not released',
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def __repr__(self) -> str:
        state = "held" if self._held else "released"
        return f'<Lease on version {self.version} of "{self.name}", {state}>'

    def _await_own_work(self) -> None:
        order = self._link.device.order
        if not wait_until_reached(order, order.mark(self._stream), clock.now() + self._link.patience, clock.now):
            raise LeaseTimeout(
                f'this process\'s own work on version {self.version} of "{self.name}" is not done yet.',
                resource=self.name,
                holder=f"pid {os.getpid()}",
                remedy="Check again when it is, or connect with a longer connection_timeout.",
            )
        if order.abandoned(self._slot):
            raise OwnerDiedError(
                f'the owner of "{self.name}" has died, perhaps before version {self.version} was whole.',
                resource=self.name,
                remedy="Discard what was read, and subscribe again.",
            )

    def _require_held(self) -> None:
        if not self._held:
            raise LeaseReleased(
                f'the lease on version {self.version} of "{self.name}" is over.',
                resource=self.name,
                remedy="Use its tensors inside the with block, or read again.",
            )
        self._link.connection.require_own_process()
