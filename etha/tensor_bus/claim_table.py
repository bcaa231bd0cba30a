"""All claims of an agent: by identity, by who waits, by deadline. What happens to them is decided in `registry`.

The table also collects what the agent has to do about a change: `dirty` says what must be recorded, `effects`, in
order, whom to tell afterwards. A claim that is granted as it comes (nearly every read) touches neither the deadlines
nor the index of waiting threads.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Final, NamedTuple

from etha.errors import EthaError
from etha.tensor_bus.claims import Actor, Claim, ClaimId, Client, Import, Lease


class Granted(NamedTuple):
    """Tell the claimant that it has what it asked for; a closing is granted when it is done."""

    claim: Claim


class Failed(NamedTuple):
    """Tell the claimant that it does not, and why."""

    claim: Claim
    error: EthaError


class OpenMemory(NamedTuple):
    """Open a publication's allocations, then call `Registry.opened` or `Registry.open_failed`. Of one that could not be
    recovered: try again, then call `Registry.recovered` or `Registry.unrecovered`."""

    generation: int


class CloseMemory(NamedTuple):
    """Close the agent's own mappings of a publication, then call `Registry.memory_closed`."""

    generation: int


class MoveMemory(NamedTuple):
    """Open what a rebinding names instead of what is open, then call `Registry.rebound` or `Registry.rebind_failed`."""

    generation: int


class AskUnmap(NamedTuple):
    """Tell the reader to unmap the publication's memory and ask again; its claim is over."""

    claim: Lease


class Ring(NamedTuple):
    """Something that this subscriber may want to look at has happened."""

    claim: Import


Effect = Granted | Failed | OpenMemory | MoveMemory | CloseMemory | AskUnmap | Ring


class Dirty(NamedTuple):
    """What has changed and must be recorded before any effect is carried out."""

    clients: set[bytes]
    publications: set[int]
    claims: set[ClaimId]

    def __bool__(self) -> bool:
        return bool(self.clients or self.publications or self.claims)


def _nothing() -> Dirty:
    return Dirty(set(), set(), set())


class ClaimTable:
    """The claims, their owners, and what is to be done about them."""

    def __init__(self) -> None:
        self.clients: Final[dict[bytes, Client]] = {}
        self.claims: Final[dict[ClaimId, Claim]] = {}
        self.waiting: Final[dict[Actor, list[Claim]]] = {}
        self.dirty = _nothing()
        self.effects: list[Effect] = []
        self._orders = itertools.count(1)
        self._deadlines: list[tuple[float, int, ClaimId]] = []
        self._beginners: list[Claim] = []
        self._waits = 0

    def __contains__(self, claim: Claim) -> bool:
        return self.claims.get(claim.id) is claim

    def take_effects(self) -> list[Effect]:
        """The effects since the last call, in order."""
        effects, self.effects = self.effects, []
        return effects

    def take_dirty(self) -> Dirty:
        """What has changed since the last call."""
        dirty, self.dirty = self.dirty, _nothing()
        return dirty

    def add(self, claim: Claim) -> None:
        """A claim has arrived."""
        key = claim.id
        claim.order = next(self._orders)
        self.claims[key] = claim
        self.clients[claim.client].claims.add(key)
        self.dirty.claims.add(key)

    def of_client(self, client: bytes) -> list[Claim]:
        """Everything that a client waits for or holds."""
        return [self.claims[claim_id] for claim_id in list(self.clients[client].claims)]

    def label(self, client: bytes) -> str:
        """A client's process, for people."""
        known = self.clients.get(client)
        return known.label if known is not None else "a process that has gone"

    def begin(self, claim: Claim) -> None:
        """The claim has been looked at once; if it was not granted or refused, `Registry.judge` is to see it."""
        if not claim.granted and claim in self:
            self._beginners.append(claim)

    def waits(self, claim: Claim) -> bool:
        """Whether the claim is neither granted nor over."""
        return not claim.granted and claim in self

    @property
    def beginning(self) -> bool:
        """Whether `take_beginners` has something to give."""
        return bool(self._beginners)

    def take_beginners(self) -> list[Claim]:
        """What began to wait since the last call, in order."""
        beginners, self._beginners = self._beginners, []
        return beginners

    def wait(self, claim: Claim) -> None:
        """The claim begins to wait, until it is granted, fails or is forgotten."""
        self.waiting.setdefault(claim.actor, []).append(claim)
        self._waits += 1
        if len(self._deadlines) > 2 * self._waits + 64:
            self._compact()
        heapq.heappush(self._deadlines, (claim.deadline, claim.order, claim.id))

    def grant(self, claim: Claim, now: float) -> None:
        """The claim is granted; its claimant will be told."""
        self._stop_waiting(claim)
        claim.granted = True
        claim.since = now
        self.dirty.claims.add(claim.id)
        self.effects.append(Granted(claim))

    def finish(self, claim: Claim, now: float) -> None:
        """The claim is granted, and with that over."""
        self.grant(claim, now)
        self.forget(claim)

    def fail(self, claim: Claim, error: EthaError) -> None:
        """The claim fails and is forgotten; its claimant will be told."""
        self.forget(claim)
        self.effects.append(Failed(claim, error))

    def forget(self, claim: Claim) -> None:
        """The claim is over."""
        self._stop_waiting(claim)
        if self.claims.pop(claim.id, None) is None:
            return
        self.dirty.claims.add(claim.id)
        client = self.clients.get(claim.client)
        if client is not None:
            client.claims.discard(claim.id)

    def next_deadline(self) -> float | None:
        """When `due` has something to give next, or None."""
        while self._deadlines:
            deadline, _, claim_id = self._deadlines[0]
            if self._waits_still(claim_id):
                return deadline
            heapq.heappop(self._deadlines)
        return None

    def due(self, now: float) -> Claim | None:
        """A waiting claim whose deadline has passed, each once; None when there is none left."""
        deadline = self.next_deadline()
        if deadline is None or deadline > now:
            return None
        return self.claims[heapq.heappop(self._deadlines)[2]]

    def _waits_still(self, claim_id: ClaimId) -> bool:
        claim = self.claims.get(claim_id)
        return claim is not None and not claim.granted

    def _stop_waiting(self, claim: Claim) -> None:
        waits = self.waiting.get(claim.actor)
        if waits is None or claim not in waits:
            return
        waits.remove(claim)
        self._waits -= 1
        if not waits:
            del self.waiting[claim.actor]

    def _compact(self) -> None:
        self._deadlines = [entry for entry in self._deadlines if self._waits_still(entry[2])]
        heapq.heapify(self._deadlines)
