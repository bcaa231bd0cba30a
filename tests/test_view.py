"""`etha.tensor_bus.ipc.view`: tensors over mapped bytes."""

from __future__ import annotations

import faulthandler
import signal

import msgspec
import pytest
import torch
from ipc_helpers import in_fork, python, raw, round_trip, shared

from etha.errors import InvalidRecord, LeaseReleased
from etha.tensor_bus.ipc import view as view_module
from etha.tensor_bus.ipc.manifest import TensorSpec
from etha.tensor_bus.ipc.view import build_views


def test_a_storage_ends_where_the_owners_ends():
    with round_trip({"w": shared(5), "row": shared(4, 4)[1]}) as trip:
        assert trip.views["w"].untyped_storage().nbytes() == 20
        assert trip.views["row"].untyped_storage().nbytes() == 64
        assert trip.views["row"].tolist() == [4, 5, 6, 7]
        with pytest.raises(RuntimeError, match="out of bounds"):
            trip.views["w"].as_strided((6,), (1,))


def test_each_call_makes_views_of_its_own_and_counts_them():
    with round_trip({"w": shared(5)}) as trip:
        again = build_views(trip.export.manifest, trip.imported)
        assert again["w"] is not trip.views["w"]
        trip.views.clear()
        trip.imported.close()
        trip.table.reap()
        assert trip.imported.live
        assert again["w"].tolist() == [0, 1, 2, 3, 4]
        del again
        trip.table.reap()
        assert not trip.imported.live


def test_a_slice_keeps_the_memory_of_its_storage():
    with round_trip({"w": shared(5)}) as trip:
        kept = trip.views["w"][3:].view(torch.int32)
        trip.views.clear()
        trip.imported.close()
        assert trip.table.reap() == 0
        assert kept.view(torch.float32).tolist() == [3, 4]
        del kept
        assert trip.table.reap() == 1


def test_no_views_of_a_closed_import():
    with round_trip({"w": shared(5)}) as trip:
        trip.imported.close()
        with pytest.raises(LeaseReleased):
            build_views(trip.export.manifest, trip.imported)


@pytest.mark.parametrize("dtype", ["float33", "load", "float", "qint8"])
def test_names_the_tensor_whose_dtype_this_torch_lacks(dtype, monkeypatch):
    monkeypatch.setitem(view_module.ITEMSIZE, "float33", 4)
    with round_trip({"fine": shared(2), "future": shared(2)}) as trip:
        specs = trip.export.manifest.tensors
        manifest = msgspec.structs.replace(
            trip.export.manifest, tensors=(specs[0], msgspec.structs.replace(specs[1], dtype=dtype))
        )
        with pytest.raises(InvalidRecord, match="does not have") as caught:
            build_views(manifest, trip.imported)
        assert caught.value.resource == "future"
        del caught


def test_names_the_tensor_whose_geometry_torch_refuses():
    # validate() refuses this already; here torch is the second gate.
    with round_trip({"w": shared(2)}) as trip:
        wrong = TensorSpec(0, "float32", (2**40, 2**40), (0, 0), 0)
        with pytest.raises(InvalidRecord, match="geometry") as caught:
            build_views(msgspec.structs.replace(trip.export.manifest, tensors=(wrong,)), trip.imported)
        assert caught.value.resource == "w"
        del caught


def test_views_take_part_in_autograd_of_the_reader():
    with round_trip({"w": shared(3)}) as trip:
        x = torch.ones(3, requires_grad=True)
        (trip.views["w"] * x).sum().backward()
        assert x.grad.tolist() == [0, 1, 2]
        assert not trip.views["w"].requires_grad


WRITE = """
import torch
from etha.tensor_bus.ipc.host import export
from etha.tensor_bus.ipc.mapping import import_memory
from etha.tensor_bus.ipc.view import build_views
tensor = torch.zeros(4).share_memory_()
exported = export({"w": tensor})
views = build_views(exported.manifest, import_memory(exported.manifest, [fd.fileno() for fd in exported.fds]))
tensor[0] = 1
print(views["w"].tolist(), flush=True)
views["w"][0] = 2
print("written")
"""


def test_a_write_ends_the_process():
    done = python(WRITE)
    assert done.returncode == -signal.SIGSEGV
    assert done.stdout == "[1.0, 0.0, 0.0, 0.0]\n"


def test_a_view_is_nothing_in_a_forked_child():
    with round_trip({"w": shared(3)}) as trip:

        def body():
            faulthandler.disable()  # the fault is what is expected
            return trip.views["w"].tolist()

        with pytest.raises(ChildProcessError, match=f"status {int(signal.SIGSEGV)}:"):
            in_fork(body)


def test_complex32_is_viewed_without_a_warning():
    # Torch warns of it once in a process, so only a new one can tell.
    code = WRITE.replace(
        "torch.zeros(4).share_memory_()", "torch.zeros(4, dtype=torch.int32).share_memory_().view(torch.chalf)"
    )
    code = code[: code.index("tensor[0] = 1")] + "print(views['w'].dtype)"
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch.complex32\n", "")


def test_dtype_and_itemsize_place_the_offset():
    with round_trip({"w": raw("complex128")[1:]}) as trip:
        assert trip.export.manifest.tensors[0].offset == 16
        assert trip.views["w"].storage_offset() == 1
