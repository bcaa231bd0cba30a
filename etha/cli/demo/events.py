"""What the children tell the parent: one typed JSON object a line."""

from __future__ import annotations

from typing import Final

import msgspec


class Placement(msgspec.Struct, frozen=True):
    """Where one registered tensor lies in the process that says so."""

    name: str
    address: int
    """Of its first byte, in the address space of the process that reports it."""
    nbytes: int


class Registered(msgspec.Struct, frozen=True, tag="registered"):
    """The trainer has touched and registered its tensors, as version 0, and waits for a word."""

    pid: int
    tensors: tuple[Placement, ...]


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The evaluator has loaded everything of its own, has mapped nothing, and waits for a word."""

    pid: int


class Mapped(msgspec.Struct, frozen=True, tag="mapped"):
    """The evaluator holds its first lease, or one whose tensors lie elsewhere than before, and waits."""

    pid: int
    tensors: tuple[Placement, ...]


class Read(msgspec.Struct, frozen=True, tag="read"):
    """The evaluator has read every tensor in place, and measured the accuracy.

    In a sabotaged run: now and then, of a version whose stamp matched; there are many more reads.
    """

    version: int
    """As granted; in a sabotaged run, which has no lease, as found in the stamp."""
    accuracy: float
    """On the test set, in 0 to 1."""
    torn: int
    """Reads so far whose stamp did not match the bytes."""
    reads: int
    """Reads so far, torn ones included."""


class Trained(msgspec.Struct, frozen=True, tag="trained"):
    """The trainer has published its last version, and waits for a word before it closes."""

    versions: int
    enter_us: tuple[float, ...]
    """Per step: entering ``update``, which waits until the evaluator's lease ends."""
    publish_us: tuple[float, ...]
    """Per step: leaving ``update``, which publishes."""


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The evaluator has seen the end."""

    versions: int
    """Distinct versions read."""
    read_us: tuple[float, ...]
    """Per lease: from when a version was both written and asked for, to the lease in hand."""


Event = Registered | Ready | Mapped | Read | Trained | Finished

_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final[msgspec.json.Decoder[Event]] = msgspec.json.Decoder(Event)


def encode(event: Event) -> bytes:
    """One line, its newline included."""
    return _ENCODER.encode(event) + b"\n"


def decode(line: bytes) -> Event:
    """The event of one line.

    Raises:
        msgspec.DecodeError: The line is no event.
    """
    return _DECODER.decode(line)
