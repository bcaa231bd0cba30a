"""`etha.tensor_bus.records`, `commands` and `packets`: what is damaged is refused, whatever it is.

At random, and by the million: ``tests/fuzzing``.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tracemalloc

import msgspec
import pytest
from samples import CASES, COMMANDS, MANIFEST, sealed

from etha.errors import LEAVES, EthaError, InvalidRecord, LeaseTimeout
from etha.tensor_bus import commands, packets
from etha.tensor_bus.ipc.manifest import MAX_ENTRIES, Manifest, validate
from etha.tensor_bus.records import Codec, Failure, encode

ids = [type(record).__name__ for _, record in CASES]


@pytest.mark.parametrize(("codec", "record"), CASES, ids=ids)
def test_a_record_comes_back_as_it_was(codec: Codec, record: msgspec.Struct):
    data = encode(record)
    assert codec.decode(data) == record
    assert codec.decode(memoryview(data)) == record


def test_every_kind_is_among_the_samples():
    known = {type(record) for _, record in CASES}
    for module in (commands, packets):
        structs = {
            kind
            for kind in vars(module).values()
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__
        }
        assert structs <= known


@pytest.mark.parametrize(("codec", "record"), CASES, ids=ids)
def test_any_flipped_bit_and_any_cut_is_noticed(codec: Codec, record: msgspec.Struct):
    data = encode(record)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InvalidRecord):
            codec.decode(bytes(damaged))
    for length in range(len(data)):
        with pytest.raises(InvalidRecord):
            codec.decode(data[:length])
    with pytest.raises(InvalidRecord):
        codec.decode(data + b"\0")


def test_a_record_is_bounded():
    class Text(msgspec.Struct):
        text: str

    codec = Codec(Text, 100)
    fits = encode(Text("x" * 83))
    assert len(fits) <= 100
    assert codec.decode(fits).text == "x" * 83
    for length in (100, 1000):
        with pytest.raises(InvalidRecord):
            codec.decode(encode(Text("x" * length)))
    with pytest.raises(InvalidRecord):
        packets.FROM_WORKER.decode(bytes(packets.MAX_PACKET_BYTES + 1))


def bodies():
    """Bytes that are no record, each with a checksum that is right."""
    register = encode(COMMANDS[0])[4:]
    yield "nothing of msgpack", b"\xc1"
    yield "another record", encode(packets.Welcome(b"", 1))[4:]
    yield "text that is no UTF-8", register.replace(b"\xa6policy", b"\xa6pol\xffcy")
    yield "a key that is no UTF-8", register.replace(b"\xa4bias", b"\xa4b\xffas")
    yield "deep", b"\x96\xa8register\xa1x" + b"\x91" * 60_000
    yield "deep where nothing is declared", register[:-1] + b"\x91" * 60_000
    yield "endless array", register.replace(b"\x92\x08\x10", b"\xdd\xff\xff\xff\xff\x08\x10")
    yield "endless map", register.replace(b"\x84\xa6weight", b"\xdf\xff\xff\xff\xff\xa6weight")
    yield "endless text", register.replace(b"\xa6policy", b"\xdb\xff\xff\xff\xffpolicy")
    yield "a key of another kind", register.replace(b"\xa6weight", b"\x91\x01")
    yield "two of them", register + register


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in bodies()])
def test_what_is_no_record_is_refused_whatever_it_is(body: bytes):
    assert body != encode(COMMANDS[0])[4:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRecord) as caught:
        commands.CODEC.decode(sealed(body))
    assert caught.value.resource == "record"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024


def test_a_table_that_is_too_long_is_refused_before_it_becomes_objects():
    """A record of 64 MiB may hold millions of rows; they would take gigabytes, and be refused only then."""
    rows = b"\xdd" + (MAX_ENTRIES + 1).to_bytes(4, "big") + b"\x93\xff\x00\x00" * (MAX_ENTRIES + 1)
    record = sealed(b"\x94\x90" + rows + b"\x90\x80")
    tracemalloc.start()
    with pytest.raises(InvalidRecord):
        Codec(Manifest).decode(record)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# -- errors on their way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)
def test_an_error_arrives_as_what_it_was(leaf: type[EthaError]):
    error = leaf("It stands.", resource="policy", holder="pid 1 (x)", remedy="Stop it.")
    data = encode(Failure.of(error))
    arrived = Codec(Failure).decode(data).error()
    assert type(arrived) is leaf
    assert vars(arrived) == vars(error)


def test_an_error_of_an_unknown_leaf_is_still_one_of_ours():
    arrived = Failure("NotYetInvented", "It is so.", "policy").error()
    assert type(arrived) is EthaError
    assert arrived.resource == "policy"
    assert type(Failure("LeaseTimeout", "It is so.").error()) is LeaseTimeout


def test_reading_records_imports_no_torch():
    code = "import sys, etha.tensor_bus.packets, etha.tensor_bus.state; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    validate(MANIFEST)
