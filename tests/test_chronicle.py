"""`etha.tensor_bus.chronicle`: what an operator hears of workers, and what nobody hears."""

from __future__ import annotations

import json
import logging

import pytest
from box import until
from harness import Raised
from samples import CLIENT, MANIFEST

from etha.tensor_bus.chronicle import Chronicle
from etha.tensor_bus.claims import Phase
from etha.tensor_bus.state import (
    ClientRecord,
    PublicationRecord,
    VersionRecord,
    client_key,
    publication_key,
    version_key,
)


def messages(agent) -> list[str]:
    """What a JSON log says, at INFO."""
    said = [json.loads(line) for line in agent.errors.read_text().splitlines()]
    assert {line["level"] for line in said} <= {"INFO"}
    assert {line["pid"] for line in said} <= {agent.pid}
    return [line["message"] for line in said]


@pytest.fixture
def told(start_agent):
    return start_agent("--log-level", "info", "--log-json")


def wait_for(agent, text: str) -> None:
    until(lambda: any(text in message for message in messages(agent)))


def test_joins_registrations_closings_refusals_and_ends(told, start_worker):
    owner, other = start_worker(), start_worker()
    owner.do("w = torch.zeros(8).share_memory_(); p = client.register_tensors('policy', {'w': w, 'tied': w})")
    with pytest.raises(Raised, match="NameTaken"):
        other.do("client.register_tensors('policy', {'w': torch.zeros(8).share_memory_()})")
    owner.do("p.close()")
    other.do("client.close()")
    label = f"pid {owner.pid} (zygote.py)"
    wait_for(told, "left")
    assert told.stop() == 0
    said = messages(told)
    order = [
        f"{label} joined",
        f'{label} registered "policy" (generation 1): 2 tensors, 32 bytes',
        f"refused pid {other.pid} (zygote.py), command 1: NameTaken: ",
        f'"policy" (generation 1) of {label} is closed',
        f"pid {other.pid} (zygote.py) left",
        "rank 0 has ended",
    ]
    places = [next(place for place, message in enumerate(said) if message.startswith(text)) for text in order]
    assert places == sorted(places)


def test_deaths_and_what_they_end(told, start_worker):
    owner, reader = start_worker(), start_worker()
    owner.do("p = client.register_tensors('policy', {'w': torch.zeros(8).share_memory_()})")
    reader.do("p = client.subscribe('policy')")
    owner.kill()
    wait_for(told, f"pid {owner.pid} (zygote.py) died")
    wait_for(told, f'"policy" (generation 1) is over: its owner, pid {owner.pid} (zygote.py), died')


def test_a_torn_version_is_told(told, start_worker):
    owner = start_worker(setup="p = client.register_tensors('policy', {'w': torch.zeros(8).share_memory_()})")
    with pytest.raises(Raised, match="ZeroDivisionError"):
        owner.do("with p.update(): 1 / 0")
    wait_for(told, '"policy" (generation 1) is torn')


def test_versions_leases_and_updates_are_not_told(told, start_worker):
    owner, reader = start_worker(), start_worker()
    owner.do("p = client.register_tensors('policy', {'w': torch.zeros(8).share_memory_()})")
    reader.do("s = client.subscribe('policy')")
    before = len(messages(told))
    reader.do("for _ in range(50): s.read().release()")
    owner.do("for _ in range(50):\n    with p.update(): pass\n    p.publish()")
    reader.do("s.read(min_version=100).release()")
    assert len(messages(told)) == before


def test_with_info_off_nothing_is_kept(caplog: pytest.LogCaptureFixture):
    chronicle = Chronicle()
    caplog.set_level(logging.WARNING, "etha")
    chronicle.committed({client_key(CLIENT): ClientRecord(3, "pid 3 (x)", 0, True, 1.0)})
    assert (caplog.messages, chronicle._clients) == ([], {})


def test_what_is_over_is_forgotten(caplog: pytest.LogCaptureFixture):
    chronicle = Chronicle()
    caplog.set_level(logging.INFO, "etha")

    def version(phase: Phase) -> VersionRecord:
        return VersionRecord(0, phase.value, 0, True, False, 1.0, "ready", False, False)

    published = PublicationRecord("policy", CLIENT, 3, "pid 3 (x)", MANIFEST, 1.0, 1 << 63, 0, 1)
    chronicle.committed({client_key(CLIENT): ClientRecord(3, "pid 3 (x)", 0, True, 1.0)})
    chronicle.committed({publication_key(1): published, version_key(1): version(Phase.OPENING)})
    chronicle.committed({version_key(1): version(Phase.READY)})
    chronicle.committed({client_key(CLIENT): ClientRecord(3, "pid 3 (x)", 0, False, 1.0)})
    chronicle.committed({publication_key(1): None, version_key(1): None, client_key(CLIENT): None})
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "pid 3 (x) joined",
        'pid 3 (x) registered "policy" (generation 1)',
        "pid 3 (x) has no connection any more; what it holds stays until it dies",
        '"policy" (generation 1) of pid 3 (x) is closed',
    ]
    assert (chronicle._clients, chronicle._publications) == ({}, {})


def test_a_registration_that_failed_to_open_was_never_there(caplog: pytest.LogCaptureFixture):
    chronicle = Chronicle()
    caplog.set_level(logging.INFO, "etha")
    published = PublicationRecord("policy", CLIENT, 3, "pid 3 (x)", MANIFEST, 1.0, 1 << 63, 0, 1)
    opening = VersionRecord(0, Phase.OPENING.value, 0, True, False, 1.0, "ready", False, False)
    chronicle.committed({publication_key(1): published, version_key(1): opening})
    chronicle.committed({publication_key(1): None, version_key(1): None})
    assert caplog.messages == []
