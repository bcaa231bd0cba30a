"""What the registry keeps: workers, publications, and their claims on one another. Data and one table, no I/O.

A *claim* is anything that a worker waits for or holds: a lease on a version, an update, an import (the right to have
the memory mapped), a registration, a closing. A claim waits, then is granted or fails; granted leases, updates and
imports last until they are released, revoked, or their process dies.

`TRANSITIONS` is the whole life of a publication. What is not in it cannot happen: `Publication.move` raises.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

from etha.errors import EthaError
from etha.tensor_bus.ipc.manifest import Manifest

Actor = tuple[int, int]
"""A thread: (pid by the kernel's word, thread id as it says). Waiting is done by threads, so cycles are sought among
them."""

ClaimId = tuple[bytes, int]
"""(client id, number). Commands and requests of one client count apart, hence `command_number`."""

_COMMAND_BIT: Final = 1 << 63


def command_number(sequence: int) -> int:
    """The claim number of a command."""
    return sequence | _COMMAND_BIT


def command_sequence(number: int) -> int | None:
    """The sequence of the command that a claim number stands for, or None for a request."""
    return number ^ _COMMAND_BIT if number & _COMMAND_BIT else None


class Phase(enum.StrEnum):
    """Where a publication stands."""

    OPENING = "opening"
    READY = "ready"
    WRITING = "writing"
    TORN = "torn"
    CLOSING = "closing"
    CLOSED = "closed"
    DEAD = "owner died"


class Event(enum.Enum):
    """What moves a publication."""

    OPENED = enum.auto()
    UPDATE = enum.auto()
    PUBLISH = enum.auto()
    ABANDON = enum.auto()
    WITHDRAW = enum.auto()
    CLOSE = enum.auto()
    REOPEN = enum.auto()
    END = enum.auto()
    OWNER_DIED = enum.auto()


RESTING: Final = (Phase.READY, Phase.TORN)
"""Phases in which no one writes and no one closes; `Publication.rest` is the last one of them."""

LIVE: Final = (Phase.OPENING, Phase.READY, Phase.WRITING, Phase.TORN, Phase.CLOSING)

TRANSITIONS: Final[dict[tuple[Phase, Event], Phase | None]] = {
    # None: back to where it rested before.
    (Phase.OPENING, Event.OPENED): Phase.READY,
    (Phase.READY, Event.PUBLISH): Phase.READY,
    (Phase.READY, Event.UPDATE): Phase.WRITING,
    (Phase.READY, Event.CLOSE): Phase.CLOSING,
    (Phase.TORN, Event.PUBLISH): Phase.READY,
    (Phase.TORN, Event.UPDATE): Phase.WRITING,
    (Phase.TORN, Event.CLOSE): Phase.CLOSING,
    (Phase.WRITING, Event.PUBLISH): Phase.READY,
    (Phase.WRITING, Event.ABANDON): Phase.TORN,
    (Phase.WRITING, Event.WITHDRAW): None,
    (Phase.CLOSING, Event.REOPEN): None,
    **{(phase, Event.END): Phase.CLOSED for phase in LIVE},
    **{(phase, Event.OWNER_DIED): Phase.DEAD for phase in LIVE},
}


class ImpossibleTransition(Exception):
    """The registry tried what the table does not know: a mistake in etha, never in a caller."""


@dataclass(slots=True, eq=False)
class Client:
    """A worker's client: a connection, and the process behind it; ``started`` is when, in clock ticks since boot.

    ``slot`` is its own in the agent's fences; ``fenced``: points of its work that were told before are to be found
    there. Those of a predecessor's client are not, until it has come back.
    """

    id: bytes
    pid: int
    label: str
    since: float
    started: int = 0
    connected: bool = True
    slot: int = 0
    fenced: bool = True
    claims: set[ClaimId] = field(default_factory=set)
    publications: set[int] = field(default_factory=set)

    @property
    def busy(self) -> bool:
        """True while it has a claim or a publication."""
        return bool(self.claims or self.publications)


@dataclass(slots=True, eq=False, kw_only=True)
class Claim:
    """What all claims have.

    Attributes:
        client, number: its identity, together the ``id``.
        actor, label: the thread that asked, and its process for people.
        name: the publication's name.
        generation: the publication; 0 while it waits for one to exist.
        deadline: ``CLOCK_BOOTTIME`` seconds; a wait fails after it.
        since: when it was asked for; from the grant on, when it was granted.
        order: position among all arrivals.
        judged: whether it has been compared with all other waits, and may have an effect on others.
    """

    client: bytes
    number: int
    actor: Actor
    label: str
    name: str
    generation: int
    deadline: float
    since: float
    order: int = 0
    granted: bool = False
    judged: bool = False
    id: ClaimId = field(init=False)

    def __post_init__(self) -> None:
        self.id = (self.client, self.number)


@dataclass(slots=True, eq=False, kw_only=True)
class Lease(Claim):
    """A read of one version: ``exact``, or the newest that is at least ``minimum``; by the import ``through``.

    ``patient``: its reader knows that the memory is wanted back, and waits for its own views to be dropped.
    From the grant on: ``version``, and the publication's ``writes`` and ``guarded`` at that moment.
    """

    through: int = 0
    patient: bool = False
    exact: int | None = None
    minimum: int = 0
    version: int | None = None
    writes: int = 0
    guarded: bool = True

    def satisfied_by(self, version: int) -> bool:
        return version == self.exact if self.exact is not None else version >= self.minimum


@dataclass(slots=True, eq=False, kw_only=True)
class Update(Claim):
    """An owner's exclusive write; ``revoke`` ends the leases that are still out at the deadline."""

    revoke: bool = False


@dataclass(slots=True, eq=False, kw_only=True)
class Import(Claim):
    """A subscription, and the right to have one layout of the publication's memory mapped; ``layout`` 0: none.

    While it waits, ``follows`` is the only generation that will do; 0: any.
    """

    layout: int = 0
    follows: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class Registration(Claim):
    """A name asked for, with what shall stand under it."""

    manifest: Manifest
    version: int
    replace: bool = False
    fence: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class Rebinding(Claim):
    """Within the owner's update of number ``update``: its tensors lie elsewhere now."""

    update: int
    manifest: Manifest


@dataclass(slots=True, eq=False, kw_only=True)
class Suspending(Claim):
    """Within the owner's update of number ``update``: its wish to have the memory back for a while."""

    update: int


@dataclass(slots=True, eq=False, kw_only=True)
class Closing(Claim):
    """An owner's wish to have its memory back for good."""


_EXCLUSIVE: Final = (Update, Closing)


@dataclass(slots=True, eq=False)
class Publication:
    """One generation of one name.

    Attributes:
        generation: its number, larger than that of every publication before.
        number: claim number of the registration that made it.
        version: the newest whole version.
        rest: the phase it returns to when what is going on is withdrawn.
        writes: how many updates have begun.
        guarded: False when ``version`` was published without excluding readers.
        fence: the point of the owner's work behind which ``version`` is whole.
        after: clients that have read it since the last update, with the points of their work behind which they read no
            more: the next update's work comes after those.
        memory_open: the agent has, or is opening, mappings of its own.
        memory_closing: it has been told to close them.
        layout, sequence: of the manifest: its number, and the command that brought it.
        recovering: its owner lives, and this agent, which is new, has not opened its memory yet.
        fault: why it could not, at the last attempt; None if there was none, or it is open.
        retrying: another attempt is under way.
        suspended: no one has its memory mapped, and it is its owner's for now.
        registration: not answered yet: its memory is being opened.
        moving: not answered yet: a rebinding or a suspending, in the update that writes.
        update: the granted one.
        queue: leases, updates and closings that wait, in order of arrival.
        leases, imports: the granted ones.
        closings: closings begun, answered when the agent's own mapping is closed too.
        wanted_recorded: what `wanted` was when it was last recorded.
    """

    generation: int
    name: str
    owner: bytes
    number: int
    manifest: Manifest
    version: int
    since: float
    phase: Phase = Phase.OPENING
    rest: Phase = Phase.READY
    writes: int = 0
    guarded: bool = True
    fence: int = 0
    after: dict[bytes, int] = field(default_factory=dict)
    memory_open: bool = True
    memory_closing: bool = False
    layout: int = 1
    sequence: int = 0
    recovering: bool = False
    fault: EthaError | None = None
    retrying: bool = False
    suspended: bool = False
    registration: Registration | None = None
    moving: Rebinding | Suspending | None = None
    update: Update | None = None
    queue: list[Claim] = field(default_factory=list)
    leases: dict[ClaimId, Lease] = field(default_factory=dict)
    imports: dict[ClaimId, Import] = field(default_factory=dict)
    closings: list[Closing] = field(default_factory=list)
    wanted_recorded: bool = False

    @property
    def live(self) -> bool:
        return self.phase in LIVE

    @property
    def open(self) -> bool:
        """True while it may be subscribed to. While its memory is being closed there is nothing to hand out."""
        without = self.recovering or self.suspended or self.memory_closing
        return self.phase in (*RESTING, Phase.WRITING) and not without

    @property
    def brought_by(self) -> ClaimId:
        """The claim of the command that brought its manifest."""
        return (self.owner, command_number(self.sequence))

    @property
    def mapped(self) -> list[Import]:
        """The imports whose holders have its memory mapped, of whichever layout."""
        return [claim for claim in self.imports.values() if claim.layout]

    @property
    def oldest_layout(self) -> int:
        """The oldest layout that a reader may have mapped."""
        return min((claim.layout for claim in self.mapped), default=self.layout)

    @property
    def given_back(self) -> bool:
        """True once it has ended and nobody has any memory of it, the agent included."""
        return not (self.live or self.memory_open or self.mapped or self.leases)

    @property
    def over(self) -> bool:
        """True once nobody knows of it any more either."""
        return self.given_back and not self.imports

    @property
    def wanted(self) -> bool:
        """True while an update, a closing or a suspending waits."""
        if self.phase is Phase.CLOSING or isinstance(self.moving, Suspending):
            return True
        return bool(self.queue) and any(isinstance(claim, _EXCLUSIVE) for claim in self.queue)

    def wanted_changed(self) -> bool:
        """Whether `wanted` is not what it was at the last call."""
        before, self.wanted_recorded = self.wanted_recorded, self.wanted
        return before != self.wanted_recorded

    def waiting_reads(self) -> list[Lease]:
        """The reads that wait, in order."""
        return [claim for claim in self.queue if isinstance(claim, Lease)]

    def lent_to(self, actor: Actor) -> bool:
        """Whether this thread holds a lease on the newest version."""
        return any(lease.actor == actor and lease.version == self.version for lease in self.leases.values())

    def waiting_updates(self) -> list[Update]:
        """The updates that wait, in order."""
        return [claim for claim in self.queue if isinstance(claim, Update)]

    def recovered(self) -> None:
        """Its memory is open, or needs to be no more."""
        self.recovering = self.retrying = False
        self.fault = None

    def lend(self, claim: Lease) -> None:
        """Turn a waiting read into a lease on the newest version."""
        self.queue.remove(claim)
        claim.version = self.version
        claim.writes = self.writes
        claim.guarded = self.guarded
        self.leases[claim.id] = claim

    def hand_over(self, claim: Update) -> None:
        """Turn a waiting update into the one that writes."""
        self.queue.remove(claim)
        self.update = claim
        self.writes += 1
        self.move(Event.UPDATE)

    def detach(self, claim: Claim) -> None:
        """Take a claim out of every list that it may stand in."""
        if claim in self.queue:
            self.queue.remove(claim)
        if isinstance(claim, Closing) and claim in self.closings:
            self.closings.remove(claim)
        if claim is self.moving:
            self.moving = None
        self.leases.pop(claim.id, None)
        self.imports.pop(claim.id, None)

    def move(self, event: Event) -> None:
        """Follow the table.

        Raises:
            ImpossibleTransition: the table does not know this event in this phase.
        """
        try:
            target = TRANSITIONS[self.phase, event]
        except KeyError:
            raise ImpossibleTransition(f"{event} while {self.phase} ({self.name!r})") from None
        self.phase = self.rest if target is None else target
        if self.phase in RESTING:
            self.rest = self.phase
