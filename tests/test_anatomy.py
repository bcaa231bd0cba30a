"""`etha.cli.anatomy`: what a publication is made of, in time that grows with its tensors."""

from __future__ import annotations

import time

import msgspec
import pytest

from etha.cli.anatomy import Look, Owner, Reader, anatomy
from etha.cli.sheet import lines
from etha.tensor_bus.ipc.allocations import HostAllocation
from etha.tensor_bus.ipc.manifest import Manifest, Storage, TensorSpec, validate
from etha.tensor_bus.state import ClaimRecord, ClientRecord, PublicationRecord, VersionRecord

CLIENT = ClientRecord(22, "pid 22 (train.py)", 0, True, 1.0)
IMPORT = ClaimRecord("import", True, 1, "policy", None, 33, 33, "pid 33 (eval.py)", 5.0)


def published(count: int) -> PublicationRecord:
    """``count`` tensors in as many allocations, two names each."""
    manifest = Manifest(
        tuple(HostAllocation(25, 1000 + i, 4096) for i in range(count)),
        tuple(Storage(i, 0, 4096) for i in range(count)),
        tuple(TensorSpec(i, "float32", (32, 32), (32, 1), 0) for i in range(count)),
        {f"{kind}.{i}": i for kind in ("w", "tied") for i in range(count)},
    )
    validate(manifest)
    return PublicationRecord("policy", b"o" * 16, 22, "pid 22 (train.py)", manifest, 2.0, 1 << 63, 0, 1)


def seen(count: int, start: int) -> Look:
    ranges = tuple(((start + 4096 * i, start + 4096 * i + 4096),) for i in range(count))
    return Look("now", "running", None, ranges, ((),) * count)


def view(record: PublicationRecord, owner: Look, *readers: Reader):
    return anatomy(
        1,
        record,
        VersionRecord(3, "ready", 3, True, False, 9.0, "ready", False, False),
        Owner(CLIENT, owner),
        readers,
        (),
        "cpu",
        10.0,
    )


def test_ages_holders_and_ties():
    found = view(published(2), seen(2, 0x1000), Reader(IMPORT, None, seen(2, 0x9000)))
    assert (found.age_s, found.changed_s, found.readers[0].age_s) == (8.0, 1.0, 5.0)
    assert found.nbytes == 8192
    assert [(holder.role, holder.pid) for holder in found.allocations[1].holders] == [("owner", 22), ("reader", 33)]
    assert found.allocations[1].holders[0].mappings == ((0x2000, 0x3000),)
    assert [(tensor.name, tensor.tied_to) for tensor in found.tensors] == [
        ("w.0", None),
        ("w.1", None),
        ("tied.0", "w.0"),
        ("tied.1", "w.1"),
    ]
    assert not found.readers[0].connected


def test_an_owner_that_reads_itself_is_one_holder():
    own = msgspec.structs.replace(IMPORT, pid=22)
    look = seen(1, 0x1000)
    found = view(published(1), look, Reader(own, CLIENT, look))
    assert [holder.role for holder in found.allocations[0].holders] == ["owner"]
    assert len(found.readers) == 1


def test_who_was_not_seen_holds_nothing_that_is_known():
    found = view(published(1), Look("never", "running", "uid"), Reader(IMPORT, CLIENT, Look("never", "dead", "dead")))
    assert found.allocations[0].holders == ()
    assert (found.owner.gate, found.owner.mapped) == ("uid", 0)
    assert not found.readers[0].connected


@pytest.mark.parametrize("render", [False, True], ids=["view", "text"])
def test_it_grows_linearly(render: bool):
    """CPU time, the best of five: eight times the tensors take about eight times as long; a square would take 64."""

    def cost(count: int) -> float:
        record, owner, reader = published(count), seen(count, 1 << 20), seen(count, 1 << 40)
        took = []
        for _ in range(5):
            began = time.process_time()
            found = view(record, owner, Reader(IMPORT, CLIENT, reader))
            if render:
                assert sum(1 for _ in lines(found, 80)) > 5 * count
            took.append(time.process_time() - began)
        return min(took)

    assert cost(8000) < 24 * cost(1000)
