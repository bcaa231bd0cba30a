"""Records that no friend would send: of the declared types, with values out of place; and bytes that are wrong.

Two ways to make one. `maker` walks the declared types of a struct (`msgspec.inspect`) and puts a value into each field:
one that fits what is there (`Known`), or one of those that break things. So it follows the records as they change.
`damaged` takes a record that was sound and flips, cuts, splices and stretches its bytes; most of the time it then makes
the checksum right again, as anyone can.

Everything is drawn from the `random.Random` that is handed in, and from nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import msgspec
from msgspec import inspect
from samples import CLIENT, MANIFEST, sealed

from etha.tensor_bus.ipc.manifest import ITEMSIZE, HostAllocation, Manifest, Storage, TensorSpec
from etha.tensor_bus.records import SCHEMA, encode

INTS = (0, 1, -1, 2, 3, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
INTS = (*INTS, -2, -(2**31), -(2**63))
BEYOND = (2**64, 2**65, 2**200, -(2**63) - 1, -(2**200))
"""What no record can carry, but a struct in memory can."""

FLOATS = (0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 1e-9)

SURROGATE = "\ue000"
"""Stands for a lone surrogate until `bytes_of` puts its three bytes there: no encoder would write it."""

TEXTS = ("", "policy", "x", "\0", "a\0b", "x\n\x1b[2Jy", "\r\n", "é" * 600, "x" * 256, "x" * 1025, "\U0001f600" * 300)
TEXTS = (*TEXTS, SURROGATE, "a" + SURROGATE, "../../etc/passwd", "%s%n", "policy\u202e", "nan", "0")
LONG_TEXTS = (60_000, 1 << 20)
BYTES = (b"", b"\0", CLIENT, CLIENT[:15], CLIENT + b"\0", b"\xff" * 16, b"\0" * 16, b"\xff" * 64, b"x" * 65)
COUNTS = (0, 0, 1, 1, 2, 3, 7, 70)
LONG_COUNTS = (300, 5000)


@dataclass
class Known:
    """What is there, as far as the maker of a case knows, so that some of its values fit.

    Attributes:
        now: ``CLOCK_BOOTTIME`` seconds.
        values: field name to values that fit it.
        manifests: sound ones.
        long: whether a text may have a megabyte.
    """

    now: Callable[[], float] = lambda: 1000.0
    values: dict[str, Sequence[object]] = field(default_factory=dict)
    manifests: Sequence[Manifest] = (MANIFEST,)
    long: bool = True


STRANGER = Known(
    values={
        "name": ("policy", "canary"),
        "generation": (1, 2, 3),
        "number": (1, 2, 3, 4),
        "through": (1, 2),
        "sequence": (1, 2, 3),
        "version": (0, 1, 2, 3),
        "schema": (SCHEMA,),
        "owner": (CLIENT,),
        "client": (CLIENT,),
        "kind": ("lease", "update", "import", "register", "rebind", "suspend", "close"),
        "phase": ("opening", "ready", "writing", "torn", "closing", "closed", "owner died"),
        "rest": ("ready", "torn"),
        "writes": (0, 1, 2),
        "newest": (2, 3),
        "pid": (3, 4, 6),
        "layout": (1, 2),
    }
)
"""Knows what an agent that has served for a moment may hold."""

Maker = Callable[[Random, Known], object]


def maker(kind: object) -> Maker:
    """What makes values of a declared type, a struct or a union of structs above all."""
    return _of(inspect.type_info(kind), "")


def manifest(source: Random, known: Known) -> Manifest:
    """A sound manifest; in three cases of four, with one number of it out of place."""
    made = source.choice(known.manifests) if source.random() < 0.3 else _sound(source)
    return made if source.random() < 0.25 else _spoilt(made, source, INTS, TEXTS)


def unbounded_manifest(source: Random) -> Manifest:
    """The same as structs that were never bytes: their numbers may be of any size, their names no text at all."""
    made = _sound(source)
    texts = (*(text.replace(SURROGATE, "\ud800") for text in TEXTS), "x" * source.choice((1024, 1025, 5000)))
    for _ in range(source.choice((0, 1, 1, 1, 2))):
        made = _spoilt(made, source, (*INTS, *BEYOND), texts)
    return made


def bytes_of(record: msgspec.Struct) -> bytes:
    """The record's bytes, with its lone surrogates."""
    data = encode(record)
    if SURROGATE.encode() in data:
        return sealed(data[4:].replace(SURROGATE.encode(), b"\xed\xa0\x80"))
    return data


# -- by type -----------------------------------------------------------------------------------------------------


def _of(info: inspect.Type, name: str) -> Maker:
    if isinstance(info, inspect.StructType):
        return _struct(info)
    if isinstance(info, inspect.UnionType):
        makers = [_of(each, name) for each in info.types]
        return lambda source, known: source.choice(makers)(source, known)
    if isinstance(info, inspect.VarTupleType | inspect.ListType):
        return _sequence(_of(info.item_type, name), flat=isinstance(info.item_type, inspect.IntType))
    if isinstance(info, inspect.TupleType):
        items = [_of(each, name) for each in info.item_types]
        return lambda source, known: tuple(item(source, known) for item in items)
    if isinstance(info, inspect.DictType):
        key, value = _of(info.key_type, name), _of(info.value_type, name)
        return lambda source, known: {key(source, known): value(source, known) for _ in range(_count(source))}
    if isinstance(info, inspect.IntType):
        return lambda source, known: source.choice(known.values.get(name) or INTS if source.random() < 0.3 else INTS)
    if isinstance(info, inspect.FloatType):
        return _float
    if isinstance(info, inspect.StrType):
        return _text
    if isinstance(info, inspect.BytesType):
        return lambda source, known: source.choice(BYTES)
    if isinstance(info, inspect.BoolType):
        return lambda source, known: source.random() < 0.5
    if isinstance(info, inspect.NoneType):
        return lambda source, known: None
    raise TypeError(f"no idea how to make a {info}")


def _struct(info: inspect.StructType) -> Maker:
    cls = info.cls
    if cls is Manifest:
        return manifest
    fields = [(each.name, _of(each.type, each.name)) for each in info.fields]

    def make(source: Random, known: Known) -> object:
        # Mostly sound, or hardly: with one odd value in ten, a record of eight fields is sound in two cases of five.
        oddness = source.choice((0.0, 0.1, 0.1, 0.5))
        values = []
        for name, odd in fields:
            fitting = known.values.get(name)
            if fitting and source.random() >= oddness:
                values.append(source.choice(fitting))
            elif name == "deadline" and source.random() >= oddness:
                values.append(known.now() + source.choice((-1.0, 0.0, 0.01, 0.05)))
            else:
                values.append(odd(source, known))
        return cls(*values)

    return make


def _sequence(item: Maker, *, flat: bool) -> Maker:
    """Of numbers there may be many; of sequences not, or there would be as many squared."""

    def make(source: Random, known: Known) -> tuple[object, ...]:
        count = _count(source)
        if not flat:
            return tuple(item(source, known) for _ in range(min(count, 7)))
        if count > 100 or source.random() < 0.02:  # the same again and again: a short record of much work
            return (item(source, known),) * source.choice((count, 5000, 60_000))
        return tuple(item(source, known) for _ in range(count))

    return make


def _count(source: Random) -> int:
    return source.choice(LONG_COUNTS) if source.random() < 0.002 else source.choice(COUNTS)


def _float(source: Random, known: Known) -> float:
    return source.choice(FLOATS)


def _text(source: Random, known: Known) -> str:
    if source.random() < 0.001:
        return "y" * (source.choice(LONG_TEXTS) if known.long else LONG_TEXTS[0])
    return source.choice(TEXTS)


# -- manifests ---------------------------------------------------------------------------------------------------


def _sound(source: Random) -> Manifest:
    allocations = tuple(
        HostAllocation(source.randrange(4), number, source.choice((1, 64, 4096, 1 << 20, 2**63 - 1)))
        for number in range(source.randrange(3))
    )
    storages = [Storage(-1, 0, 0)]
    for number, allocation in enumerate(allocations):
        offset = source.choice((0, 0, allocation.size // 2))
        storages.append(Storage(number, offset, max(1, (allocation.size - offset) // source.choice((1, 2)))))
    specs = []
    for _ in range(source.choice((1, 1, 2, 5))):
        storage = source.randrange(len(storages))
        dtype = source.choice(tuple(ITEMSIZE))
        room = storages[storage].nbytes // ITEMSIZE[dtype]
        shape = (source.randrange(room + 1) if room < 1 << 40 else 7,) if room else (0, 3)
        specs.append(TensorSpec(storage, dtype, shape, (1,) * len(shape), 0))
    names = {f"t{number}": number for number in range(len(specs))}
    return Manifest(allocations, tuple(storages), tuple(specs), names)


def _spoilt(made: Manifest, source: Random, ints: Sequence[int], texts: Sequence[str]) -> Manifest:
    table = source.choice(("allocations", "storages", "tensors", "names", "names"))
    number = source.choice(ints)
    if table == "names":
        names = dict(made.names)
        how = source.randrange(3)
        if how == 0 and names:
            names[source.choice(tuple(names))] = number
        elif how == 1:
            names[source.choice(texts)] = 0
        elif names:
            names.pop(source.choice(tuple(names)))
        return msgspec.structs.replace(made, names=names)
    rows = list(getattr(made, table))
    if not rows:
        return made
    place = source.randrange(len(rows))
    name = source.choice(type(rows[place]).__struct_fields__)
    value = getattr(rows[place], name)
    if isinstance(value, int):
        value = source.choice((number, value + 1, value - 1, -value))
    elif isinstance(value, str):
        value = source.choice(texts)
    elif isinstance(value, tuple) and source.random() < 0.5:
        value = (*value, number)
    elif isinstance(value, tuple):
        value = (number,) * source.choice((0, 1, 1, 2, 64, 65, 300))
    how = source.randrange(8)
    if how == 0:
        del rows[place]
    elif how == 1:
        rows.append(rows[place])
    else:
        rows[place] = msgspec.structs.replace(rows[place], **{name: value})
    return msgspec.structs.replace(made, **{table: tuple(rows)})


# -- by byte -----------------------------------------------------------------------------------------------------

HEADS = bytes.fromhex("c0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedf808f909fa0bf00ffe07f")
LENGTHS = tuple(
    bytes.fromhex(text)
    for text in (
        *(
            "dcffff",
            "dc0000",
            "ddffffffff",
            "dd7fffffff",
            "dd00100000",
            "deffff",
            "dfffffffff",
            "df00100000",
            "9f",
            "8f",
        ),
        *("bf", "d9ff", "daffff", "dbffffffff", "db00100000", "c4ff", "c5ffff", "c6ffffffff", "c7ff01", "c8ffff01"),
        "c9ffffffff01",
    )
)
"""Heads of arrays, maps, texts, bytes and extensions (msgpack), with lengths that are not there."""


_VALUES = (*INTS, *FLOATS, None, True, "", "x" * 300, b"\xff" * 16, [], {}, [[]] * 20, {"weight": -1})


def damaged(whole: bytes, source: Random, others: Sequence[bytes]) -> bytes:
    """A sound record's bytes, damaged; in four cases of five with the checksum that they need.

    Args:
        whole: with its checksum.
        source: of chance.
        others: sound records, to splice with.
    """
    body = bytearray(whole[4:])
    draw = source.random
    again = 1.0
    while draw() < again:
        again = 0.4
        place = int(draw() * (len(body) + 1))
        kind = int(draw() * 10)
        if kind == 0 and place < len(body):
            body[place] ^= 1 << int(draw() * 8)
        elif kind == 1 and place < len(body):
            body[place] = HEADS[int(draw() * len(HEADS))]
        elif kind == 2 and place < len(body):
            body[place] = (body[place] + (1 if draw() < 0.5 else -1)) & 0xFF
        elif kind == 3:
            body[place : place + 1] = LENGTHS[int(draw() * len(LENGTHS))]
        elif kind == 4:
            body[place:place] = source.randbytes(1 + int(draw() * 8))
        elif kind == 5:
            del body[place : place + 1 + int(draw() * 8)]
        elif kind == 6:
            del body[place:]
        elif kind == 7:
            other = others[int(draw() * len(others))]
            body[place:] = other[4 + int(draw() * (len(other) - 4)) :]
        elif kind == 8:
            body[place:place] = msgspec.msgpack.encode(source.choice(_VALUES))
        elif len(body) < 4096:
            body[place:place] = body[: int(draw() * (len(body) + 1))]
    how = draw()
    if how < 0.8:
        return sealed(bytes(body))
    if how < 0.9:
        return whole[:4] + bytes(body)
    return bytes(body) if how < 0.95 else whole[: int(draw() * 5)] + bytes(body)
