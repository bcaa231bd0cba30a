"""`etha.tensor_bus.ipc.cuda_export`: which kind a pointer is, one export per allocation, refusals with a remedy."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from fake_driver import GRANULARITY, FakeDriver

from etha.errors import DriverError, InvalidArgument, NotShareable, SystemLimit
from etha.tensor_bus.ipc import driver as api
from etha.tensor_bus.ipc.allocations import LegacyAllocation, VirtualAllocation
from etha.tensor_bus.ipc.cuda import Device
from etha.tensor_bus.ipc.cuda_export import Kind, classify, export
from etha.tensor_bus.ipc.manifest import validate
from etha.tensor_bus.ipc.shareable import Refusal

OWNER = b"the owning client"[:16]


@pytest.fixture
def driver():
    made = FakeDriver()
    yield made
    made.shut()


@pytest.fixture
def device(driver):
    made = Device(driver, driver.uuids[0])
    yield made
    made.close()


def tensor(address: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


def share(device: Device, **tensors: torch.Tensor):
    return export(device, OWNER, tensors, "cpu")


# -- classification ----------------------------------------------------------------------------------------------

KINDS = {
    "legacy": ({"IS_LEGACY_CAPABLE": 1}, Kind.LEGACY),
    "legacy that could go by fd too": ({"IS_LEGACY_CAPABLE": 1, "ALLOWED_HANDLE_TYPES": 1}, Kind.LEGACY),
    "fd": ({"ALLOWED_HANDLE_TYPES": api.HANDLE_TYPE_FD}, Kind.FD),
    "fd or fabric": ({"ALLOWED_HANDLE_TYPES": api.HANDLE_TYPE_FD | api.HANDLE_TYPE_FABRIC}, Kind.FD),
    "managed": ({"IS_MANAGED": 1}, "managed"),
    "managed that says legacy": ({"IS_MANAGED": 1, "IS_LEGACY_CAPABLE": 1}, "managed"),
    "pool": ({"MEMPOOL_HANDLE": 0xBEEF}, "pool"),
    "pool that says fd": ({"MEMPOOL_HANDLE": 0xBEEF, "ALLOWED_HANDLE_TYPES": api.HANDLE_TYPE_FD}, "pool"),
    "fabric only": ({"ALLOWED_HANDLE_TYPES": api.HANDLE_TYPE_FABRIC}, "fabric"),
    "no handle": ({"ALLOWED_HANDLE_TYPES": 0}, "without a way"),
    "pinned host memory": ({"MEMORY_TYPE": 1}, "host memory"),
    "another device": ({"DEVICE_ORDINAL": 1, "IS_LEGACY_CAPABLE": 1}, "another device"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_pointer_is_of_one_kind_or_refused_by_reason(name, driver, device):
    attributes, wanted = KINDS[name]
    address = driver.allocate(GRANULARITY, **attributes)
    with device.current():
        found = classify(device, address + 5)
    if isinstance(wanted, Kind):
        assert found is wanted
        return
    assert isinstance(found, Refusal)
    assert wanted in found.reason
    before = driver.left_open()
    with pytest.raises(NotShareable) as caught:
        share(device, w=tensor(address + 5, 8))
    assert caught.value.resource == "w"
    assert caught.value.remedy == found.remedy
    assert driver.left_open() == before


def test_memory_that_cuda_does_not_know_is_refused(device):
    with pytest.raises(NotShareable) as caught:
        share(device, w=torch.ones(3))
    assert caught.value.resource == "w"


def test_another_error_of_the_driver_is_no_refusal(driver, device):
    address = driver.allocate(GRANULARITY)
    driver.fail_at = len(driver.calls) + 2  # after the context was pushed
    with pytest.raises(DriverError):
        share(device, w=tensor(address, 8))


def test_refuses_what_no_backend_can_share(device):
    with pytest.raises(NotShareable, match="sparse"):
        share(device, w=torch.eye(3).to_sparse())
    with pytest.raises(InvalidArgument):
        export(device, OWNER, [torch.ones(1)], "cpu")
    with pytest.raises(InvalidArgument):
        export(device, b"too short", {}, "cpu")
    with pytest.raises(InvalidArgument):
        export(device, OWNER, {"": torch.ones(1)}, "cpu")


# -- one export per allocation -----------------------------------------------------------------------------------


def test_all_storages_in_one_allocation_share_one_handle(driver, device):
    address = driver.allocate(10 * GRANULARITY)
    tensors = {f"w{index}": tensor(address + 1024 * index, 512) for index in range(100)}
    exported = share(device, **tensors)
    (allocation,) = exported.manifest.allocations
    assert isinstance(allocation, LegacyAllocation)
    assert (allocation.size, allocation.device, allocation.owner) == (10 * GRANULARITY, driver.uuids[0], OWNER)
    assert [row.offset for row in exported.manifest.storages] == [1024 * index for index in range(100)]
    assert driver.calls.count("cuIpcGetMemHandle") == driver.calls.count("cuMemGetAddressRange") == 1
    assert exported.fds == ()


def test_an_allocation_that_comes_later_at_the_same_place_is_another(driver, device):
    address = driver.allocate(GRANULARITY)
    before = share(device, w=tensor(address, 8)).manifest.allocations
    driver.free(address)
    again = driver.allocate(GRANULARITY)
    after = share(device, w=tensor(again, 8)).manifest.allocations
    assert before[0].buffer != after[0].buffer
    assert before != after


def test_chunks_of_any_size_under_storages_and_no_others(driver, device):
    sizes = [GRANULARITY, 3 * GRANULARITY, GRANULARITY, 2 * GRANULARITY, GRANULARITY]
    base = driver.allocate_chunks(*sizes)
    ends = [sum(sizes[:index]) for index in range(6)]
    across = tensor(base + ends[1] - 10, 20)  # chunks 0 and 1
    inside = tensor(base + ends[1] + 100, 7)  # chunk 1
    alone = tensor(base + ends[3] + 1, 5)  # chunk 3
    exported = share(device, alone=alone, across=across, inside=inside)
    first, second = exported.manifest.allocations
    assert isinstance(first, VirtualAllocation)
    assert [chunk.size for chunk in first.chunks] == sizes[:2]
    assert [chunk.size for chunk in second.chunks] == sizes[3:4]
    assert exported.manifest.storages[0].offset == 1
    assert [row.allocation for row in exported.manifest.storages] == [1, 0, 0]
    assert exported.manifest.storages[1].offset == ends[1] - 10
    assert len(exported.fds) == len(exported.manifest.pieces) == 3
    files = [os.fstat(fd.fileno()).st_size for fd in exported.fds]
    assert files == [*sizes[:2], sizes[3]]
    assert not any(os.get_inheritable(fd.fileno()) for fd in exported.fds)
    assert driver.tables.handles == {}
    validate(exported.manifest)
    exported.close_fds()


def test_a_storage_beyond_its_allocation_is_refused(driver, device):
    address = driver.allocate(GRANULARITY)
    with pytest.raises(NotShareable) as caught:
        share(device, w=tensor(address + GRANULARITY - 4, 8))
    assert caught.value.resource == "w"


def test_a_storage_over_two_legacy_allocations_is_refused(driver, device):
    address = driver.allocate_chunks(GRANULARITY, GRANULARITY, IS_LEGACY_CAPABLE=1)
    with pytest.raises(NotShareable, match="reaches over the end") as caught:
        share(device, w=tensor(address + GRANULARITY - 4, 8))
    assert caught.value.resource == "w"


def test_too_many_descriptors_are_refused_before_one_is_made(driver, device, monkeypatch):
    base = driver.allocate_chunks(*[GRANULARITY] * 20)
    monkeypatch.setattr("resource.getrlimit", lambda _: (40, 40))
    with pytest.raises(SystemLimit) as caught:
        share(device, w=tensor(base, 20 * GRANULARITY))
    assert caught.value.resource == "RLIMIT_NOFILE"
    assert "cuMemExportToShareableHandle" not in driver.calls


# -- every call may fail -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["legacy", "fd"])
def test_each_call_of_an_export_failing_leaves_nothing_open(kind, driver, device):
    if kind == "legacy":
        made = [tensor(driver.allocate(GRANULARITY), 100) for _ in range(3)]
    else:
        made = [tensor(driver.allocate_chunks(*[GRANULARITY] * 3), 2 * GRANULARITY) for _ in range(2)]
    before = driver.left_open()
    failed = set()
    for k in range(1, 1000):
        start = len(driver.calls)
        driver.fail_at = start + k
        try:
            exported, kept = share(device, **{f"w{index}": each for index, each in enumerate(made)}), None
        except DriverError as error:
            exported, kept = None, error  # and with it every frame, as a caller's traceback does
        if len(driver.calls) - start < k:
            break
        failed.add(driver.calls[start + k - 1])
        driver.fail_at = 0
        if exported is not None:  # only a release failed: it is made good, and the export stands
            assert driver.calls[start + k - 1] == "cuMemRelease"
            exported.close_fds()
        device.drain()
        after = driver.left_open()
        if driver.calls[start + k - 1] == "cuCtxPopCurrent":
            driver.stack.clear()  # a thread whose context cannot be popped keeps it
            after["current"] = 0
        assert after == before, f"call {k}, {driver.calls[start + k - 1]}"
        assert (kept is None) != (exported is None)
    driver.fail_at = 0
    assert exported is not None
    exported.close_fds()
    assert "cuPointerGetAttribute" in failed
    assert ("cuMemExportToShareableHandle" if kind == "fd" else "cuIpcGetMemHandle") in failed
