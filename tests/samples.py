"""One record of every kind, and how to damage them."""

from __future__ import annotations

import random
import zlib

import msgspec

from etha.tensor_bus import commands, packets, state
from etha.tensor_bus.ipc.allocations import HostAllocation
from etha.tensor_bus.ipc.manifest import Manifest, Storage, TensorSpec
from etha.tensor_bus.records import SCHEMA, Codec, Failure, encode

CLIENT = bytes(range(16))
MANIFEST = Manifest(
    allocations=(HostAllocation(device=25, inode=4711, size=1 << 20),),
    storages=(Storage(0, 0, 4096), Storage(-1, 0, 0)),
    tensors=(
        TensorSpec(0, "float32", (8, 16), (16, 1), 0),
        TensorSpec(0, "bfloat16", (4,), (1,), 512),
        TensorSpec(1, "uint8", (0, 3), (3, 1), 0),
    ),
    names={"weight": 0, "tied": 0, "bias": 1, "nöthing": 2},
)
FAILURE = Failure("LeaseTimeout", "pid 3 (x) holds it.", "policy", "pid 3 (x)", "Stop it.")

COMMANDS = (
    commands.Register("policy", MANIFEST, 3, True, 77, 1234.5),
    commands.Publish(1, 2, 3),
    commands.Publish(1, 2, 3, 7),
    commands.Abandon(1, 3),
    commands.Rebind(1, 3, MANIFEST, 77, 1234.5),
    commands.Suspend(1, 3, 77, 1234.5),
    commands.Release(3),
    commands.Leave(),
    commands.Close(1, 77, 1234.5),
    commands.Cancel(9),
)
FROM_WORKER = (
    packets.Hello(SCHEMA, "93a1c0de-0000-4000-8000-000000000000", 4026531836),
    packets.Hello(SCHEMA, "93a1c0de-0000-4000-8000-000000000000", 4026531836, CLIENT),
    packets.Reassert((1, 2), (3,), False),
    packets.RingForCommands(),
    packets.Read(1, 2, "policy", None, 3, 77, 1234.5, 1),
    packets.Read(1, 2, "policy", 7, 0, 77, 1234.5, 1, True),
    packets.Write(1, 2, "policy", False, 77, 1234.5),
    packets.Subscribe(1, "policy", 77, 1234.5),
    packets.Subscribe(2, "policy", 77, 1234.5, 12),
    packets.Release(1),
    packets.Unmapped(1),
    packets.Bell(1, 2),
    packets.Descriptors(1, 253),
    packets.Fenced(),
    packets.Release(1, 7),
    packets.Goodbye(),
)
FROM_AGENT = (
    packets.Welcome(CLIENT, 99),
    packets.Welcome(CLIENT, 99, 7),
    packets.Welcome(CLIENT, 99, 7, 12),
    packets.Leased(1, 2, 3, True, 1),
    packets.Leased(1, 2, 3, True, 1, 12, 7),
    packets.MayWrite(1, 9, 1),
    packets.MayWrite(1, 9, 1, ((12, 7), (13, 1))),
    packets.Imported(1, 2, 3, 1),
    packets.Unmap(1),
    packets.Wanted(9),
    packets.Refused(1, FAILURE),
    packets.Outcome(1, 2, None, 9),
    packets.Outcome(1, 0, FAILURE, 9),
    packets.Descriptors(1, 0),
)
STATE = (
    state.AgentRecord(4, "boot", 5, 6, SCHEMA, 0, "cpu", "/tmp/q", 1.0, 2.0, {"commands": 3}),
    state.ClientRecord(4, "pid 4 (x)", 5, True, 1.0),
    state.GenerationRecord(7),
    state.ServedRecord(8),
    state.OutcomeRecord(1, FAILURE),
    state.PublicationRecord("policy", CLIENT, 4, "pid 4 (x)", MANIFEST, 1.0, 1 << 63, 1, 1),
    state.VersionRecord(1, "ready", 2, True, False, 3.0, "ready", False, False, 7, ((CLIENT, 8),)),
    state.ClaimRecord("lease", True, 1, "policy", 2, 4, 77, "pid 4 (x)", 3.0, 2, True, 0),
    state.MemoryRecord((((1, 2), (3, 4)),), ((5,),), None),
)

CASES: tuple[tuple[Codec, msgspec.Struct], ...] = (
    *((commands.CODEC, record) for record in COMMANDS),
    *((packets.FROM_WORKER, record) for record in FROM_WORKER),
    *((packets.FROM_AGENT, record) for record in FROM_AGENT),
    *((Codec(type(record)), record) for record in STATE),
)
"""Every kind of record with the codec that reads it."""


def sealed(body: bytes) -> bytes:
    """A record of any bytes, with the checksum that they need."""
    return zlib.crc32(body).to_bytes(4, "little") + body


_HEADS = bytes.fromhex("c0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedf808f909fa0bf00ffe07f")


def mutated(record: msgspec.Struct, source: random.Random) -> bytes:
    """The record's bytes, damaged; in seven cases of eight by someone who knows how to make a checksum."""
    whole = encode(record)
    body = bytearray(whole[4:])
    for _ in range(source.choice((1, 1, 1, 2, 5))):
        place = source.randrange(len(body) + 1)
        kind = source.randrange(7)
        if kind == 0 and place < len(body):
            body[place] ^= 1 << source.randrange(8)
        elif kind == 1 and place < len(body):
            body[place] = source.choice(_HEADS)
        elif kind == 2:
            body[place:place] = source.randbytes(source.randrange(1, 9))
        elif kind == 3:
            del body[place : place + source.randrange(1, 9)]
        elif kind == 4:
            body[place:place] = msgspec.msgpack.encode(_value(source))
        elif kind == 5:
            other = encode(source.choice(CASES)[1])[4:]
            body[place:] = other[source.randrange(len(other)) :]
        else:
            body[place:place] = body[: source.randrange(len(body) + 1)]
    if source.randrange(8):
        return sealed(bytes(body))
    return whole[: source.randrange(5)] + bytes(body)


def _value(source: random.Random) -> object:
    return source.choice(
        (
            None,
            True,
            -1,
            0,
            2**31,
            2**63 - 1,
            2**63,
            2**64 - 1,
            -(2**63),
            float("nan"),
            float("inf"),
            -0.0,
            1e308,
            "",
            "x" * source.randrange(300),
            "\0",
            b"\xff" * 16,
            [],
            [[]] * source.randrange(20),
            {},
            {"weight": -1},
            msgspec.msgpack.Ext(5, b"x"),
        )
    )
