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


class Register(msgspec.Struct, frozen=True, array_like=True, tag="register"):
    """Share memory under a name. Answered; the descriptors follow on the connection.

    Attributes:
        name: the publication's name.
        manifest: what is shared.
        version: the version that the tensors hold now, >= 0.
        replace: take the name over from a publication of the same process.
        thread: native id of the calling thread, for the search for cycles of waiting.
        deadline: ``CLOCK_BOOTTIME`` seconds.
    """

    name: str
    manifest: Manifest
    version: int
    replace: bool
    thread: int
    deadline: float


class Publish(msgspec.Struct, frozen=True, array_like=True, tag="publish"):
    """The tensors are the next version. Not answered unless it fails.

    Attributes:
        generation: the publication.
        version: the new version, larger than every one before.
        update: number of the update that this ends; 0 for a plain publish.
    """

    generation: int
    version: int
    update: int


class Abandon(msgspec.Struct, frozen=True, array_like=True, tag="abandon"):
    """An update ended without a whole version: the publication is torn until the next one.

    Attributes:
        generation: the publication.
        update: number of the update that this ends.
    """

    generation: int
    update: int


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


Command = Register | Publish | Abandon | Close | Cancel

CODEC: Final[Codec[Command]] = Codec(Command)
