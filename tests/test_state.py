"""`etha.tensor_bus.state` and `journal`: what the agent knows, for whoever asks, whatever the agent does."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from samples import CLIENT, FAILURE, STATE, mutated

from etha.errors import InvalidRecord, NoAgent, QueueFull, StaleHandle, SystemLimit
from etha.tensor_bus import state
from etha.tensor_bus.journal import Journal
from etha.tensor_bus.registry import Registry
from etha.tensor_bus.state import (
    AgentRecord,
    ClaimRecord,
    ClientRecord,
    OutcomeRecord,
    PublicationRecord,
    StateReader,
    VersionRecord,
    claim_key,
    client_key,
    key_number,
    memory_key,
    outcome_key,
    publication_key,
    served_key,
    version_key,
)
from etha.tensor_bus.state_writer import StateWriter

KEYS = (
    state.AGENT_KEY,
    client_key(CLIENT),
    state.GENERATION_KEY,
    served_key(CLIENT),
    outcome_key(CLIENT, 5),
    publication_key(1),
    version_key(1),
    claim_key(CLIENT, 7),
    memory_key(1),
)
RECORDS = dict(zip(KEYS, STATE, strict=True))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "agent_rank0_state.lmdb")


@pytest.fixture
def writer(path: str):
    writer = StateWriter(path)
    yield writer
    writer.close()


@pytest.fixture
def reader(writer: StateWriter, path: str):
    reader = StateReader(path)
    yield reader
    reader.close()


def test_every_record_comes_back(writer: StateWriter, reader: StateReader):
    assert reader.agent() is None
    writer.write(RECORDS)
    assert reader.agent() == RECORDS[state.AGENT_KEY]
    assert reader.publication(1) == RECORDS[publication_key(1)]
    assert reader.version(1) == RECORDS[version_key(1)]
    assert reader.outcome(CLIENT, 5) == RECORDS[outcome_key(CLIENT, 5)]
    shown = reader.snapshot([type(record) for record in STATE])
    assert {key: record for kind in shown.values() for key, record in kind.items()} == RECORDS
    assert [key_number(key) for key in (outcome_key(CLIENT, 5), claim_key(CLIENT, 2**63))] == [5, 2**63]


def test_what_is_not_there_is_none_or_stale(writer: StateWriter, reader: StateReader):
    assert reader.version(9) is None
    assert reader.outcome(CLIENT, 9) is None
    assert reader.all(ClaimRecord) == {}
    with pytest.raises(StaleHandle) as caught:
        reader.publication(9)
    assert caught.value.resource == "9"


def test_none_deletes_and_kinds_do_not_mix(writer: StateWriter, reader: StateReader):
    claims = {claim_key(bytes([n]) * 16, n): RECORDS[claim_key(CLIENT, 7)] for n in (0, 1, 255)}
    writer.write({**RECORDS, **claims})
    writer.write(dict.fromkeys(claims, None) | {claim_key(b"none", 1): None})
    assert list(reader.all(ClaimRecord)) == [claim_key(CLIENT, 7)]
    assert len(reader.all(ClientRecord)) == len(reader.all(PublicationRecord)) == 1


def test_a_snapshot_is_of_one_moment(writer: StateWriter, path: str):
    """Version and claim are written together, so no reader ever sees one without the other."""
    code = """
import sys
from etha.tensor_bus.state import ClaimRecord, StateReader, VersionRecord
reader = StateReader(sys.argv[1])
seen = set()
while 300 not in seen:
    shown = reader.snapshot((VersionRecord, ClaimRecord))
    (version,), (claim,) = (kind.values() for kind in shown.values())
    if version.version != claim.version:
        raise SystemExit(repr(shown))
    seen.add(version.version)
print(len(seen))
"""
    version, claim = RECORDS[version_key(1)], RECORDS[claim_key(CLIENT, 7)]

    def write(number: int) -> None:
        both = (msgspec.structs.replace(record, version=number) for record in (version, claim))
        writer.write(dict(zip((version_key(1), claim_key(CLIENT, 7)), both, strict=True)))

    write(0)
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as process:
        while process.poll() is None:
            for number in (*range(300), 300):
                write(number)
        assert process.returncode == 0
        assert int(process.stdout.read()) > 1


def test_it_answers_when_the_agent_is_stopped_or_dead(path: str):
    code = """
import os, sys
sys.path.insert(0, sys.argv[2])
from etha.tensor_bus.state_writer import StateWriter
from test_state import RECORDS, state
writer = StateWriter(sys.argv[1])
writer.write(RECORDS)
transaction = writer._environment.env.begin(write=True)
transaction.put(state.AGENT_KEY, b"half")
print(flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, path, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        reader = StateReader(path)
        assert reader.agent() == RECORDS[state.AGENT_KEY]
        process.kill()
        process.wait()
        assert reader.agent() == RECORDS[state.AGENT_KEY]
        reader.close()


def test_no_state_no_agent(path: str):
    with pytest.raises(NoAgent):
        StateReader(path)


def test_a_full_file_loses_nothing_and_goes_on(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(state, "MAP_SIZE", 64 << 12)
    writer = StateWriter(path)
    writer.write(RECORDS)
    big = {publication_key(n): STATE[0] for n in range(2, 5_000)}
    with pytest.raises(QueueFull) as caught:
        writer.write(big)
    assert caught.value.resource == path
    reader = StateReader(path)
    assert len(reader.all(PublicationRecord)) == 1
    writer.write({served_key(CLIENT): None})
    assert len(reader.all(state.ServedRecord)) == 0
    reader.close()
    writer.close()


def test_a_full_table_of_readers_is_a_typed_error(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("etha.tensor_bus.environments.MAX_READERS", 2)
    writer = StateWriter(path)
    reader = StateReader(path)
    held = [reader._env.begin() for _ in range(2)]
    for read in (reader.agent, lambda: reader.all(AgentRecord)):
        with pytest.raises(SystemLimit) as caught:
            read()
        assert caught.value.resource == path
    while held:
        held.pop().abort()
    assert reader.agent() is None
    reader.close()
    writer.close()


def test_no_transaction_outlives_a_read(writer: StateWriter, reader: StateReader):
    """One that did would keep every page that is freed from then on."""
    size = 0
    for number in range(3_000):
        writer.write({version_key(1): msgspec.structs.replace(RECORDS[version_key(1)], version=number)})
        assert reader.version(1).version == number
        reader.snapshot((VersionRecord, AgentRecord))
        if number == 100:
            size = os.stat(writer.path).st_blocks
    assert 0 < os.stat(writer.path).st_blocks <= size


def test_damaged_records_are_refused_and_nothing_else(writer: StateWriter, reader: StateReader):
    seed = random.SystemRandom().getrandbits(64)
    print(f"seed {seed}")
    source = random.Random(seed)
    refused = 0
    for _ in range(1_000):
        key, record = source.choice(list(RECORDS.items()))
        with writer._environment.env.begin(write=True) as transaction:
            transaction.put(key, mutated(record, source))
        try:
            reader.snapshot((type(record),))
        except InvalidRecord:
            refused += 1
    assert refused > 500


# -- the journal -----------------------------------------------------------------------------------------------------


@pytest.fixture
def journal(writer: StateWriter) -> Journal:
    return Journal(writer, Registry())


def test_nothing_is_written_before_the_commit(journal: Journal, reader: StateReader):
    journal.put(state.AGENT_KEY, RECORDS[state.AGENT_KEY])
    journal.served(CLIENT, 3)
    journal.outcome(CLIENT, 3, OutcomeRecord(0, FAILURE))
    assert reader.agent() is None
    journal.commit(0.0)
    assert reader.agent() == RECORDS[state.AGENT_KEY]
    assert reader.outcome(CLIENT, 3) == OutcomeRecord(0, FAILURE)


def test_outcomes_of_a_client_are_bounded_and_go_with_it(journal: Journal, reader: StateReader):
    for sequence in range(1, 201):
        journal.outcome(CLIENT, sequence, OutcomeRecord(0, None))
        journal.commit(0.0)
    assert [key_number(key) for key in reader.all(OutcomeRecord)] == list(range(137, 201))
    journal.forget_client(CLIENT)
    journal.commit(0.0)
    assert reader.all(OutcomeRecord) == {}


def test_what_cannot_be_written_now_is_written_later(path: str, monkeypatch: pytest.MonkeyPatch):
    """A full file is a delay: what had changed is not forgotten."""
    monkeypatch.setattr(state, "MAP_SIZE", 64 << 12)
    writer = StateWriter(path)
    reader = StateReader(path)
    journal = Journal(writer, Registry())
    fillers = {
        claim_key(CLIENT, n): msgspec.structs.replace(RECORDS[claim_key(CLIENT, 7)], name="x" * 3_000)
        for n in range(64)
    }

    def write_until_full() -> None:
        for key, record in fillers.items():
            writer.write({key: record})

    with pytest.raises(QueueFull):
        write_until_full()
    written = len(reader.all(ClaimRecord))
    assert 10 < written < 64
    big = msgspec.structs.replace(STATE[0], command="x" * 20_000)
    journal.put(state.AGENT_KEY, big)
    journal.outcome(CLIENT, 1, OutcomeRecord(0, None))
    with pytest.raises(QueueFull):
        journal.commit(0.0)
    assert reader.agent() is None
    assert reader.outcome(CLIENT, 1) is None
    for key in list(fillers)[:written]:
        writer.write({key: None})
    journal.commit(1.0)
    assert reader.agent() == big
    assert reader.outcome(CLIENT, 1) == OutcomeRecord(0, None)
    reader.close()
    writer.close()
