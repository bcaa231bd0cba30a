"""How a record becomes bytes: a CRC-32 of the rest (4 bytes, little-endian), then msgpack.

One codec for the queue, the state and the connection. `Codec.decode` either returns a struct of the declared
types or raises `InvalidRecord`: nothing of a record is used before its checksum, its size and its types have passed.
The checksum finds damage, not malice; what a record *says* is checked by whoever acts on it.
"""

from __future__ import annotations

import zlib
from typing import Any, Final, Generic, TypeVar

import msgspec

from etha.errors import LEAVES, EthaError, InvalidRecord

SCHEMA: Final = 4
"""Number of the record schema. Agent and worker must agree; it grows with every incompatible change."""

MAX_RECORD_BYTES: Final = 64 << 20
"""The longest record: a manifest of a million tensors is about this long."""

_CHECKSUM_BYTES: Final = 4

_LONGEST_REASON: Final = 200
"""Characters of what msgspec says of a record: it repeats a tag that it does not know, however long that is."""

T = TypeVar("T")

_encoder: Final = msgspec.msgpack.Encoder()


def encode(record: msgspec.Struct) -> bytes:
    """The bytes of a record, checksum first."""
    body = _encoder.encode(record)
    return zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little") + body


class Codec(Generic[T]):
    """Decodes records of one struct, or of one tagged union of structs. Safe across threads."""

    def __init__(self, kind: Any, limit: int = MAX_RECORD_BYTES) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._limit = limit

    def decode(self, data: bytes | memoryview) -> T:
        """The record that ``data`` holds.

        Raises:
            InvalidRecord: too long, damaged, or not of the declared types.
        """
        if not _CHECKSUM_BYTES < len(data) <= self._limit:
            raise InvalidRecord(f"a record of {len(data)} bytes is out of bounds.", resource="record")
        body = memoryview(data)[_CHECKSUM_BYTES:]
        if zlib.crc32(body) != int.from_bytes(data[:_CHECKSUM_BYTES], "little"):
            raise InvalidRecord("a record's checksum does not match its bytes.", resource="record")
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = str(error)[:_LONGEST_REASON]
            raise InvalidRecord(f"a record does not have its declared form: {reason}.", resource="record") from error


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """An error on its way to the process whose call it fails.

    Attributes:
        leaf: the error's class, a key of `etha.errors.LEAVES`.
        message, resource, holder, remedy: its fields.
    """

    leaf: str
    message: str
    resource: str | None = None
    holder: str | None = None
    remedy: str | None = None

    @classmethod
    def of(cls, error: EthaError) -> Failure:
        """The record of an error."""
        return cls(type(error).__name__, error.message, error.resource, error.holder, error.remedy)

    def error(self) -> EthaError:
        """The error, to be raised."""
        leaf = LEAVES.get(self.leaf, EthaError)
        return leaf(self.message, resource=self.resource, holder=self.holder, remedy=self.remedy)
