"""What a new agent reads of its predecessor's state, if somebody else has written it: records of the declared types,
each with a checksum that is right, that contradict one another.

Whatever it is, the successor starts, with what is sound of it; and it can go on to the end of everyone that it knows.
``ETHA_FUZZ_SEED`` gives another seed, ``ETHA_FUZZ_ONLY`` the number of one case.
"""

from __future__ import annotations

import os
import struct
from random import Random

import msgspec
import pytest
from hostile import STRANGER, bytes_of, maker
from registry_world import Records
from samples import CLIENT, MANIFEST

from etha.errors import InvalidRecord
from etha.tensor_bus import state
from etha.tensor_bus.claims import ImpossibleTransition
from etha.tensor_bus.journal import Journal
from etha.tensor_bus.recovery import recover
from etha.tensor_bus.registry import Registry

SEED = int(os.environ.get("ETHA_FUZZ_SEED", "1"))
ONLY = os.environ.get("ETHA_FUZZ_ONLY")
CLIENTS = (CLIENT, b"\0" * 16, b"\xff" * 16)
FAR = (0, 2**63 - 1, 2**63 + 1, 2**64 - 1)
KINDS = (
    *(state.PublicationRecord, state.VersionRecord, state.ClaimRecord, state.ClientRecord) * 4,
    *(state.AgentRecord, state.GenerationRecord, state.ServedRecord, state.OutcomeRecord, state.MemoryRecord),
)
MAKERS = {kind: maker(kind) for kind in state._LETTERS}


def key_of(kind: type[msgspec.Struct], source: Random) -> bytes:
    letter = state._LETTERS[kind]
    number = struct.pack(">Q", source.choice((1, 2, 3) if source.random() < 0.95 else FAR))
    shapes = {1: b"", 9: number, 17: source.choice(CLIENTS), 25: source.choice(CLIENTS) + number}
    return letter + shapes[state._KEY_BYTES[letter]]


def records_of(source: Random) -> dict[bytes, msgspec.Struct]:
    """As `StateReader.everything` gives them: each has passed its codec."""
    found: dict[bytes, msgspec.Struct] = {}
    for _ in range(source.randrange(1, 40)):
        kind = source.choice(KINDS)
        key = key_of(kind, source)
        record = MAKERS[kind](source, STRANGER)
        if isinstance(record, state.PublicationRecord) and source.random() < 0.7:
            record = msgspec.structs.replace(record, manifest=MANIFEST)
        try:
            found[key] = state._CODECS[key[:1]].decode(bytes_of(record))
        except InvalidRecord:
            continue
    return found


class Process:
    """Stands for the process of a client that lives."""

    def __init__(self, pid: int) -> None:
        self.pid = pid


def known(pid: int, started: int) -> Process:
    if pid % 2:
        raise ProcessLookupError
    return Process(pid)


def play(number: int) -> int:
    """One state; how many publications of it were sound."""
    source = Random(SEED << 32 | number)
    records = records_of(source)
    registry, written = Registry(), Records()
    journal = Journal(written, registry)
    found = recover(records, registry, journal, 1.0, known)
    sound = len(registry.publications)
    journal.commit(1.0)
    for client in found.dead:
        registry.client_died(client, 1.0)
    for session in found.living:
        registry.client_rejoined(session.client)
        registry.reassert(session.client, set(), 1.0)
        registry.client_left(session.client, 1.0)
    for publication in list(registry.publications.values()):
        registry.memory_closed(publication.generation, 1.0)
    journal.commit(1.0)
    assert registry.table.clients == {}
    assert registry.table.claims == {}
    assert not any(publication.live for publication in registry.publications.values())
    assert next(registry.generations) > max(registry.publications, default=0)
    return sound


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.stress)])
def test_a_successor_starts_whatever_stands_in_the_state(count: int):
    numbers = range(count) if ONLY is None else [int(ONLY)]
    sound = 0
    for number in numbers:
        try:
            sound += play(number)
        except (Exception, ImpossibleTransition):
            print(f"ETHA_FUZZ_SEED={SEED} ETHA_FUZZ_ONLY={number} repeats this")
            raise
    print(f"{len(numbers)} states, {sound} publications of them were sound")
    assert sound > len(numbers) / 4 or ONLY is not None


@pytest.mark.parametrize("key", [b"p", b"p1", b"k" + CLIENT, b"c" + CLIENT + b"x"])
def test_a_key_of_another_length_is_damage(tmp_path, key: bytes):
    writer = state.StateWriter(str(tmp_path / "state.lmdb"))
    reader = state.StateReader(writer.path)
    kind = {letter: kind for kind, letter in state._LETTERS.items()}[key[:1]]
    record = next(record for record in (MAKERS[kind](Random(number), STRANGER) for number in range(99)) if record)
    writer.write({key: record})
    with pytest.raises(InvalidRecord):
        reader.everything()
    reader.close()
    writer.close()
