"""What a worker may ask of its agent through the queue: durable, in order, safe to run twice.

A command is served once: the agent keeps, per client, the last sequence number that it served, and writes it in the
transaction that holds the command's effect. A command that has a deadline is dropped once it has passed; the outcome
says so.
"""

from __future__ import annotations

from typing import Final

import msgspec

from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.records import Codec

MAX_NAME_BYTES: Final = 255
"""Bytes of a publication's name in UTF-8. It stands in every claim, and in most errors."""


class Register(msgspec.Struct, frozen=True, array_like=True, tag="register"):
    """Share memory under a name. Answered; the descriptors follow on the connection.

    Attributes:
        name: the publication's name.
        manifest: what is shared.
        version: the version that the tensors hold now, >= 0.
        replace: take the name over from a publication of the same process.
        thread: native id of the calling thread, for the search for cycles of waiting.
        deadline: ``CLOCK_BOOTTIME`` seconds.
        fence: the point of the owner's work behind which that version is whole; 0: it is.
    """

    name: str
    manifest: Manifest
    version: int
    replace: bool
    thread: int
    deadline: float
    fence: int = 0


class Publish(msgspec.Struct, frozen=True, array_like=True, tag="publish"):
    """The tensors are the next version. Not answered unless it fails.

    Attributes:
        generation: the publication.
        version: the new version, larger than every one before.
        update: number of the update that this ends; 0 for a plain publish.
        fence: the point of the owner's work behind which the version is whole; 0: it is.
    """

    generation: int
    version: int
    update: int
    fence: int = 0


class Abandon(msgspec.Struct, frozen=True, array_like=True, tag="abandon"):
    """An update ended without a whole version: the publication is torn until the next one.

    Attributes:
        generation: the publication.
        update: number of the update that this ends.
    """

    generation: int
    update: int


class Rebind(msgspec.Struct, frozen=True, array_like=True, tag="rebind"):
    """The tensors lie elsewhere now. Answered; only inside an update, so no reader looks.

    Descriptors follow on the connection, those of allocations that the manifest before had too left out.

    Attributes:
        generation: the publication.
        update: number of the update that holds it.
        manifest: what is shared from now on.
        thread: native id of the calling thread.
        deadline: ``CLOCK_BOOTTIME`` seconds; after it the tensors are still where they were.
    """

    generation: int
    update: int
    manifest: Manifest
    thread: int
    deadline: float


class Suspend(msgspec.Struct, frozen=True, array_like=True, tag="suspend"):
    """Close every mapping, the readers' and the agent's; answered when none is left. Only inside an update.

    The publication stays as it is, and so do its subscriptions. A `Rebind` gives it memory again.

    Attributes:
        generation: the publication.
        update: number of the update that holds it.
        thread: native id of the calling thread.
        deadline: ``CLOCK_BOOTTIME`` seconds; after it the publication has its memory still.
    """

    generation: int
    update: int
    thread: int
    deadline: float


class Release(msgspec.Struct, frozen=True, array_like=True, tag="release"):
    """A claim is over: an update that is given back, or any while there is no agent to be told so. Not answered.

    Attributes:
        number: of the claim.
        fence: as in `etha.tensor_bus.packets.Release`.
    """

    number: int
    fence: int = 0


class Leave(msgspec.Struct, frozen=True, array_like=True, tag="leave"):
    """The client holds nothing any more, and leaves; there was no agent to be told so. Not answered."""


class Close(msgspec.Struct, frozen=True, array_like=True, tag="close"):
    """End a publication once no lease and no mapping of it is left. Answered.

    Attributes:
        generation: the publication.
        thread: native id of the calling thread.
        deadline: ``CLOCK_BOOTTIME`` seconds; after it the publication stays open.
    """

    generation: int
    thread: int
    deadline: float


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """Undo an earlier command of this client: what waits is dropped, what was served is reversed.

    Attributes:
        sequence: the command to undo. A served `Register` is closed at once; a waiting `Close` ends.
    """

    sequence: int


Command = Register | Publish | Abandon | Rebind | Suspend | Release | Leave | Close | Cancel

ANSWERED: Final = (Register, Rebind, Suspend, Close, Cancel)
"""Commands whose caller waits for the outcome. One that has none on record may be served again by a successor."""

CODEC: Final[Codec[Command]] = Codec(Command)
