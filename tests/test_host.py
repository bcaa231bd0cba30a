"""`etha.tensor_bus.ipc.host`: what is exported, what is refused, and what is opened again."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import resource
import signal
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from ipc_helpers import (
    GEOMETRIES,
    STRATEGIES,
    Named,
    child_with_socket,
    in_fork,
    mapped_addresses,
    python,
    raw,
    round_trip,
    shared,
    storage_bytes,
)

from etha.errors import InvalidArgument, InvalidRecord, NotShareable, StaleHandle, StorageMoved, SystemLimit
from etha.tensor_bus.ipc import host, libc, maps
from etha.tensor_bus.ipc.allocations import HostAllocation, LegacyAllocation
from etha.tensor_bus.ipc.backend import HOST
from etha.tensor_bus.ipc.descriptors import SharedFd, reserve_descriptors
from etha.tensor_bus.ipc.host import check_descriptor, export, open_allocation
from etha.tensor_bus.ipc.leftovers import remove_leftovers
from etha.tensor_bus.ipc.manifest import ITEMSIZE, MAX_NAME_BYTES
from etha.tensor_bus.ipc.process import start_time


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(request.param)
    yield request.param
    torch.multiprocessing.set_sharing_strategy(before)


def open_fds():
    gc.collect()  # what an earlier test left in a cycle must not close meanwhile
    return set(os.listdir("/proc/self/fd"))


# -- what is refused ---------------------------------------------------------------------------------------------


def nested_jagged():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(3)


class Wrapper(torch.Tensor):
    """A subclass whose memory is elsewhere."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (3,))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def quantized():
    make = torch._empty_affine_quantized
    return make([3], scale=1.0, zero_point=0, dtype=torch.qint8)


def copy_on_write():
    original = torch.ones(3)
    return original._lazy_clone()


def shrunk():
    tensor = shared(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def plain_file(tmp_path):
    return torch.from_file(str(tmp_path / "file"), shared=True, size=4)


def unnamed_memory():
    fd = os.memfd_create("etha-test")
    os.ftruncate(fd, 4096)
    memory = mmap.mmap(fd, 4096)
    os.close(fd)
    return torch.frombuffer(memory, dtype=torch.uint8)


REFUSED = {
    "an array": (lambda _: np.ones(3), "not a torch.Tensor"),
    "None": (lambda _: None, "not a torch.Tensor"),
    "private": (lambda _: torch.ones(3), "not in shared memory"),
    "of NumPy": (lambda _: torch.from_numpy(np.ones(3)), "not in shared memory"),
    "meta": (lambda _: torch.empty(3, device="meta"), "meta device"),
    "fake": (lambda _: fake(), "FakeTensor"),
    "coo": (lambda _: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    "csr": (lambda _: torch.eye(3).to_sparse_csr(), "layout torch.sparse_csr"),
    "nested": (lambda _: nested_jagged(), "nested"),
    "wrapper": (lambda _: Wrapper(), "dispatches for itself"),
    "lazy": (lambda _: torch.nn.LazyLinear(3).weight, "not initialised"),
    "quantized": (lambda _: quantized(), "quantized"),
    "bits": (lambda _: torch.empty(3, dtype=torch.bits8), "dtype torch.bits8"),
    "sub-byte": (lambda _: torch.empty(3, dtype=torch.uint4), "dtype torch.uint4"),
    "conjugated": (lambda _: torch.ones(3, dtype=torch.complex64).share_memory_().conj(), "conjugate"),
    "negated": (lambda _: torch.ones(3, dtype=torch.complex64).share_memory_().conj().imag, "negation"),
    "zero": (lambda _: torch._efficientzerotensor(3), "zero tensor"),
    "copy on write": (lambda _: copy_on_write(), "until one side writes"),
    "shrunk storage": (lambda _: shrunk(), "storage of 0"),
    "plain file": (lambda tmp_path: plain_file(tmp_path), "not in shared memory"),
    "unnamed memory": (lambda _: unnamed_memory(), "name is gone"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning", "ignore:Sparse CSR:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quint8.*:UserWarning", "ignore:.*invariant checks.*:UserWarning")
def test_refuses_by_name_with_reason_and_remedy_and_leaves_nothing_open(kind, tmp_path):
    make, reason = REFUSED[kind]
    tensors = {"fine": shared(2), "the culprit": make(tmp_path)}
    before = open_fds()
    with pytest.raises(NotShareable) as caught:
        export(tensors)
    assert caught.value.resource == "the culprit"
    assert reason in caught.value.message
    assert "'the culprit'" in caught.value.message
    assert caught.value.remedy
    assert open_fds() == before


def test_refuses_inside_a_transform():
    caught = []

    def look(row):
        with pytest.raises(NotShareable, match="no storage that can be reached") as error:
            export({"w": row})
        caught.append(error.value.resource)
        return row

    torch.vmap(look)(shared(2, 3))
    assert caught == ["w"]


@pytest.mark.parametrize(
    "tensors",
    [None, [("w", torch.ones(1))], torch.ones(1), {1: 2}, {"": 1}, {"x" * (MAX_NAME_BYTES + 1): 1}, {"\ud800": 1}],
)
def test_refuses_what_is_no_mapping_of_names(tensors):
    with pytest.raises(InvalidArgument) as caught:
        export(tensors)
    str(caught.value).encode()


@pytest.mark.parametrize("kind", ["absent", "fifo", "link", "other file"])
def test_refuses_memory_whose_name_leads_elsewhere(kind, tmp_path):
    # As in a mount namespace, or in the instant between the look at the mappings and the opening.
    path = str(tmp_path / "name")
    tensor = shared(3)
    torch_fd, _ = tensor.untyped_storage()._share_fd_cpu_()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        os.symlink(f"/proc/self/fd/{torch_fd}", path)
    elif kind == "other file":
        Path(path).write_bytes(b"x" * 64)
    region = maps.RegionTable(maps.read()).find(tensor.data_ptr(), 12)
    before = open_fds()
    with pytest.raises(NotShareable, match=r"cannot be opened|no longer") as caught:
        host._Source("w", region._replace(path=path, deleted=False), tensor.untyped_storage()).open()
    assert caught.value.resource == "w"
    assert open_fds() == before


def test_refuses_torch_memory_whose_name_was_removed_instead_of_moving_it():
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        tensor = shared(5)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    address = tensor.data_ptr()
    region = maps.RegionTable(maps.read()).find(address, 20)
    os.link(region.path, region.path + "-kept")
    os.unlink(region.path)
    try:
        with pytest.raises(NotShareable, match="name is gone"):
            export({"w": tensor})
        assert tensor.data_ptr() == address
    finally:
        # Torch ends the process when it cannot remove the name itself.
        os.rename(region.path + "-kept", region.path)


def test_refuses_a_file_truncated_under_its_tensor():
    memory = shared_memory.SharedMemory(create=True, size=8192)
    tensor = torch.frombuffer(memory.buf, dtype=torch.uint8)
    before = open_fds()
    try:
        os.truncate(f"/dev/shm/{memory.name}", 4096)
        with pytest.raises(NotShareable, match="truncated") as caught:
            export({"w": tensor})
        assert open_fds() == before  # also while the traceback still holds every frame
        del caught
    finally:
        del tensor
        memory.close()
        memory.unlink()


# -- what is accepted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_round_trip_of_every_geometry(kind, strategy):
    tensor = GEOMETRIES[kind]()
    with torch._C.DisableTorchFunction():
        address = tensor.untyped_storage().data_ptr()
        with round_trip({"w": tensor}) as trip:
            view = trip.views["w"]
            assert type(view) is torch.Tensor
            assert not view.requires_grad
            assert view.dtype is tensor.dtype
            assert view.shape == tensor.shape
            assert view.stride() == tensor.stride()
            assert view.storage_offset() == tensor.storage_offset()
            if tensor.numel() == 0:
                assert view.untyped_storage().nbytes() == 0
            else:
                assert view.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
                assert storage_bytes(view) == storage_bytes(tensor.detach())
                assert view.data_ptr() != tensor.data_ptr()
        assert tensor.untyped_storage().data_ptr() == address


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_round_trip_of_every_dtype(dtype, strategy):
    tensor = raw(dtype)
    with round_trip({"w": tensor}) as trip:
        view = trip.views["w"]
        assert view.dtype is getattr(torch, dtype)
        assert view.shape == tensor.shape
        assert storage_bytes(view) == bytes(range(48))


def test_a_view_is_the_owners_memory(strategy):
    tensor = shared(1000)
    with round_trip({"w": tensor}) as trip:
        tensor.fill_(7)
        assert trip.views["w"].eq(7).all()
        regions = maps.RegionTable(maps.read())
        owner, reader = (regions.find(each.data_ptr(), 4000) for each in (tensor, trip.views["w"]))
        assert owner.start != reader.start
        assert (owner.device, owner.inode) == (reader.device, reader.inode)


def test_tied_stays_tied_and_shared_storages_are_one(strategy):
    weight, other = shared(4, 4), shared(2)
    tensors = {"embed": weight, "other": other, "head": weight, "row": weight[1], "same": weight.detach()}
    with round_trip(tensors) as trip:
        manifest, views = trip.export.manifest, trip.views
        assert list(views) == list(tensors)
        assert views["embed"] is views["head"]
        assert views["embed"] is not views["same"]
        for name in ("row", "same"):
            assert views[name].untyped_storage().data_ptr() == views["embed"].untyped_storage().data_ptr()
        assert (len(manifest.tensors), len(manifest.storages), len(manifest.allocations)) == (4, 2, 2)
        assert manifest.nbytes == 64 + 8
        weight[1, 1] = -5
        assert views["row"][1] == -5


def test_two_storages_in_one_file_are_one_allocation():
    memory = shared_memory.SharedMemory(create=True, size=8192)
    first = torch.frombuffer(memory.buf, dtype=torch.int32, count=10)
    second = torch.frombuffer(memory.buf, dtype=torch.uint8, count=3, offset=4097)
    try:
        second.copy_(torch.tensor([1, 2, 3], dtype=torch.uint8))
        with round_trip({"first": first, "second": second}) as trip:
            assert trip.export.manifest.storages[0].offset == 0
            assert trip.export.manifest.storages[1].offset == 4097
            assert len(trip.export.fds) == len(trip.table) == 1
            assert trip.views["second"].tolist() == [1, 2, 3]
    finally:
        del first, second
        memory.close()
        memory.unlink()


def test_a_mapping_that_the_kernel_split_is_still_one():
    tensor = torch.zeros(3 * mmap.PAGESIZE, dtype=torch.uint8).share_memory_()
    libc_madvise = ctypes.CDLL(None).madvise
    middle = ctypes.c_void_p(tensor.data_ptr() + mmap.PAGESIZE)
    assert libc_madvise(middle, ctypes.c_size_t(mmap.PAGESIZE), mmap.MADV_DONTFORK) == 0
    inode = maps.RegionTable(maps.read()).find(tensor.data_ptr(), 1).inode
    assert sum(f" {inode} " in line for line in Path("/proc/self/maps").read_text().splitlines()) == 3
    with round_trip({"w": tensor}) as trip:
        assert trip.views["w"].shape == tensor.shape


@pytest.mark.parametrize("kernel", ["answers", "is older"])
def test_a_region_asked_for_is_the_one_in_the_table(kernel: str, strategy):
    tensors = [shared(100), shared(3000)]
    spread = torch.zeros(3 * mmap.PAGESIZE, dtype=torch.uint8).share_memory_()
    second_page = ctypes.c_void_p(spread.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE + mmap.PAGESIZE)
    assert ctypes.CDLL(None).madvise(second_page, ctypes.c_size_t(mmap.PAGESIZE), mmap.MADV_DONTFORK) == 0
    ranges = [(tensor.data_ptr(), tensor.nbytes) for tensor in (*tensors, spread)]
    private = torch.ones(1 << 20)
    before = open_fds()
    table = maps.RegionTable(maps.read())
    with maps.OwnRegions() as regions:
        regions._answers = kernel == "answers"
        assert [regions.find(*each) for each in ranges] == [table.find(*each) for each in ranges]
        assert regions.find(ranges[0][0], 1 << 40) is None
        assert regions.find(private.data_ptr(), 4) is None
    assert open_fds() == before


def test_one_region_is_found_without_reading_them_all(monkeypatch: pytest.MonkeyPatch):
    tensor = shared(100)
    expected = maps.RegionTable(maps.read()).find(tensor.data_ptr(), 400)
    with maps.OwnRegions() as regions:
        if regions._ask(tensor.data_ptr()) is None:
            pytest.skip("this kernel has no PROCMAP_QUERY (Linux 6.11)")
        monkeypatch.setattr(maps, "read", lambda: pytest.fail("the whole table was read"))
        assert regions.find(tensor.data_ptr(), 400) == expected


def test_an_export_of_nothing():
    with round_trip({}) as trip:
        assert trip.views == {}


def test_another_process_sees_the_same(tmp_path, strategy):
    tensors = {kind: make() for kind, make in GEOMETRIES.items()} | {dtype: raw(dtype) for dtype in ITEMSIZE}
    tensors["tied"] = tensors["contiguous"]
    exported = export(tensors)
    (tmp_path / "manifest").write_bytes(msgspec.msgpack.encode(exported.manifest))
    code = """
import hashlib, msgspec, sys, torch
from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.ipc.mapping import import_memory
from etha.tensor_bus.ipc.view import build_views
manifest = msgspec.msgpack.decode(open(sys.argv[1], "rb").read(), type=Manifest)
views = build_views(manifest, import_memory(manifest, list(map(int, sys.argv[2].split(",")))))
for name, view in views.items():
    flat = torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage()).tolist()
    print(name, view.dtype, tuple(view.shape), view.stride(), view.storage_offset(), bytes(flat).hex())
print(views["tied"] is views["contiguous"])
"""
    code = code.replace('open(sys.argv[1], "rb").read()', "__import__('pathlib').Path(sys.argv[1]).read_bytes()")
    fds = tuple(fd.fileno() for fd in exported.fds)
    done = python(code, str(tmp_path / "manifest"), ",".join(map(str, fds)), fds=fds)
    assert done.stderr == ""
    expected = []
    with torch._C.DisableTorchFunction():
        for name, tensor in tensors.items():
            held = storage_bytes(tensor.detach()) if tensor.numel() else b""
            shape = tuple(tensor.shape)
            expected.append(
                f"{name} {tensor.dtype} {shape} {tensor.stride()} {tensor.storage_offset()} {held.hex()}".rstrip()
            )
    assert [line.rstrip() for line in done.stdout.splitlines()] == [*expected, "True"]
    exported.close_fds()


def test_asks_for_nothing_but_the_memory(strategy):
    # With a default device, or a mode, torch's functions answer for other tensors than those that are shared.
    tensor = shared(6)
    with torch.device("meta"), torch.inference_mode(), round_trip({"w": tensor}) as trip:
        trip.export.check()
        assert trip.views["w"].device.type == "cpu"
        assert not trip.views["w"].is_inference()
        assert trip.views["w"].tolist() == tensor.tolist()


# -- descriptors -------------------------------------------------------------------------------------------------


def test_descriptors_are_torchs_own_or_closed(strategy):
    tensors = {"a": shared(3), "b": shared(4)}
    before = open_fds()
    exported = export(tensors)
    for fd, allocation in zip(exported.fds, exported.manifest.allocations, strict=True):
        assert fd.owned == (strategy == "file_system")
        assert os.fstat(fd.fileno()).st_ino == allocation.inode
        assert not os.get_inheritable(fd.fileno()) or not fd.owned
    exported.close_fds()
    exported.close_fds()
    with pytest.raises(ValueError, match="closed"):
        exported.fds[0].fileno()
    assert open_fds() == before
    tensors["a"].fill_(1)
    with round_trip(tensors) as trip:
        assert trip.views["a"].tolist() == [1, 1, 1]


def test_a_dropped_export_leaves_no_descriptor():
    before = open_fds()
    fd = SharedFd(os.open("/dev/null", os.O_RDONLY), owned=True)
    assert open_fds() != before
    del fd
    assert open_fds() == before


def test_raises_the_soft_limit_or_says_what_is_missing():
    def body():
        held = len(open_fds())
        soft, hard = held + 50, held + 200
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        reserve_descriptors(1)
        unchanged = resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
        reserve_descriptors(100)
        raised = resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        try:
            reserve_descriptors(0, hard + 1)
        except SystemLimit as error:
            return unchanged, raised, error.resource
        return None

    assert in_fork(body) == repr((True, True, "RLIMIT_NOFILE"))


def test_makes_room_when_every_descriptor_is_taken():
    def body():
        held = len(open_fds())
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 4, held + 200))
        reserve = reserve_descriptors
        try:
            while True:
                os.dup(0)
        except OSError:
            reserve(10)
        return os.dup(0) > 0

    assert in_fork(body) == "True"


def test_an_export_beyond_the_limit_is_refused_before_anything_is_opened():
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        tensors = {str(index): shared(1) for index in range(100)}
    finally:
        torch.multiprocessing.set_sharing_strategy(before)

    def body():
        held = len(open_fds())
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 50, held + 50))
        try:
            export(tensors)
        except SystemLimit as error:
            return error.resource, len(open_fds()) == held
        return None

    assert in_fork(body) == repr(("RLIMIT_NOFILE", True))


def test_an_export_raises_the_soft_limit_when_it_must():
    tensors = {str(index): shared(1) for index in range(20)}

    def body():
        held = len(open_fds())
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 10, held + 500))
        exported = export(tensors)
        return len(exported.fds), resource.getrlimit(resource.RLIMIT_NOFILE)[0] == held + 500

    assert in_fork(body) == repr((20, True))


# -- the pin -----------------------------------------------------------------------------------------------------


def replace_data(parameter):
    parameter.data = shared(4)


def move_to_private(parameter):
    parameter.data = parameter.data.clone()


def resize_storage(parameter):
    parameter.untyped_storage().resize_(0)


def shift(parameter):
    parameter.data = parameter.data[1:]


@pytest.mark.parametrize("move", [replace_data, move_to_private, resize_storage, shift])
def test_names_what_moved(move, strategy):
    tensors = {"first": torch.nn.Parameter(shared(4)), "moved": torch.nn.Parameter(shared(4)), "last": shared(4)}
    exported = export(tensors)
    exported.check()
    with torch.no_grad():
        move(tensors["moved"])
    with pytest.raises(StorageMoved) as caught:
        exported.check()
    assert caught.value.resource == "moved"
    assert caught.value.remedy
    exported.close_fds()


def test_names_what_was_set_to_other_memory():
    tensors = {"first": shared(4), "moved": shared(4)}
    exported = export(tensors)
    tensors["moved"].set_(shared(4))
    with pytest.raises(StorageMoved) as caught:
        exported.check()
    assert caught.value.resource == "moved"


def test_an_empty_tensor_that_gets_bytes_has_moved():
    tensors = {"empty": torch.empty(0)}
    exported = export(tensors)
    exported.check()
    tensors["empty"].set_(shared(3))
    with pytest.raises(StorageMoved):
        exported.check()


def test_names_the_tensor_of_a_storage_resized_beyond_its_elements():
    whole = torch.zeros(8192, dtype=torch.uint8).share_memory_()
    memory = shared_memory.SharedMemory(create=True, size=64)
    part = torch.frombuffer(memory.buf, dtype=torch.uint8)
    exported = export({"whole": whole, "part": part})
    try:
        exported._sizes[1] += 1
        with pytest.raises(StorageMoved, match="resized") as caught:
            exported.check()
        assert caught.value.resource == "part"
    finally:
        exported.close_fds()
        del exported, part, caught
        memory.close()
        memory.unlink()


def test_the_pin_keeps_the_bytes_that_were_exported(strategy):
    parameter = torch.nn.Parameter(shared(4))
    with round_trip({"w": parameter}) as trip:
        parameter.data = torch.zeros(4)
        assert trip.views["w"].tolist() == [0, 1, 2, 3]
        address = trip.export._storages[0].data_ptr()
        assert maps.RegionTable(maps.read()).find(address, 16) is not None


def test_a_subclass_is_not_asked_where_it_lies(strategy):
    exported = export({"w": Named(shared(3))})
    exported.check()
    exported.close_fds()


def test_in_place_work_is_no_move(strategy):
    parameter = torch.nn.Parameter(shared(3, 3))
    exported = export({"w": parameter})
    parameter.sum().backward()
    torch.optim.SGD([parameter], lr=0.1).step()
    parameter.data.t_()
    exported.check()
    exported.close_fds()


# -- opening -----------------------------------------------------------------------------------------------------


def memory_file(size):
    fd = os.memfd_create("etha-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    status = os.fstat(fd)
    return fd, HostAllocation(status.st_dev, status.st_ino, size)


@pytest.fixture
def file_of_two_pages():
    fd, allocation = memory_file(8192)
    yield fd, allocation
    os.close(fd)


def test_opens_exactly_what_is_claimed(file_of_two_pages):
    fd, allocation = file_of_two_pages
    os.pwrite(fd, b"etha", 8188)
    mapping = open_allocation(fd, allocation)
    assert mapping.size == 8192
    assert ctypes.string_at(mapping.address + 8188, 4) == b"etha"
    address = mapping.address
    mapping.close()
    mapping.close()
    assert mapping.address == 0
    assert address not in mapped_addresses("etha-test")


def test_a_writable_mapping_writes(file_of_two_pages):
    fd, allocation = file_of_two_pages
    mapping = open_allocation(fd, allocation, writable=True)
    ctypes.memset(mapping.address, 65, 3)
    mapping.close()
    assert os.pread(fd, 4, 0) == b"AAA\0"


def test_refuses_a_file_shorter_than_claimed(file_of_two_pages):
    fd, allocation = file_of_two_pages
    os.ftruncate(fd, 8191)
    before = mapped_addresses()
    with pytest.raises(InvalidRecord, match="shorter than claimed"):
        open_allocation(fd, allocation)
    assert mapped_addresses("etha-test") == set()
    assert len(mapped_addresses()) <= len(before) + 2


@pytest.mark.parametrize("field", ["device", "inode"])
def test_refuses_another_file(file_of_two_pages, field):
    fd, allocation = file_of_two_pages
    wrong = msgspec.structs.replace(allocation, **{field: getattr(allocation, field) + 1})
    with pytest.raises(StaleHandle):
        open_allocation(fd, wrong)
    with pytest.raises(StaleHandle):
        check_descriptor(fd, wrong)


def test_refuses_what_is_no_file_of_memory():
    read, write = os.pipe()
    try:
        status = os.fstat(read)
        with pytest.raises(InvalidRecord, match="no regular file"):
            open_allocation(read, HostAllocation(status.st_dev, status.st_ino, 1))
    finally:
        os.close(read)
        os.close(write)


def test_refuses_a_descriptor_that_may_not_be_mapped(file_of_two_pages):
    fd, allocation = file_of_two_pages
    for flags in (os.O_WRONLY, os.O_PATH):
        other = os.open(f"/proc/self/fd/{fd}", flags)
        try:
            with pytest.raises(InvalidRecord, match="cannot be mapped"):
                open_allocation(other, allocation)
        finally:
            os.close(other)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        open_allocation(read_only, allocation).close()
        with pytest.raises(InvalidRecord, match="cannot be mapped"):
            open_allocation(read_only, allocation, writable=True)
    finally:
        os.close(read_only)


def test_says_when_the_address_space_ran_out():
    size = 2**44
    fd, allocation = memory_file(size)

    def body():
        resource.setrlimit(resource.RLIMIT_AS, (2**43, 2**43))
        try:
            open_allocation(fd, allocation)
        except SystemLimit as error:
            return error.resource
        return None

    try:
        assert in_fork(body) == repr("mappings or address space")
    finally:
        os.close(fd)


def test_a_forked_child_has_no_mapping(file_of_two_pages):
    fd, allocation = file_of_two_pages
    mapping = open_allocation(fd, allocation)
    assert mapping.address in mapped_addresses("etha-test")
    assert in_fork(lambda: mapped_addresses("etha-test")) == repr(set())
    mapping.close()


def test_knows_no_error_but_those_of_limits():
    assert libc.system_limit(PermissionError(13, "no"), "looking") is None
    assert libc.system_limit(OSError("no number"), "looking") is None
    assert libc.system_limit(OSError(24, "too many"), "opening").resource == "RLIMIT_NOFILE"


def test_unmapping_what_is_no_mapping_is_an_error():
    with pytest.raises(OSError, match="unmapping"):
        libc.unmap(1, 4096)


# -- the seam, and the layers ------------------------------------------------------------------------------------


def test_the_backend_of_the_host():
    exported = HOST.export({"w": shared(3)})
    fds = [exported.fds[0].fileno()]
    opened = HOST.open_allocation(exported.manifest.allocations[0], fds)
    assert (HOST.kind, opened.size, HOST.settle()) == ("cpu", 12, True)
    opened.close()
    of_a_device = LegacyAllocation(b"d" * 16, b"o" * 16, 1, b"h" * 64, 12)
    for wrong, some in ((of_a_device, []), (of_a_device, fds), (exported.manifest.allocations[0], [])):
        with pytest.raises(InvalidRecord):
            HOST.open_allocation(wrong, some)
        with pytest.raises(InvalidRecord):
            HOST.check_descriptors(wrong, some)


def test_no_module_imports_torch_or_numpy():
    code = """
import pkgutil, sys
import etha.tensor_bus.ipc as package
for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    __import__(module.name)
sys.exit(bool({"torch", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_storage_received_from_torch_multiprocessing_can_be_shared_again(strategy):
    # What a data loader's worker made belongs to the receiver too, and its file bears the sender's pid.
    context = torch.multiprocessing.get_context("fork")
    queue, received = context.SimpleQueue(), context.Event()

    def send():
        queue.put(torch.arange(5))
        received.wait(60)

    worker = context.Process(target=send)
    worker.start()
    tensor = queue.get()
    received.set()
    worker.join()
    with round_trip({"w": tensor}) as trip:
        tensor[0] = 9
        assert trip.views["w"].tolist() == [9, 1, 2, 3, 4]


# -- what the dead leave -----------------------------------------------------------------------------------------

LEAVE = """
for name in sys.argv[2].split(","):
    with open(f"/dev/shm/torch_{os.getpid()}_{name}", "wb") as file:
        file.write(b"x" * 4096)
sock.send(b"done")
sock.recv(1)
"""


@pytest.fixture
def dead(tmp_path):
    """A process that left two files of torch's kind, reaped; with one file of a neighbour's."""
    with child_with_socket(LEAVE, tmp_path, "1_0,2_1") as (child, sock):
        assert sock.recv(10) == b"done"
        started = start_time(child.pid)
        child.send_signal(signal.SIGKILL)
        child.wait()
    neighbour = f"/dev/shm/torch_{child.pid}0_1_0"
    with open(neighbour, "wb"):
        pass
    paths = [f"/dev/shm/torch_{child.pid}_1_0", f"/dev/shm/torch_{child.pid}_2_1"]
    yield child.pid, started, paths
    assert os.path.exists(neighbour)
    for path in [neighbour, *paths]:
        if os.path.exists(path):
            os.unlink(path)


def test_removes_what_a_dead_process_left(dead):
    pid, started, paths = dead
    assert remove_leftovers(pid, os.getuid(), started) == paths
    assert not any(map(os.path.exists, paths))
    assert remove_leftovers(pid, os.getuid(), started) == []


def test_keeps_what_is_open_or_mapped_or_of_another_user(dead):
    pid, started, paths = dead
    assert remove_leftovers(pid, os.getuid() + 1, started) == []
    with open(paths[0], "rb+") as file:
        assert remove_leftovers(pid, os.getuid(), started) == [paths[1]]
        memory = mmap.mmap(file.fileno(), 4096)
    # mmap keeps a descriptor of its own, so the mapping alone is looked at through libc.
    memory.close()
    fd = os.open(paths[0], os.O_RDONLY)
    address = libc.map_shared(fd, 4096, writable=False)
    os.close(fd)
    assert remove_leftovers(pid, os.getuid(), started) == []
    libc.unmap(address, 4096)
    assert remove_leftovers(pid, os.getuid(), started) == [paths[0]]


def test_keeps_what_belongs_to_a_living_process_or_one_that_got_its_pid(tmp_path):
    with child_with_socket(LEAVE, tmp_path, "1_0") as (child, sock):
        assert sock.recv(10) == b"done"
        path = f"/dev/shm/torch_{child.pid}_1_0"
        started = start_time(child.pid)
        assert remove_leftovers(child.pid, os.getuid(), started) == []
        assert remove_leftovers(child.pid, os.getuid(), started - 1) == []
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert remove_leftovers(child.pid, os.getuid(), started - 1) == []
        assert remove_leftovers(child.pid, os.getuid(), started) == [path]


def test_maps_of_every_shape():
    lines = [
        b"7f00-7f10 rw-s 00002000 00:1b 504                        /dev/shm/torch_1_2_3 (deleted)\n",
        b"7f10-7f20 r--s 00002010 00:1b 504                        /dev/shm/torch_1_2_3 (deleted)",
        b"7f20-7f30 rw-s 00000000 fe:00 9                          /tmp/a name (deleted) kept",
        b"7f30-7f40 rw-p 00000000 00:1b 5                          /dev/shm/private",
        b"7f40-7f50 rw-p 00000000 00:00 0 ",
        b"7f50-7f60 r-xp 00000000 00:00 0                          [vdso]",
    ]
    first, second = maps.parse(b"\n".join(line.rstrip(b"\n") for line in lines) + b"\n")
    assert first == (0x7F00, 0x7F20, 0x2000, os.makedev(0, 0x1B), 504, "/dev/shm/torch_1_2_3", True)
    assert (second.path, second.deleted) == ("/tmp/a name (deleted) kept", False)
    table = maps.RegionTable([first, second])
    assert table.find(0x7F00, 0x20) is first
    assert table.find(0x7F00, 0x21) is None
    assert table.find(0x7EFF, 1) is None
    assert table.find(0x7F2F, 1) is second
    assert table.find(0x7F30, 0) is second
