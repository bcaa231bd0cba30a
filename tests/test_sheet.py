"""`etha.cli.sheet`: a publication as text, for a terminal and for ``grep``."""

from __future__ import annotations

import pytest
from test_anatomy import CLIENT, IMPORT, seen

from etha.cli.anatomy import Anatomy, Look, Owner, Reader, anatomy
from etha.cli.sheet import lines, printable
from etha.tensor_bus.ipc.allocations import HostAllocation
from etha.tensor_bus.ipc.manifest import Manifest, Storage, TensorSpec
from etha.tensor_bus.state import ClaimRecord, PublicationRecord, VersionRecord

LONG = "model.layers.31.self_attn.q_proj.weight"
LEASE = ClaimRecord("lease", True, 1, "policy", 3, 33, 34, "pid 33 (eval.py)", 7.5)
UPDATE = ClaimRecord("update", False, 1, "policy", None, 22, 22, "pid 22 (train.py)", 9.0)


def view(names: dict[str, int], owner: Look | None = None) -> Anatomy:
    manifest = Manifest(
        (HostAllocation(25, 4711, 1 << 26),),
        (Storage(0, 0, 1 << 26), Storage(-1, 0, 0)),
        (
            TensorSpec(0, "bfloat16", (4096, 4096), (4096, 1), 0),
            TensorSpec(0, "bfloat16", (4096, 4096), (1, 4096), 0),
            TensorSpec(1, "float32", (0, 3), (3, 1), 0),
        ),
        names,
    )
    return anatomy(
        1,
        PublicationRecord("policy", b"o" * 16, 22, "pid 22 (train.py)", manifest, 2.0, 1 << 63, 0, 1),
        VersionRecord(3, "ready", 3, True, True, 9.0, "ready", False, False),
        Owner(CLIENT, owner or seen(1, 0x7F0000000000)),
        [Reader(IMPORT, CLIENT, seen(1, 0x7E0000000000))],
        [LEASE, UPDATE],
        "cpu",
        10.0,
    )


NAMES = {LONG: 0, "transposed": 1, "tied": 0, "nothing": 2}


def test_no_line_is_wider_than_a_terminal():
    text = list(lines(view(NAMES), 80))
    assert max(map(len, text)) <= 80
    assert LONG in text


def test_one_line_per_tensor_where_there_is_room():
    for text in (list(lines(view(NAMES), None)), list(lines(view(NAMES), 200))):
        (row,) = [line for line in text if line.endswith(f"(4096,1)  {LONG}")]
        assert row.split() == ["#0", "0", "33554432", "bfloat16", "[4096,4096]", "(4096,1)", LONG]
        (empty,) = [line for line in text if line.endswith("nothing")]
        assert empty.split() == ["-", "-", "0", "float32", "[0,3]", "(3,1)", "nothing"]


def test_what_is_tied_and_what_is_shared_is_said():
    text = list(lines(view(NAMES), None))
    assert any(line.endswith(f"  tied = {LONG}") for line in text)
    (place,) = [number for number, line in enumerate(text) if line.endswith("2 tensors")]
    assert text[place + 1 : place + 3] == [f"    {LONG}", "    transposed"]


def test_who_holds_and_who_waits():
    text = "\n".join(lines(view(NAMES), None))
    assert "owner pid 22 7f0000000000-7f0000001000" in text
    assert "reader pid 33 7e0000000000-7e0000001000" in text
    assert "lease on version 3 · 2.5 s" in text
    assert "pid 22 (train.py) thread 22 · waits: update" in text


def test_a_gate_is_named_and_an_old_look_is_not_taken_for_a_new_one():
    old = Look("at registration", "running", "dumpable", seen(1, 0x1000).mappings, ((5,),))
    text = "\n".join(lines(view(NAMES, old), 80))
    assert "hidden by dumpable" in text
    assert "as at its registration" in text
    assert "fd 5" in text


@pytest.mark.parametrize(("name", "shown"), [("w\x1b[2J", "w?[2J"), ("a\nb", "a?b"), ("ünï.0", "ünï.0")])
def test_a_name_cannot_act_on_the_terminal(name: str, shown: str):
    assert printable(name) == shown
    assert any(line.endswith(shown) for line in lines(view({name: 0, "b": 1, "c": 2}), None))
    assert not any("\x1b" in line or "\n" in line for line in lines(view({name: 0, "b": 1, "c": 2}), 80))
