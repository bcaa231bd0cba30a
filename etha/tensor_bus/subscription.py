"""The reader's side: a publication's memory, mapped once, and leases on its versions.

The mapping is made when the subscription is, and lasts until it is closed *and* the last tensor taken from it has
been dropped. Only then does the agent hear that the owner may have its memory back; a tensor that is kept thus keeps
the owner's `close` waiting, and is named by it. A subscription whose owner died or closed closes itself at the call
that is told so.

An owner may move its tensors, or take the memory back for a while. `read` is where the reader follows: it unmaps when
it is asked to, and maps what a lease is on when that lies elsewhere. A new import takes the place of the old one then.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from etha.errors import (
    AgentGone,
    EthaError,
    InvalidArgument,
    LeaseReleased,
    OwnerDiedError,
    PublicationClosed,
    StaleHandle,
)
from etha.tensor_bus import clock, packets
from etha.tensor_bus.bell import Bell
from etha.tensor_bus.lease import Lease
from etha.tensor_bus.link import Link
from etha.tensor_bus.mapped import Mapped
from etha.tensor_bus.records import Failure

if TYPE_CHECKING:
    import torch


class Subscription:
    """A reader's hold on one publication. Made by `TensorBusClient.subscribe`; safe across threads.

    Iterating over it gives a lease on each newest version, skipping those missed, each released at the next step;
    the owner's clean close ends the iteration.

    Attributes:
        name: the publication's name.
        generation: its number at the agent.
    """

    _closed = True

    def __init__(self, link: Link, name: str, timeout: float) -> None:
        """Wait for the publication to exist and map it; see `TensorBusClient.subscribe`."""
        self.name = name
        self._link = link
        self._end: EthaError | None = None
        self._bell: Bell | None = None
        self._lock = threading.Lock()
        self._mapped = Mapped(link, name, timeout)
        self.generation = self._mapped.generation
        self._seen = self._mapped.version
        self._closed = False

    # -- reading ----------------------------------------------------------------------------------

    def read(self, version: int | None = None, min_version: int | None = None, timeout: float = 30.0) -> Lease:
        """Take a lease on one version.

        A read that comes while an update waits gets the version that it will publish, unless this thread already holds
        a lease on the current one.

        Args:
            version: exactly this one.
            min_version: the newest, if it is at least this.
            timeout: seconds; 0 polls: it waits for the agent's answer and for nothing else.

        Raises:
            VersionGone: ``version`` has been replaced.
            VersionTimeout: it was not published in time.
            LeaseTimeout: an update stood in the way until the deadline; ``holder`` names who.
            TornError: the last update ended half-way.
            OwnerDiedError, PublicationClosed: there will be no more versions.
            DeadlockError: waiting would close a cycle.
            AgentTimeout, AgentGone: the agent does not answer, or is no more.
            StreamCapturing: the current stream is being captured into a CUDA graph.
            InvalidArgument: both versions were given, or a negative one.
        """
        self._require_open()
        if version is not None or min_version is not None:
            self._check_versions(version, min_version)
        deadline = clock.deadline_after(timeout)
        if self._bell is not None:
            self._silence()
        if self._link.device.ordered:
            self._link.device.order.require_open()
        patient = False
        while True:
            mapped = self._mapped
            asked = Asked(version, min_version or 0, deadline, timeout, patient, mapped.number)
            try:
                lease = self._ask(asked)
            except StaleHandle:
                if self._closed:
                    self._require_open()  # another thread has closed it, meanwhile; this says so
                if mapped is self._mapped:
                    raise
                continue  # another thread has mapped anew, and given back the import that this asked through
            except (PublicationClosed, OwnerDiedError) as error:
                self._end = Failure.of(error).error()  # its own traceback would keep this frame, and the memory
                self.close()
                raise
            if lease is not None:
                return lease
            patient = self._unmap(deadline)

    def _ask(self, asked: Asked) -> Lease | None:
        """One request; None if the memory is to be unmapped first."""
        link, number = self._link, self._link.number()
        lease = Lease(link, self.name, self.generation, number)
        packet = packets.Read(
            number=number,
            generation=self.generation,
            name=self.name,
            exact=asked.version,
            minimum=asked.minimum,
            thread=threading.get_native_id(),
            deadline=asked.deadline,
            through=asked.through,
            patient=asked.patient,
        )
        try:
            reply, _ = link.request(number, packet, asked.timeout)
            if isinstance(reply, packets.Unmap):
                # A successor may be asked twice, and hear in between that this is unmapped: then the second one waits.
                link.connection.tell(packets.Release(number))
                return None
            if not isinstance(reply, packets.Leased):
                raise TypeError(f"a lease was expected, not {type(reply).__name__}")
            tensors = self._mapped.at(reply.layout)
            lease._hold(reply, self._map_again(asked) if tensors is None else tensors)
            if reply.fence:
                link.device.order.follow(reply.slot, reply.fence)
            if self._closed:  # by another thread, meanwhile: it may have taken the tensors away already
                self._require_open()
            self._seen = max(self._seen, reply.version)
        except BaseException:
            lease._give_back()
            raise
        return lease

    def _unmap(self, deadline: float) -> bool:
        """The owner wants its memory back; whether a tensor that somebody keeps stands in the way."""
        with self._lock:
            mapped = self._mapped
            mapped.unmap()  # a second time only tells it again: an agent has died that had been told
        self._link.device.done(deadline)
        self._link.reap()
        return mapped.number in self._link.endings

    def _map_again(self, asked: Asked) -> Mapping[str, torch.Tensor]:
        """The memory lies elsewhere now; its tensors. A lease is held, so it stays there meanwhile."""
        patience = max(clock.remaining(asked.deadline), self._link.patience)
        fresh = Mapped(self._link, self.name, patience, self.generation)
        if fresh.generation != self.generation:
            fresh.end()
            raise _followed(self.name)
        tensors = fresh.tensors  # now: another thread that maps anew ends this mapping
        with self._lock:
            if self._closed:  # by another thread, meanwhile; who asked is told so
                fresh.end()
                return tensors
            before, self._mapped = self._mapped, fresh
            before.end()
            if self._bell is not None:
                self._ring_through(self._bell, before.number)
        self._link.reap()
        return tensors

    def versions(self, timeout: float = 30.0) -> Iterator[Lease]:
        """Iterate over each newest version; ``timeout`` seconds is the longest wait for the next one.

        Raises:
            VersionTimeout: no newer version came in time.
            EthaError: see `read`.
        """
        newest = -1
        while True:
            try:
                lease = self.read(min_version=newest + 1, timeout=timeout)
            except PublicationClosed:
                return
            newest = lease.version
            with lease:
                yield lease

    def __iter__(self) -> Iterator[Lease]:
        return self.versions()

    # -- being woken ------------------------------------------------------------------------------

    def fileno(self) -> int:
        """A descriptor for ``select`` and ``asyncio``; made on first use, closed with the subscription.

        It becomes readable when there is a newer version, when a lease is wanted back, when the owner died or closed,
        and when the agent is gone. `read` takes the readiness away. It is a hint: there may be nothing new.
        """
        self._require_open()
        with self._lock:
            if self._bell is None:
                bell = Bell(self._seen)
                try:
                    self._ring_through(bell, self._mapped.number)
                    self._bell = bell
                finally:
                    if self._bell is None:
                        self._link.connection.bells.pop(self._mapped.number, None)
                        bell.close()
            return self._bell.fileno()

    def _ring_through(self, bell: Bell, before: int) -> None:
        """Give the agent the bell of this import, which may have followed on another."""
        connection = self._link.connection
        connection.bells.pop(before, None)
        number = self._mapped.number
        bell.seen = self._seen
        try:
            connection.send_bell(number, bell, clock.now() + self._link.patience)
        except AgentGone:
            return  # its successor gets the bell of every import that comes back

    def _silence(self) -> None:
        with self._lock:
            if self._bell is not None:
                self._bell.silence()
                self._bell.seen = self._seen

    # -- ends -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the mapping back. Tensors that are still kept keep it, until they are dropped.

        A subscription that is dropped without this is closed by the client's next call.
        """
        if self._link.connection.forked:
            return
        with self._lock:
            if self._closed:
                return
            self._mapped.end()
            self._closed = True
            self._close_bell()
        self._link.reap()

    def _close_bell(self) -> None:
        bell, self._bell = self._bell, None
        if bell is not None:
            self._link.connection.bells.pop(self._mapped.number, None)
            bell.close()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed and not self._link.connection.forked:
            self._mapped.end()
            self._close_bell()

    def __repr__(self) -> str:
        return f'<Subscription to "{self.name}"{", closed" if self._closed else ""}>'

    def _require_open(self) -> None:
        self._link.connection.require_own_process()
        if self._end is not None:
            raise Failure.of(self._end).error()
        if self._closed:
            raise LeaseReleased(
                f'the subscription to "{self.name}" is closed.', resource=self.name, remedy="Subscribe again."
            )
        self._link.reap()
        self._link.connection.require_usable()

    def _check_versions(self, version: int | None, min_version: int | None) -> None:
        if version is not None and min_version is not None:
            raise InvalidArgument(
                "version= and min_version= exclude each other.", resource=self.name, remedy="Give one of them."
            )
        for value in (version, min_version):
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63
            ):
                raise InvalidArgument(
                    f"{value!r} is no version.", resource=self.name, remedy="Versions are >= 0 and below 2**63."
                )


class Asked(NamedTuple):
    """What a read asks for, however often it has to ask."""

    version: int | None
    minimum: int
    deadline: float
    timeout: float
    patient: bool
    through: int


def _followed(name: str) -> OwnerDiedError:
    return OwnerDiedError(
        f'"{name}" has another owner now.', resource=name, remedy="Subscribe again: that maps what it publishes."
    )
