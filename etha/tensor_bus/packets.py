"""What crosses the connection: one record a packet, small enough for one `SOCK_SEQPACKET` send.

From a worker: who it is, rings for commands, requests for claims, and their ends. From the agent: replies, each
bearing the number of the request or the sequence of the command. Descriptors ride on `Descriptors` packets
(``SCM_RIGHTS``), at most `FDS_PER_PACKET` each.

Two things are sent by the agent unasked: the `Outcome` of a command that failed and nobody waited for, and `Wanted`.
What else a worker wants to learn in passing (is my lease wanted, did a write begin) it reads in the state LMDB, and
what it wants to be woken for it gets by a `Bell`, a pipe of its own.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from etha.tensor_bus.records import Codec, Failure

FDS_PER_PACKET: Final = 253
"""``SCM_MAX_FD`` of the kernel; unix(7)."""

MAX_PACKET_BYTES: Final = 1 << 16


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A worker's first packet.

    Attributes:
        schema: record schema that it speaks.
        boot: boot id.
        namespace: inode of its PID namespace.
        client: the client id that it has from an earlier connection, of this agent or of one before; else empty.
    """

    schema: int
    boot: str
    namespace: int
    client: bytes = b""


class RingForCommands(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The queue holds a new command of this client. A hint: losing it loses nothing."""


class Read(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Asks for a lease. Answered by `Leased` or `Refused`.

    Attributes:
        number: of the claim.
        generation, name: the publication.
        exact: this version and no other, or None.
        minimum: the oldest version that will do.
        thread: native id of the calling thread.
        deadline: ``CLOCK_BOOTTIME`` seconds.
        through: number of the import that it reads through.
        patient: it has heard `Unmap`, and waits for its views to be dropped: let it wait.
    """

    number: int
    generation: int
    name: str
    exact: int | None
    minimum: int
    thread: int
    deadline: float
    through: int
    patient: bool = False


class Write(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Asks for an update. Answered by `MayWrite` or `Refused`.

    Attributes:
        number: of the claim.
        generation, name: the publication.
        revoke: end the leases that are still out at the deadline.
        thread: native id of the calling thread.
        deadline: ``CLOCK_BOOTTIME`` seconds.
    """

    number: int
    generation: int
    name: str
    revoke: bool
    thread: int
    deadline: float


class Subscribe(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Asks for an import. Answered by `Descriptors` and then `Imported`, or `Refused`.

    Attributes:
        number: of the claim.
        name: the publication.
        thread: native id of the calling thread.
        deadline: ``CLOCK_BOOTTIME`` seconds.
        follows: the generation whose memory it is to be, which lies elsewhere now; 0 for whatever has the name.
    """

    number: int
    name: str
    thread: int
    deadline: float
    follows: int = 0


class Release(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """A claim is over: given back, or no longer wanted. Not answered; saying it twice is no error.

    Attributes:
        number: of the claim.
        fence: of a lease, the point of its reader's work behind which nothing of it is read any more; 0: no such is
            left.
    """

    number: int
    fence: int = 0


class Bell(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Carries the write end of a pipe that the agent shall ring for a subscription.

    Attributes:
        number: of the import.
        seen: the newest version that the subscriber knows; a newer one rings at once.
    """

    number: int
    seen: int


class Descriptors(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """Carries descriptors of the pieces of a manifest, in order; in both directions.

    Attributes:
        number: sequence of the `Register` or `Rebind` command, or number of the import.
        first: index of the first piece in this packet.
    """

    number: int
    first: int


Numbers = Annotated[tuple[int, ...], msgspec.Meta(max_length=1 << 13)]
"""As many as fit into a packet where each is as long as it may be; short ones are refused beyond that."""


class Reassert(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """What a client that comes back holds or waits for. What else it held is over: the word of it was lost.

    Attributes:
        claims: numbers of its requests.
        commands: sequences of its commands that it has not heard of.
        more: another packet of this kind follows.
    """

    claims: Numbers
    commands: Numbers
    more: bool


class Unmapped(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """An import's memory is closed, and no tensor of it is left; the import itself goes on.

    Attributes:
        number: of the import.
    """

    number: int


class Fenced(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """A client that has come back goes on with its numbers in this agent's fences. Carries the files of predecessors in
    which its streams may wait still."""


class Goodbye(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """The client holds nothing any more, and leaves."""


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=32):
    """The agent's answer to `Hello`.

    Attributes:
        client: the client id, 16 bytes, that the agent gives, or has given.
        epoch: the agent's.
        served: the client's last served command.
        slot: the client's in the agent's fences, whose file comes along; a successor sends the same. 0 without a
            file: this agent has none.
    """

    client: bytes
    epoch: int
    served: int = 0
    slot: int = 0


class Leased(msgspec.Struct, frozen=True, array_like=True, tag=33):
    """A lease is granted.

    Attributes:
        number: of the claim.
        version: what it is a lease on.
        writes: updates begun until now: a larger number later means that the lease is torn.
        guarded: False when the version was published without excluding readers.
        layout: which manifest it is read by; a reader that has another one mapped subscribes again.
        slot, fence: the point of the owner's work behind which the version is whole; ``fence`` 0: it is.
    """

    number: int
    version: int
    writes: int
    guarded: bool
    layout: int
    slot: int = 0
    fence: int = 0


class MayWrite(msgspec.Struct, frozen=True, array_like=True, tag=34):
    """An update is granted.

    Attributes:
        number: of the claim.
        served: the client's last served command.
        oldest: the oldest layout that a reader may still have mapped; what came before it may be let go.
        after: slots and fences of the readers: the points of their work behind which they read no more.
    """

    number: int
    served: int
    oldest: int
    after: tuple[tuple[int, int], ...] = ()


class Imported(msgspec.Struct, frozen=True, array_like=True, tag=35):
    """An import is granted; its descriptors have been sent before.

    Attributes:
        number: of the claim.
        generation: the publication.
        version: its newest version.
        layout: of the manifest that the descriptors are of.
    """

    number: int
    generation: int
    version: int
    layout: int


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=36):
    """A request failed; number 0: the connection did, and ends.

    Attributes:
        number: of the claim.
        failure: why.
    """

    number: int
    failure: Failure


class Unmap(msgspec.Struct, frozen=True, array_like=True, tag=38):
    """A `Read` will be looked at again: its owner wants the memory back. Unmap it, say `Unmapped`, and ask again.

    Attributes:
        number: of the request, which is over.
    """

    number: int


class Wanted(msgspec.Struct, frozen=True, array_like=True, tag=39):
    """The agent has no descriptors for a manifest of this client: send them again.

    Attributes:
        sequence: of the command that brought it.
    """

    sequence: int


class Outcome(msgspec.Struct, frozen=True, array_like=True, tag=37):
    """What became of a command; or, unasked, what is wrong with a publication.

    Attributes:
        sequence: of the command; 0 where there was none: the failure is the publication's next call's.
        generation: the publication concerned; 0 if there is none.
        failure: why it failed, or None.
        served: the client's last served command.
    """

    sequence: int
    generation: int
    failure: Failure | None
    served: int


FromWorker = (
    Hello
    | Reassert
    | RingForCommands
    | Read
    | Write
    | Subscribe
    | Release
    | Unmapped
    | Bell
    | Descriptors
    | Fenced
    | Goodbye
)
FromAgent = Welcome | Leased | MayWrite | Imported | Refused | Unmap | Wanted | Outcome | Descriptors

FROM_WORKER: Final[Codec[FromWorker]] = Codec(FromWorker, MAX_PACKET_BYTES)
FROM_AGENT: Final[Codec[FromAgent]] = Codec(FromAgent, MAX_PACKET_BYTES)
