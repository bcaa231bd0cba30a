"""The agent's own hold on what is published: descriptors as they arrive, mappings, and looks at the owner.

Everything that may take long runs off the control loop: one thread opens and closes, in order; another does the
chores (looking into ``/proc``, clearing up after the dead). Each reports back through `Backstage.results`, whose
eventfd wakes the loop.

The agent maps what it holds and never touches the bytes: an owner that shrinks its memory cannot end it with SIGBUS.
"""

from __future__ import annotations

import logging
import os
import resource
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Final

from etha.errors import EthaError, InvalidRecord, SystemLimit
from etha.tensor_bus import clock, wire
from etha.tensor_bus.held import Held
from etha.tensor_bus.ipc.backend import Backend
from etha.tensor_bus.ipc.descriptors import in_use
from etha.tensor_bus.ipc.fetching import fetch_descriptors
from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.ipc.peer import Peer

logger = logging.getLogger(__name__)

_SPARE_DESCRIPTORS: Final = 256
"""Kept free for connections, pidfds and LMDB."""

_CHORE_REST: Final = 0.01
"""How long after it was asked for a chore begins. It shares the interpreter with the control loop: a look at an owner's
memory that began at once kept the answer to that same owner waiting, a millisecond for one tensor."""

_CHORE_SECONDS: Final = 3.0
"""How long the end of an agent waits for the chore that is going on: longer than one waits for a stopped worker."""


class Backstage:
    """Two threads beside the control loop, and the way back to it."""

    def __init__(self) -> None:
        self._opener = ThreadPoolExecutor(1, "etha-memory")
        self._helper = ThreadPoolExecutor(1, "etha-chores")
        self._chores: set[Future[Any]] = set()
        self._results: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """Readable while `results` has something."""
        return self._wake

    def open_or_close(self, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run ``job`` in order with its like; then, on the loop, ``then`` with its result or its `EthaError`."""
        self._opener.submit(job).add_done_callback(partial(self._done, then))

    def chore(self, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run ``job`` aside, a moment later; then, on the loop, ``then`` with its result or its `EthaError`."""
        future = self._helper.submit(_rested, clock.now() + _CHORE_REST, job)
        self._chores.add(future)
        future.add_done_callback(partial(self._done, then))

    def results(self) -> None:
        """On the loop: hand over what has been done."""
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            pass
        while self._results:
            try:
                self._results.popleft()()
            except Exception:  # whatever it is: a mistake of ours about one publication ends no one else's service
                logger.exception("a mistake of etha's in what a job beside the control loop led to")

    def close(self) -> bool:
        """Wait for the opener, which is short, and a while for the chore that is going on; drop the others.

        Returns:
            Whether nothing is going on any more.
        """
        self._opener.shutdown()
        self._helper.shutdown(wait=False, cancel_futures=True)
        return not wait(self._chores.copy(), _CHORE_SECONDS).not_done

    def _done(self, then: Callable[[Any], None], future: Future[Any]) -> None:
        self._chores.discard(future)
        if future.cancelled():
            return
        error = future.exception()
        self._results.append(partial(then, future.result() if error is None else _typed(error)))
        os.eventfd_write(self._wake, 1)


def _rested(moment: float, job: Callable[[], Any]) -> Any:
    time.sleep(clock.remaining(moment))
    return job()


def _typed(error: BaseException) -> EthaError:
    """What became of a job, as its caller can be told."""
    if isinstance(error, EthaError):
        return error
    if not isinstance(error, OSError):
        logger.error("a job beside the control loop failed", exc_info=error)
    return SystemLimit(
        f"the agent could not do it: {type(error).__name__}: {error}.",
        resource=None if not isinstance(error, OSError) else error.filename,
        remedy="The agent's log may say more. See that descriptors, memory and disk are free.",
    )


class Memory:
    """Every publication's memory in this agent. Used by the control loop only."""

    def __init__(
        self,
        backstage: Backstage,
        backend: Callable[[], Backend],
        opened: Callable[[int, EthaError | None], None],
        moved: Callable[[int, EthaError | None], None],
        closed: Callable[[int], None],
    ) -> None:
        self._backstage = backstage
        self._backend = backend
        self._opened = opened
        self._moved = moved
        self._closed = closed
        self._held: dict[int, Held] = {}
        self._announced: dict[tuple[bytes, int], Held] = {}

    def announce(self, client: bytes, sequence: int, manifest: Manifest) -> None:
        """A registration has come; its descriptors may arrive now, though its name may not be free yet.

        Raises:
            SystemLimit: there is no room for them, those promised to earlier registrations counted.
        """
        fds = [-1] * len(manifest.pieces)
        free = _free_descriptors() - sum(held.missing for held in (*self._announced.values(), *self._held.values()))
        if len(fds) > free:
            raise _too_many(len(fds), free)
        self._announced[client, sequence] = Held(manifest, client, sequence, fds)

    def announce_move(self, client: bytes, sequence: int, manifest: Manifest, generation: int) -> None:
        """A rebinding has come: the descriptors of what stays where it was are at hand already, or will be.

        Raises:
            SystemLimit: see `announce`.
        """
        self.announce(client, sequence, manifest)
        moving, here = self._announced[client, sequence], self._held.get(generation)
        moving.follows = generation
        try:
            if here is not None:
                moving.copy_from(here)
        except OSError as error:
            self.retract(client, sequence)
            raise _too_many(len(manifest.pieces), 0) from error

    def retract(self, client: bytes, sequence: int | None = None) -> None:
        """A registration, or every one of a client, is over before it began."""
        for key in [key for key in self._announced if key[0] == client and sequence in (None, key[1])]:
            held = self._announced.pop(key)
            if held.opening:
                self._close_aside(held)
            else:
                held.close()

    def expect(self, generation: int, client: bytes, sequence: int, manifest: Manifest) -> None:
        """A registration has its name: open its memory as soon as all descriptors are there."""
        held = self._announced.pop((client, sequence), None)
        if held is None:  # retracted in this very turn; `close` follows
            self._held[generation] = Held(manifest, client, sequence, [], opening=True)
            return
        self._held[generation] = held
        self._open_if_complete(generation, held)

    def move(self, generation: int, client: bytes, sequence: int) -> None:
        """A rebinding is granted as soon as all of its descriptors are there and its memory is open."""
        held = self._announced.get((client, sequence))
        if held is not None:
            held.moves = generation
            self._open_if_complete(generation, held)

    def replace(self, generation: int, client: bytes, sequence: int) -> None:
        """A rebinding is done: what was open before is not needed here any more."""
        before = self._held.get(generation)
        self._held[generation] = self._announced.pop((client, sequence))
        if before is not None:
            self._close_aside(before)

    def owner_is_back(self, client: bytes) -> None:
        """What waited for this owner may be opened."""
        for generation, held in list(self._held.items()):
            if held.client == client and held.gated:
                held.gated = False
                self._open_if_complete(generation, held)

    def await_owner(self, client: bytes, published: Iterable[tuple[int, int, Manifest]]) -> None:
        """A predecessor held these (generation, sequence, manifest) of one owner. They are of no use before that is
        back: only then can its work be waited for."""
        for generation, sequence, manifest in published:
            self._held[generation] = Held(manifest, client, sequence, [-1] * len(manifest.pieces), gated=True)

    def recover(self, client: bytes, peer: Peer, published: Iterable[tuple[int, int, Manifest]]) -> None:
        """The same, where the kernel may let us take the descriptors from the owner in one look; else it sends them."""
        wanting: list[tuple[int, Held]] = []
        for generation, sequence, manifest in published:
            self._held[generation] = held = Held(manifest, client, sequence, [-1] * len(manifest.pieces))
            if held.fds:
                wanting.append((generation, held))
            else:
                self._open_if_complete(generation, held)
        if wanting:
            self._fetch(peer, wanting)

    def try_again(self, generation: int, peer: Peer) -> bool:
        """Open once more what could not be recovered; whether its owner is to be asked for descriptors first."""
        held = self._held[generation]
        if -1 in held.fds:
            self._fetch(peer, [(generation, held)])
            return True
        held.opening = False
        self._open_if_complete(generation, held)
        return False

    def _fetch(self, peer: Peer, wanting: list[tuple[int, Held]]) -> None:
        manifests = [held.manifest for _, held in wanting]
        self._backstage.chore(lambda: fetch_descriptors(peer, manifests), partial(self._all_fetched, wanting))

    def _all_fetched(self, wanting: list[tuple[int, Held]], found: object) -> None:
        if isinstance(found, list):  # else their owner has died, or will send them
            for (generation, held), fds in zip(wanting, found, strict=True):
                self._fetched(generation, held, fds)

    def _fetched(self, generation: int, held: Held, found: list[int]) -> None:
        if self._held.get(generation) is not held:  # which was closed: its numbers may be other files' by now
            wire.close_all(fd for fd in found if fd >= 0)
            return
        for place, fd in enumerate(found):
            if fd >= 0:
                held.take(place, [fd])
        self._completed(generation, held)

    def _completed(self, generation: int, held: Held) -> None:
        """Descriptors of a publication have come: of what it has, and for what is to take its place."""
        self._open_if_complete(generation, held)
        for moving in [each for each in self._announced.values() if each.follows == generation and each.missing]:
            try:
                moving.copy_from(held)
            except OSError:
                self._moved(generation, _too_many(moving.missing, 0))
                continue
            if moving.moves:
                self._open_if_complete(generation, moving)

    def wanting(self, client: bytes) -> list[int]:
        """Sequences of a client's commands whose descriptors have not all arrived."""
        every = (*self._announced.values(), *self._held.values())
        return [held.sequence for held in every if held.client == client and held.missing]

    def arrived(self, client: bytes, sequence: int, first: int, fds: list[int]) -> None:
        """Descriptors of a registration; those of one that has failed meanwhile are closed.

        Raises:
            InvalidRecord: they have no place in it, or stand there already.
        """
        generation, held = self._awaiting(client, sequence)
        if held is None:
            wire.close_all(fds)
            return
        if not held.take(first, fds):
            wire.close_all(fds)
            raise InvalidRecord("descriptors came that have no place in their registration.", resource="Descriptors")
        if self._held.get(generation) is held:
            self._completed(generation, held)
        elif generation:
            self._open_if_complete(generation, held)

    def lost(self, client: bytes, reason: EthaError) -> None:
        """Descriptors of a client were lost on the way: what waits for them fails."""
        error = SystemLimit(
            f"the agent could not take the descriptors: {reason.message}",
            resource="RLIMIT_NOFILE",
            remedy="Raise the agent's limit (ulimit -n), or share fewer, larger storages; run: etha doctor",
        )
        for generation, held in list(self._held.items()):
            if held.client == client and not held.opening:
                self._opened(generation, error)
        for held in list(self._announced.values()):
            if held.client == client and held.moves and not held.opening:
                self._moved(held.moves, error)

    def fds(self, generation: int) -> list[int]:
        """The descriptors of an opened publication, by piece; they stay the agent's."""
        return self._held[generation].fds

    def close(self, generation: int) -> None:
        """Close the mappings and descriptors; then report it."""
        held = self._held.pop(generation)
        self._close_aside(held, lambda: self._closed(generation))

    def _awaiting(self, client: bytes, sequence: int) -> tuple[int, Held | None]:
        for generation, held in self._held.items():
            if (held.client, held.sequence) == (client, sequence):
                return generation, held
        waiting = self._announced.get((client, sequence))
        return (0 if waiting is None else waiting.moves), waiting

    def _open_if_complete(self, generation: int, held: Held) -> None:
        if held.opening or held.gated or any(fd < 0 for fd in held.fds):
            return
        held.opening = True
        job = partial(held.open, self._backend)
        self._backstage.open_or_close(job, lambda error: self._tell(generation, held, error))

    def _tell(self, generation: int, held: Held, error: EthaError | None) -> None:
        """It is open, or cannot be; of what was retracted, replaced or closed meanwhile nobody wants to hear: what is
        going on by now has been opened by nobody."""
        if held.moves and self._announced.get((held.client, held.sequence)) is held:
            self._moved(generation, error)
        elif not held.moves and self._held.get(generation) is held:
            self._opened(generation, error)

    def _close_aside(self, held: Held, then: Callable[[], None] = lambda: None) -> None:
        """Off the loop; a device that refuses keeps what it refuses to give back, and is asked again the next time."""
        job = partial(held.close, self._backend)
        self._backstage.open_or_close(job, lambda _: then())


def _free_descriptors() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(0, soft - in_use(soft) - _SPARE_DESCRIPTORS)


def _too_many(wanted: int, free: int) -> SystemLimit:
    return SystemLimit(
        f"the agent would need {wanted} more descriptors and may open {max(free, 0)}.",
        resource="RLIMIT_NOFILE",
        remedy="Raise the agent's limit (ulimit -n), or share fewer, larger storages; run: etha doctor",
    )


def raise_descriptor_limit() -> None:
    """Raise this process's soft limit on descriptors to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
