"""The reader's side: a publication's memory, mapped once, and leases on its versions.

The mapping is made when the subscription is, and lasts until it is closed *and* the last tensor taken from it has
been dropped. Only then does the agent hear that the owner may have its memory back; a tensor that is kept thus keeps
the owner's `close` waiting, and is named by it. A subscription whose owner died or closed closes itself at the call
that is told so.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, cast

from etha.errors import EthaError, InvalidArgument, LeaseReleased, OwnerDiedError, PublicationClosed
from etha.tensor_bus import clock, packets
from etha.tensor_bus.ipc.mapping import ImportedMemory, import_memory
from etha.tensor_bus.ipc.view import build_views
from etha.tensor_bus.lease import Lease
from etha.tensor_bus.link import Link
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
        self._number = link.number()
        self._end: EthaError | None = None
        self._bell: int | None = None
        self._seen = -1
        self._lock = threading.Lock()
        packet = packets.Subscribe(self._number, name, threading.get_native_id(), clock.deadline_after(timeout))
        memory: ImportedMemory | None = None
        try:
            reply, mail = link.request(self._number, packet, timeout)
            if not isinstance(reply, packets.Imported):
                raise TypeError(f"an import was expected, not {type(reply).__name__}")
            self.generation = reply.generation
            record = link.state.publication(reply.generation)
            self._memory = memory = import_memory(record.manifest, mail.descriptors())
            mail.close()
            self._tensors: dict[str, torch.Tensor] = build_views(record.manifest, memory)
            self._seen = reply.version
            self._closed = False
        except BaseException:
            if memory is not None:
                memory.close()
            link.connection.tell(packets.Release(self._number))
            raise

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
            InvalidArgument: both versions were given, or a negative one.
        """
        self._require_open()
        self._check_versions(version, min_version)
        link = self._link
        self._silence()
        lease = Lease(link, self.name, self.generation, link.number())
        packet = packets.Read(
            number=lease._number,
            generation=self.generation,
            name=self.name,
            exact=version,
            minimum=min_version or 0,
            thread=threading.get_native_id(),
            deadline=clock.deadline_after(timeout),
        )
        try:
            reply, _ = link.request(lease._number, packet, timeout)
            if not isinstance(reply, packets.Leased):
                raise TypeError(f"a lease was expected, not {type(reply).__name__}")
            lease._hold(reply, self._tensors)
            if self._closed:  # by another thread, meanwhile: it may have taken the tensors away already
                self._require_open()
            self._seen = max(self._seen, reply.version)
        except BaseException as error:
            lease._give_back()
            if isinstance(error, PublicationClosed | OwnerDiedError):
                self._end = Failure.of(error).error()  # its own traceback would keep this frame, and the memory
                self.close()
            raise
        return lease

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
                self._make_bell()
            return cast(int, self._bell)

    def _make_bell(self) -> None:
        connection = self._link.connection
        pipe: list[tuple[int, int]] = []
        try:
            # Made and put on record in one call, so that an interrupt finds either nothing or both.
            pipe.extend(map(os.pipe2, (os.O_CLOEXEC | os.O_NONBLOCK,)))
            connection.bells.update(pipe[0])
            deadline = clock.now() + self._link.patience
            connection.send(packets.Bell(self._number, self._seen), deadline, [pipe[0][1]])
            self._bell = pipe[0][0]
        finally:
            if pipe:
                try:
                    os.close(pipe[0][1])
                finally:
                    if self._bell is None:
                        os.close(pipe[0][0])
                    connection.bells.discard(pipe[0][1])
                    if self._bell is None:
                        connection.bells.discard(pipe[0][0])

    def _silence(self) -> None:
        with self._lock:
            if self._bell is not None:
                try:
                    os.read(self._bell, 64)
                except BlockingIOError:
                    return

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
            # Noted before anything is undone: whatever interrupts this, the next call of etha completes it.
            self._link.import_dropped(self._number, self._memory)
            self._closed = True
            self._tensors = {}
            bell, self._bell = self._bell, None
            if bell is not None:
                self._link.connection.bells.discard(bell)
                os.close(bell)
        self._link.reap()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed and not self._link.connection.forked:
            self._link.import_dropped(self._number, self._memory)
            if self._bell is not None:
                self._link.connection.bells.discard(self._bell)
                os.close(self._bell)

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
