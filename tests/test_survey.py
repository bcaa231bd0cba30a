"""`etha.cli.survey`: it takes time in proportion to what is recorded."""

from __future__ import annotations

import time
from pathlib import Path

from etha.cli.survey import look
from etha.tensor_bus import clock
from etha.tensor_bus.ipc.allocations import HostAllocation
from etha.tensor_bus.ipc.manifest import Manifest, Storage, TensorSpec
from etha.tensor_bus.ipc.process import boot_id, pid_namespace
from etha.tensor_bus.records import SCHEMA
from etha.tensor_bus.state import (
    AGENT_KEY,
    AgentRecord,
    ClaimRecord,
    MemoryRecord,
    PublicationRecord,
    VersionRecord,
    claim_key,
    memory_key,
    publication_key,
    version_key,
)
from etha.tensor_bus.state_writer import StateWriter

MANIFEST = Manifest(
    (HostAllocation(25, 4711, 64),), (Storage(0, 0, 64),), (TensorSpec(0, "float32", (16,), (1,), 0),), {"w": 0}
)


def books(path: Path, count: int) -> None:
    """A state of ``count`` publications, each with a reader, a lease and an update that waits for it."""
    now = clock.now()
    changes = {
        AGENT_KEY: AgentRecord(1, boot_id(), pid_namespace(), 1, SCHEMA, 0, "cpu", str(path) + "c", now, now, {})
    }
    for number in range(1, count + 1):
        name, client = f"p{number}", number.to_bytes(16, "big")
        changes[publication_key(number)] = PublicationRecord(name, client, 2, "pid 2 (x)", MANIFEST, now, 1 << 63, 0, 1)
        changes[version_key(number)] = VersionRecord(number, "ready", 0, True, True, now, "ready", False, False)
        changes[memory_key(number)] = MemoryRecord((((1, 2),),), ((3,),), None)
        for place, (kind, granted) in enumerate((("import", True), ("lease", True), ("update", False))):
            claim = ClaimRecord(kind, granted, number, name, None, 3, place, "pid 3 (y)", now)
            changes[claim_key(client, place + 1)] = claim
    writer = StateWriter(str(path))
    writer.write(changes)
    writer.close()


def test_each_publication_has_its_own_and_each_waiter_its_own_blockers(tmp_path: Path):
    books(tmp_path / "s", 3)
    view = look(0, str(tmp_path / "s"))
    assert [(each.name, each.version, each.readers) for each in view.publications] == [
        ("p1", 1, 1),
        ("p2", 2, 1),
        ("p3", 3, 1),
    ]
    assert {each.memory for each in view.publications} == {"1 mappings, 1 descriptors in the owner"}
    assert [(each.publication, each.waits_for) for each in view.waits] == [
        (f"p{number}", ("pid 3 (y) thread 1",)) for number in (1, 2, 3)
    ]


def test_it_grows_linearly(tmp_path: Path):
    """CPU time, the best of three: eight times the publications take about eight times as long; a square, 64."""

    def cost(count: int) -> float:
        path = tmp_path / str(count)
        books(path, count)
        took = []
        for _ in range(3):
            began = time.process_time()
            assert len(look(0, str(path)).publications) == count
            took.append(time.process_time() - began)
        return min(took)

    assert cost(4000) < 24 * cost(500)
