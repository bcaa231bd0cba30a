"""`etha.tensor_bus.ipc.mapping`: one mapping per allocation, open as long as anyone looks, closed only at a call."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import threading
import weakref

import msgspec
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from ipc_helpers import in_fork, mapped_addresses, python, round_trip, shared

from etha.errors import InvalidArgument, InvalidRecord, LeaseReleased, StaleHandle
from etha.tensor_bus.ipc.allocations import HostAllocation
from etha.tensor_bus.ipc.backend import HostBackend
from etha.tensor_bus.ipc.host import export
from etha.tensor_bus.ipc.manifest import Manifest, Storage, TensorSpec
from etha.tensor_bus.ipc.mapping import TABLE, ImportedMemory, MappingTable, import_memory
from etha.tensor_bus.ipc.view import build_views

NAME = "etha-mapping"


class File:
    """A memory file of two pages, with its claim."""

    def __init__(self, size=8192):
        self.fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        os.pwrite(self.fd, bytes(range(256)), 0)
        status = os.fstat(self.fd)
        self.allocation = HostAllocation(status.st_dev, status.st_ino, size)

    def manifest(self):
        return Manifest(
            (self.allocation,),
            (Storage(0, 0, 4096), Storage(0, 4096, 4096)),
            (TensorSpec(0, "uint8", (4096,), (1,), 0), TensorSpec(1, "uint8", (4096,), (1,), 0)),
            {"a": 0, "b": 1},
        )


@pytest.fixture
def file():
    made = File()
    yield made
    os.close(made.fd)


@pytest.fixture
def table():
    """A table of one's own; what a test leaves mapped, it is told."""
    made = MappingTable()
    yield made
    gc.collect()
    made.reap()
    assert len(made) == 0
    assert mapped_addresses(NAME) == set()


def test_maps_once_and_unmaps_with_the_last_reference(table, file):
    first = table.open(file.allocation, [file.fd])
    second = table.open(file.allocation, [file.fd])
    assert first is second
    assert mapped_addresses(NAME) == {first.address}
    assert (len(table), first.size) == (1, 8192)
    table.release(first)
    assert mapped_addresses(NAME) == {first.address}
    table.release(first)
    assert mapped_addresses(NAME) == set()
    assert (len(table), first.address) == (0, 0)


def test_a_release_too_many_takes_nothing_from_a_later_mapping(table, file):
    first = table.open(file.allocation, [file.fd])
    table.release(first)
    second = table.open(file.allocation, [file.fd])
    table.release(first)
    assert mapped_addresses(NAME) == {second.address}
    table.release(second)


def test_the_second_descriptor_is_checked_too(table, file):
    mapping = table.open(file.allocation, [file.fd])
    other = File()
    with pytest.raises(StaleHandle):
        table.open(file.allocation, [other.fd])
    os.close(other.fd)
    os.ftruncate(file.fd, 4096)
    with pytest.raises(InvalidRecord, match="shorter"):
        table.open(file.allocation, [file.fd])
    table.release(mapping)
    assert len(table) == 0


def test_a_file_that_grew_is_mapped_anew(table, file):
    small = table.open(file.allocation, [file.fd])
    os.ftruncate(file.fd, 2**20)
    grown = table.open(msgspec.structs.replace(file.allocation, size=2**20), [file.fd])
    assert grown is not small
    assert table.buffer(grown, 2**20 - 1, 1)[0] == 0
    table.release(small)
    table.release(grown)


def test_uses_the_backend_it_is_given(table, file):
    asked = []

    class Elsewhere:
        address, size = 4096, 8192

        def close(self):
            asked.append("close")

    class Backend(HostBackend):
        def check_descriptors(self, allocation, fds):
            asked.append("check")

        def open_allocation(self, allocation, fds):
            asked.append("open")
            return Elsewhere()

    mapping = table.open(file.allocation, [], Backend())
    assert table.open(file.allocation, [], Backend()).address == 4096
    table.release(mapping)
    table.release(mapping)
    assert asked == ["open", "check", "close"]


def test_a_failed_opening_leaves_nothing(table, file):
    with pytest.raises(StaleHandle):
        table.open(msgspec.structs.replace(file.allocation, inode=1), [file.fd])
    assert len(table) == 0


def test_a_buffer_keeps_its_mapping_until_it_is_reaped(table, file):
    mapping = table.open(file.allocation, [file.fd])
    buffer = table.buffer(mapping, 10, 5)
    table.release(mapping)
    assert bytes(buffer) == bytes(range(10, 15))
    assert table.reap() == 0
    address = mapping.address
    del buffer
    assert mapped_addresses(NAME) == {address}
    assert table.reap() == 1
    assert table.reap() == 0


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, 0), (0, -1), (8192, 1), (1, 8192), (2**63, 2**63)])
def test_no_buffer_outside_the_mapping(table, file, offset, nbytes):
    mapping = table.open(file.allocation, [file.fd])
    with pytest.raises(InvalidRecord):
        table.buffer(mapping, offset, nbytes)
    table.release(mapping)
    with pytest.raises(InvalidRecord):
        table.buffer(mapping, 0, 1)


def test_threads_share_one_mapping(table, file):
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    failures = []
    start = threading.Barrier(4)

    def work(number):
        source = random.Random(seed + number)
        start.wait()
        try:
            for _ in range(500):
                mapping = table.open(file.allocation, [file.fd])
                buffer = table.buffer(mapping, number, 1) if source.random() < 0.7 else None
                table.release(mapping)
                if source.random() < 0.5:
                    table.reap()
                if buffer is not None and buffer[0] != number:
                    failures.append(number)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


class Life(RuleBasedStateMachine):
    """Any order of opening, viewing, dropping, releasing and reaping, against a count."""

    def __init__(self):
        super().__init__()
        self.table = MappingTable()
        self.files = [File(), File()]
        self.mappings = [[], []]
        self.buffers = [[], []]
        self.pending = [0, 0]
        self.which = 0

    @rule(which=st.integers(0, 1))
    def open(self, which):
        file = self.files[which]
        self.mappings[which].append(self.table.open(file.allocation, [file.fd]))

    @precondition(lambda self: any(self.mappings))
    @rule(which=st.integers(0, 1))
    def release(self, which):
        if self.mappings[which]:
            self.table.release(self.mappings[which].pop())

    @precondition(lambda self: any(self.mappings))
    @rule(which=st.integers(0, 1))
    def view(self, which):
        if self.mappings[which]:
            self.buffers[which].append(self.table.buffer(self.mappings[which][0], 7, 3))

    @precondition(lambda self: any(self.buffers))
    @rule(which=st.integers(0, 1))
    def drop(self, which):
        if self.buffers[which]:
            self.buffers[which].pop()
            self.pending[which] += 1

    @rule()
    def reap(self):
        self.table.reap()
        self.pending = [0, 0]

    @invariant()
    def exactly_what_is_used_is_mapped(self):
        used = sum(
            bool(mappings or buffers or pending)
            for mappings, buffers, pending in zip(self.mappings, self.buffers, self.pending, strict=True)
        )
        assert len(self.table) == used
        assert len(mapped_addresses(NAME)) == used
        assert all(bytes(buffer) == b"\7\10\11" for buffers in self.buffers for buffer in buffers)

    def teardown(self):
        for mapping in [each for mappings in self.mappings for each in mappings]:
            self.table.release(mapping)
        self.buffers.clear()
        self.table.reap()
        for file in self.files:
            os.close(file.fd)
        assert mapped_addresses(NAME) == set()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


# -- imports -----------------------------------------------------------------------------------------------------


def test_an_import_lives_until_closed_and_unviewed(table, file):
    memory = import_memory(file.manifest(), [file.fd], table)
    first, second = memory.buffer(0), memory.buffer(1)
    assert memory.live
    memory.close()
    memory.close()
    with pytest.raises(LeaseReleased):
        memory.buffer(0)
    del first
    table.reap()
    assert memory.live
    del second
    assert memory.live
    assert len(table) == 1
    assert table.reap() == 1
    assert not memory.live


def test_two_imports_of_one_allocation_are_counted_apart(table, file):
    one = import_memory(file.manifest(), [file.fd], table)
    other = import_memory(file.manifest(), [file.fd], table)
    view = one.buffer(0)
    one.close()
    other.close()
    assert (one.live, other.live, len(table)) == (True, False, 1)
    del view
    table.reap()
    assert not one.live


def test_an_import_that_is_dropped_is_closed(table, file):
    memory = import_memory(file.manifest(), [file.fd], table)
    view = memory.buffer(0)
    dropped = weakref.ref(memory)
    del memory
    assert dropped() is None
    assert table.reap() == 0
    assert view[1] == 1
    del view
    assert table.reap() == 1


def test_an_import_opens_all_or_nothing(table, file):
    other = File()
    manifest = Manifest((file.allocation, other.allocation), (), (), {})
    with pytest.raises(StaleHandle):
        import_memory(manifest, [file.fd, file.fd], table)
    assert len(table) == 0
    with pytest.raises(InvalidRecord, match="1 descriptors"):
        import_memory(manifest, [file.fd], table)
    os.close(other.fd)


def test_an_import_validates_first(table, file):
    wrong = msgspec.structs.replace(file.manifest(), storages=(Storage(0, 0, 4096), Storage(0, 4097, 4096)))
    with pytest.raises(InvalidRecord):
        import_memory(wrong, [file.fd], table)
    assert len(table) == 0


def test_an_import_takes_only_the_mappings_of_its_manifest(table, file):
    mapping = table.open(file.allocation, [file.fd])
    with pytest.raises(InvalidArgument):
        ImportedMemory(file.manifest(), [], table)
    with pytest.raises(InvalidArgument):
        ImportedMemory(file.manifest(), [mapping, mapping], table)
    table.release(mapping)


# -- fork, collection, exit --------------------------------------------------------------------------------------


def test_a_forked_child_forgets_without_unmapping(file):
    memory = import_memory(file.manifest(), [file.fd])
    view = memory.buffer(0)

    def body():
        nothing = (len(TABLE), mapped_addresses(NAME), memory.live)
        # A mapping of the child's own, most likely at the very same address.
        own = TABLE.open(file.allocation, [file.fd])
        with pytest.raises(InvalidRecord):
            memory.buffer(1)
        memory.close()
        return nothing, TABLE.reap(), len(TABLE), mapped_addresses(NAME) == {own.address}

    assert in_fork(body) == repr(((0, set(), False), 0, 1, True))
    assert view[200] == 200
    memory.close()
    del view
    assert TABLE.reap() == 1
    assert len(TABLE) == 0


def test_views_that_die_in_a_forked_child_change_nothing_there(file):
    memory = import_memory(file.manifest(), [file.fd])
    views = [memory.buffer(0), memory.buffer(1)]

    def body():
        views.clear()
        gc.collect()
        return TABLE.reap(), len(TABLE)

    assert in_fork(body) == repr((0, 0))
    memory.close()
    views.clear()
    assert TABLE.reap() == 1


def test_a_fork_never_falls_between_mapping_and_marking(file):
    mapped, forked = threading.Event(), threading.Event()

    class Slow(HostBackend):
        def open_allocation(self, allocation, fds):
            opened = super().open_allocation(allocation, fds)
            madvise(opened.address, opened.size, mmap.MADV_DOFORK)
            mapped.set()
            # A fork that does not wait for the table would come now; one that waits, only after the timeout.
            forked.wait(0.3)
            madvise(opened.address, opened.size, mmap.MADV_DONTFORK)
            return opened

    opened, seen = [], []
    opener = threading.Thread(target=lambda: opened.append(TABLE.open(file.allocation, [file.fd], Slow())))
    opener.start()
    mapped.wait(60)
    seen.append(in_fork(lambda: (len(TABLE), mapped_addresses(NAME))))
    forked.set()
    opener.join(60)
    assert seen == [repr((0, set()))]
    TABLE.release(opened[0])


def madvise(address, size, advice):
    result = ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)
    if result != 0:
        raise OSError("madvise")


def test_collected_in_any_order():
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    source = random.Random(seed)

    class Node:
        """Something in a cycle."""

    for _ in range(8):
        exported = export({"a": shared(3), "b": shared(4), "c": shared(5)})
        table = MappingTable()
        memory = import_memory(exported.manifest, [fd.fileno() for fd in exported.fds], table)
        views = build_views(exported.manifest, memory)
        kept = [memory, *views.values(), views["a"][1:], views["b"].view(torch.int32), views["c"].numpy()]
        del memory, views
        exported.close_fds()
        while kept:
            item = kept.pop(source.randrange(len(kept)))
            if source.random() < 0.5:
                node = Node()
                node.itself, node.item = node, item
                del node
            del item
            if source.random() < 0.3:
                gc.collect()
            if source.random() < 0.3:
                table.reap()
        gc.collect()
        table.reap()
        assert len(table) == 0


def test_numpy_views_keep_the_memory():
    with round_trip({"w": shared(6)}) as trip:
        numbers = trip.views["w"].numpy()
        trip.views.clear()
        trip.imported.close()
        assert trip.table.reap() == 0
        assert numbers.tolist() == [0, 1, 2, 3, 4, 5]
        del numbers
        assert trip.table.reap() == 1


EXIT = """
import gc, sys, threading, torch
from etha.tensor_bus.ipc.host import export
from etha.tensor_bus.ipc.mapping import TABLE, import_memory
from etha.tensor_bus.ipc.view import build_views
tensor = torch.arange(1000.0).share_memory_()
exported = export({"w": tensor, "tied": tensor, "row": tensor[3:5]})
memory = import_memory(exported.manifest, [fd.fileno() for fd in exported.fds])
views = build_views(exported.manifest, memory)
class Node:
    def __del__(self):
        self.total = self.view.sum().item()
node = Node()
node.itself, node.view, node.memory = node, views["w"], memory
sys.modules["kept"] = views["row"]
threading.kept = views["tied"][5:]
"""


@pytest.mark.parametrize(
    "end",
    [
        "",
        "memory.close()",
        "memory.close(); exported.close_fds(); del exported, tensor",
        "del node, views; gc.collect()",
        "gc.disable(); del node",
        "del TABLE, memory",
        "exported.close_fds(); sys.exit(0)",
        "import atexit; atexit.register(lambda: (views.clear(), TABLE.reap()))",
        "import atexit; atexit.register(memory.close)",
        "threading.Thread(target=lambda: views['w'].sum()).start()",
    ],
)
def test_the_interpreter_ends_quietly_with_live_views(end):
    done = python(EXIT + end)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
