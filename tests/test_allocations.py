"""`etha.tensor_bus.ipc.allocations`: what may be said of device memory, and what leads outside of it."""

from __future__ import annotations

import msgspec
import pytest

from etha.errors import InvalidRecord
from etha.tensor_bus.ipc.allocations import (
    MAX_CHUNKS,
    Chunk,
    HostAllocation,
    LegacyAllocation,
    VirtualAllocation,
    pieces,
)
from etha.tensor_bus.ipc.manifest import Manifest, Storage, TensorSpec, validate

UUID, OWNER = b"u" * 16, b"o" * 16
LEGACY = LegacyAllocation(UUID, OWNER, 7, b"h" * 64, 1000)
VIRTUAL = VirtualAllocation(UUID, OWNER, (Chunk(1, 512), Chunk(2, 1024)))
GOOD = Manifest(
    (LEGACY, VIRTUAL),
    (Storage(0, 100, 900), Storage(1, 256, 1024), Storage(-1, 0, 0)),
    (TensorSpec(0, "uint8", (900,), (1,), 0), TensorSpec(1, "float32", (256,), (1,), 0)),
    {"a": 0, "b": 1},
)


def changed(record, **fields):
    return msgspec.structs.replace(record, **fields)


def with_first(allocation):
    return changed(GOOD, allocations=(allocation, VIRTUAL))


def with_second(allocation):
    return changed(GOOD, allocations=(LEGACY, allocation))


def test_what_is_right_passes_and_survives_the_wire():
    validate(GOOD)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(GOOD), type=Manifest) == GOOD
    assert VIRTUAL.size == 1536
    assert pieces(LEGACY) == ()
    assert GOOD.pieces == pieces(VIRTUAL) == ((OWNER, 1, 512), (OWNER, 2, 1024))


def test_a_piece_is_the_same_wherever_its_allocation_begins():
    longer = VirtualAllocation(UUID, OWNER, (Chunk(9, 512), *VIRTUAL.chunks))
    assert pieces(longer)[1:] == pieces(VIRTUAL)
    assert pieces(changed(VIRTUAL, owner=b"p" * 16)) != pieces(VIRTUAL)
    file = HostAllocation(1, 2, 4096)
    assert pieces(file) == (file,)


WRONG = {
    "no uuid": with_first(changed(LEGACY, device=b"")),
    "no owner": with_first(changed(LEGACY, owner=b"o")),
    "short handle": with_first(changed(LEGACY, handle=b"h" * 63)),
    "negative number": with_first(changed(LEGACY, buffer=-1)),
    "large number": with_first(changed(LEGACY, buffer=2**64)),
    "no bytes": with_first(changed(LEGACY, size=0)),
    "negative bytes": with_first(changed(LEGACY, size=-5)),
    "too many bytes": with_first(changed(LEGACY, size=2**63)),
    "storage behind the end": with_first(changed(LEGACY, size=999)),
    "no chunks": with_second(changed(VIRTUAL, chunks=())),
    "too many chunks": with_second(changed(VIRTUAL, chunks=(Chunk(1, 1),) * (MAX_CHUNKS + 1))),
    "empty chunk": with_second(changed(VIRTUAL, chunks=(Chunk(1, 2048), Chunk(2, 0)))),
    "negative chunk": with_second(changed(VIRTUAL, chunks=(Chunk(1, 2048), Chunk(2, -1)))),
    "negative block": with_second(changed(VIRTUAL, chunks=(Chunk(-1, 2048),))),
    "chunks beyond 63 bits": with_second(changed(VIRTUAL, chunks=(Chunk(1, 2**62), Chunk(2, 2**62)))),
    "storage behind the chunks": with_second(changed(VIRTUAL, chunks=(Chunk(1, 512), Chunk(2, 767)))),
    "legacy twice": changed(GOOD, allocations=(LEGACY, VIRTUAL, changed(LEGACY, handle=b"i" * 64))),
    "run twice": changed(GOOD, allocations=(LEGACY, VIRTUAL, VIRTUAL)),
    "unknown allocation": changed(GOOD, storages=(Storage(2, 0, 900), *GOOD.storages[1:])),
    "tensor behind its storage": changed(GOOD, tensors=(TensorSpec(0, "uint8", (901,), (1,), 0), GOOD.tensors[1])),
    "nameless": changed(GOOD, names={"a": 0}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_leads_outside_is_refused(kind):
    with pytest.raises(InvalidRecord) as caught:
        validate(WRONG[kind])
    assert caught.value.resource
