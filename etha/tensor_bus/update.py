"""One exclusive write of an owner: the body of ``with publication.update():``.

It is granted when no reader holds a lease, and on record before the body runs. It ends as a version, or torn, or as if
it had never been. An agent that is gone when it ends is no error: what became of it stands in the command queue.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING, Final

from etha.errors import EthaError, InvalidArgument
from etha.tensor_bus import clock, packets
from etha.tensor_bus.commands import Publish, Release
from etha.tensor_bus.link import Ticket

_GIVE_BACK_SECONDS: Final = 0.05

if TYPE_CHECKING:
    from etha.tensor_bus.publication import Publication


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

    @property
    def held(self) -> bool:
        """True from its grant to its end, however it ends."""
        return self._held

    def __enter__(self) -> Update:
        publication = self._publication
        publication._require_open()
        publication._require_memory()
        if self._number:
            raise InvalidArgument(
                "an update is entered once.", resource=publication.name, remedy="Call update() again."
            )
        return self.begin()

    def begin(self) -> Update:
        """Enter it, whether there is memory to be written or not."""
        publication = self._publication
        with publication._lock:
            publication._next_version(self._asked)
        link = publication._link
        if link.device.ordered:
            link.device.order.require_open()
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
            publication._writer = threading.get_native_id()
            if isinstance(reply, packets.MayWrite):
                link.note_served(reply.served)
                publication._shared.let_go(reply.oldest)
                for slot, fence in reply.after:
                    link.device.order.follow(slot, fence)
        except BaseException:
            self.give_back()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._held:
            return
        if error is not None:
            try:
                self.abandon(self._publication._link.patience)
            except EthaError:
                pass  # the body's exception is the one that matters; what could not be said, the next call says
            return
        try:
            self._publish()
        except BaseException:
            self.abandon(0.0)
            raise

    def __del__(self) -> None:
        if self._held:
            try:
                self.abandon(0.0)
            except EthaError:
                return  # the next call says it

    def _publish(self) -> None:
        publication = self._publication
        publication._shared.check()
        with publication._lock:
            version = publication._next_version(self._asked)
            if publication._link.connection.usable:
                fence = publication._link.device.order.mark()
                publication._commit(Ticket(), Publish(publication.generation, version, self._number, fence))
            publication._version = version
            self.version = version
            publication._link.connection.claims.discard(self._number)  # only now: the queue says how it has ended
            self._done()

    def abandon(self, patience: float) -> None:
        """It ended half-way: the publication is torn."""
        publication = self._publication
        publication._torn.append(self._number)
        self._done()
        publication._tell_torn(clock.now() + patience)

    def give_back(self) -> None:
        """It was never entered: the publication is what it was."""
        link = self._publication._link
        try:
            if self._held:  # through the queue: a publish() that follows must not be served before it
                link.command(Ticket(), Release(self._number), clock.now() + _GIVE_BACK_SECONDS, answered=False)
        except EthaError:
            pass  # a neighbour stands still with the queue in hand; the packet says it too
        finally:
            link.release(self._number)
            self._done()

    def _done(self) -> None:
        self._held = False
        if self._publication._writing == self._number:
            self._publication._writing = 0
