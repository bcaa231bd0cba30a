"""What every kind of memory owes the bus, asked of each in the same words, across processes.

`host` and the fake driver's two kinds always run. `cuda` needs a GPU and takes what torch's allocator gives: run it
once as it is and once with ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from ipc_helpers import in_fork
from worlds import WORLDS, World, pattern

from etha.errors import EthaError, InvalidRecord, LeaseReleased, NotShareable, StorageMoved
from etha.tensor_bus.ipc.allocations import VirtualAllocation
from etha.tensor_bus.ipc.mapping import ImportedMemory, MappingTable

PATIENCE = 60.0


def kinds() -> list[Any]:
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda is not available")
    return [pytest.param(name, marks=[pytest.mark.cuda, no_gpu] if name == "cuda" else []) for name in WORLDS]


class Owner:
    """`owner.py`, as its own process."""

    def __init__(self, kind: str, manifest_type: Any) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE)
        self._type = tuple[int, manifest_type]
        with theirs:
            command = [sys.executable, str(Path(__file__).with_name("owner.py")), kind, str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    def _ask(self, **told: object) -> bytes:
        self.socket.send(json.dumps(told).encode())
        return self.socket.recv(1 << 20)

    def make(self, *sizes: int) -> None:
        """New tensors; those before are kept by their exports."""
        assert self._ask(do="make", sizes=sizes) == b"made"

    def share(self, **names: int) -> Offer:
        """Export tensors by their number, under names."""
        count, manifest = msgspec.msgpack.decode(self._ask(do="share", names=names), type=self._type)
        fds: list[int] = []
        while len(fds) < count:
            fds += socket.recv_fds(self.socket, 16, 253)[1]
        return Offer(manifest, fds)

    def fill(self, index: int, value: int) -> None:
        assert self._ask(do="fill", index=index, value=value) == b"filled"

    def end(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        self.socket.close()


class Offer:
    """A manifest and its descriptors."""

    def __init__(self, manifest: Any, fds: list[int]) -> None:
        self.manifest = manifest
        self.fds = fds

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


@pytest.fixture(scope="module", params=kinds())
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def world(kind: str) -> Iterator[World]:
    made = WORLDS[kind]()
    yield made
    made.close()


@pytest.fixture(scope="module")
def owner(kind: str) -> Iterator[Owner]:
    made = Owner(kind, WORLDS[kind].manifest_type)
    yield made
    made.end()


@pytest.fixture
def offer(owner: Owner) -> Iterator[Offer]:
    """Two tensors, under three names."""
    owner.make(3000, 70_000)
    made = owner.share(small=0, large=1, tied=0)
    yield made
    made.close()


@contextmanager
def opened(world: World, offer: Offer, table: MappingTable) -> Iterator[ImportedMemory]:
    """An import that is closed in the end; then nothing may be left of it."""
    before = world.left_open()
    memory = world.import_memory(offer.manifest, offer.fds, table)
    try:
        yield memory
    finally:
        memory.close()
        world.settle(table)
    assert len(table) == 0
    assert world.left_open() == before


def row(offer: Offer, name: str) -> int:
    return offer.manifest.tensors[offer.manifest.names[name]].storage


def bytes_of(world: World, offer: Offer, memory: ImportedMemory, name: str) -> bytes:
    return world.read(memory.buffer(row(offer, name)))


# -- one memory, two processes -----------------------------------------------------------------------------------


def test_the_reader_sees_the_owners_bytes(world, offer):
    with opened(world, offer, MappingTable()) as memory:
        assert bytes_of(world, offer, memory, "small") == pattern(3000, 0)
        assert bytes_of(world, offer, memory, "large") == pattern(70_000, 1)


def test_and_what_the_owner_writes_later(world, owner, offer):
    with opened(world, offer, MappingTable()) as memory:
        kept = memory.buffer(row(offer, "large"))
        owner.fill(1, 77)
        assert world.read(kept) == bytes([77]) * 70_000
        assert bytes_of(world, offer, memory, "small") == pattern(3000, 0)
        del kept


def test_names_of_one_tensor_are_one_tensor(offer):
    assert offer.manifest.names["small"] == offer.manifest.names["tied"]
    assert len(offer.manifest.tensors) == len(offer.manifest.storages) == 2


def test_memory_outlives_a_descriptor(world, offer):
    with opened(world, offer, MappingTable()) as memory:
        fds = [os.dup(fd) for fd in offer.fds]
        offer.close()
        assert bytes_of(world, offer, memory, "small") == pattern(3000, 0)
        offer.fds += fds


def test_a_reader_that_may_not_write_is_ended_by_a_write(world, offer):
    if not world.read_only:
        pytest.skip("this kind cannot be mapped read-only")
    if world.name == "cuda":
        pytest.skip("a fault on a GPU is made by benchmarks/probes/read_only_fault.py alone")

    def body():
        # The parent's mappings are not the child's; it opens its own.
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()  # the fault is meant
            mine = WORLDS[world.name]()
            memory = mine.import_memory(offer.manifest, offer.fds, MappingTable())
            memory.buffer(row(offer, "small"))[0] = 1
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert in_fork(body) == repr(-signal.SIGSEGV)


# -- once per process, as long as somebody looks -----------------------------------------------------------------


def test_an_allocation_is_mapped_once(world, offer):
    table = MappingTable()
    with opened(world, offer, table):
        count = len(table)
        assert count == len(offer.manifest.allocations)
        once = world.left_open()
        again = world.import_memory(offer.manifest, offer.fds, table)
        assert (len(table), world.left_open()) == (count, once)
        again.close()


def test_a_view_keeps_its_memory(world, offer):
    table = MappingTable()
    before = world.left_open()
    memory = world.import_memory(offer.manifest, offer.fds, table)
    view = memory.buffer(row(offer, "small"))
    memory.close()
    world.settle(table)
    assert memory.live
    assert world.read(view) == pattern(3000, 0)
    with pytest.raises(LeaseReleased):
        memory.buffer(row(offer, "small"))
    del view
    assert len(table) > 0  # never in a finaliser
    world.settle(table)
    assert (memory.live, len(table)) == (False, 0)
    assert world.left_open() == before


def test_a_second_export_of_the_same_memory_is_the_same_allocation(world, owner, offer):
    other = owner.share(again=1)
    try:
        with opened(world, offer, MappingTable()) as memory, opened(world, other, MappingTable()) as second:
            assert bytes_of(world, offer, memory, "large") == bytes_of(world, other, second, "again")
        if not any(isinstance(each, VirtualAllocation) for each in offer.manifest.allocations):
            # A run of chunks is as long as what was exported of it; everything else goes as a whole.
            assert set(other.manifest.allocations) <= set(offer.manifest.allocations)
    finally:
        other.close()


# -- all or nothing ----------------------------------------------------------------------------------------------


def grown(offer: Offer) -> Any:
    """The same manifest, the last allocation claiming more than there is."""
    *rest, last = offer.manifest.allocations
    if isinstance(last, VirtualAllocation):
        chunk = last.chunks[-1]
        chunks = (*last.chunks[:-1], msgspec.structs.replace(chunk, size=chunk.size * 8))
        last = msgspec.structs.replace(last, chunks=chunks)
    else:
        last = msgspec.structs.replace(last, size=last.size * 8)
    return msgspec.structs.replace(offer.manifest, allocations=(*rest, last))


def test_a_claim_beyond_the_memory_opens_nothing(world, offer):
    if world.name == "cuda":
        pytest.skip("what a driver calls the size of a legacy allocation is an open question")
    table = MappingTable()
    before = world.left_open()
    with pytest.raises(EthaError):
        world.import_memory(grown(offer), offer.fds, table)
    world.settle(table)
    assert (len(table), world.left_open()) == (0, before)


def test_descriptors_too_few_or_too_many_open_nothing(world, offer):
    table = MappingTable()
    before = world.left_open()
    for fds in (offer.fds[1:] if offer.fds else [0], [*offer.fds, 0]):
        with pytest.raises(InvalidRecord):
            world.import_memory(offer.manifest, fds, table)
    assert (len(table), world.left_open()) == (0, before)


def test_a_manifest_that_is_none_opens_nothing(world, offer):
    table = MappingTable()
    storage = msgspec.structs.replace(offer.manifest.storages[0], nbytes=2**40)
    wrong = msgspec.structs.replace(offer.manifest, storages=(storage, *offer.manifest.storages[1:]))
    with pytest.raises(InvalidRecord):
        world.import_memory(wrong, offer.fds, table)
    assert len(table) == 0


# -- what is exported --------------------------------------------------------------------------------------------


def test_what_cannot_be_shared_is_refused_by_name_and_nothing_stays_open(world):
    fine, wrong = world.tensors(100)[0], world.unshareable()
    before = world.left_open()
    with pytest.raises(NotShareable) as caught:
        world.export({"fine": fine, "the culprit": wrong})
    assert caught.value.resource == "the culprit"
    assert caught.value.remedy
    del caught
    assert world.left_open() == before


def test_storages_in_one_allocation_are_one_export(world):
    (tensor,) = world.tensors(5000)
    exported = world.export({"whole": tensor, "part": tensor[100:200], "tied": tensor})
    assert len(exported.manifest.storages) == 1
    assert len(exported.manifest.tensors) == 2
    assert exported.manifest.tensors[1].offset == 100
    exported.close_fds()


def test_a_storage_that_moved_is_seen(world):
    first, second = world.tensors(100, 100)
    exported = world.export({"w": first})
    exported.check()
    first.set_(second.untyped_storage(), 0, (100,), (1,))
    with pytest.raises(StorageMoved) as caught:
        exported.check()
    assert caught.value.resource == "w"
    exported.close_fds()


def test_nothing_to_export(world):
    exported = world.export({})
    with opened(world, Offer(exported.manifest, []), MappingTable()) as memory:
        assert memory.live


def test_a_tensor_without_elements_needs_no_memory(world):
    (tensor,) = world.tensors(10)
    exported = world.export({"empty": tensor[3:3]})
    assert exported.manifest.allocations == ()
    assert exported.manifest.storages[0].allocation == -1


def test_its_own_process_sees_the_same_memory(world):
    (tensor,) = world.tensors(4000)
    exported = world.export({"w": tensor})
    offer = Offer(exported.manifest, [fd.fileno() for fd in exported.fds])
    with opened(world, offer, MappingTable()) as memory:
        buffer = memory.buffer(row(offer, "w"))
        assert world.read(buffer) == pattern(4000, 0)
        tensor.fill_(9)
        assert world.read(buffer) == bytes([9]) * 4000
        if world.name.startswith("fake-cuda"):
            assert ctypes.addressof(buffer) == tensor.data_ptr()
        del buffer
    exported.close_fds()
