"""`etha.tensor_bus.ipc.cuda`: a device by UUID, opening, closing when it is safe, aliases, and failures."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from box import until
from cuda_peer import Manifest, Told, describe, make, receive, send
from fake_backend import FakeBackend
from fake_driver import GRANULARITY, FakeDriver
from ipc_helpers import in_fork

from etha.errors import DriverError, EthaError, InvalidArgument, InvalidRecord, StaleHandle, SystemFault
from etha.tensor_bus.ipc.cuda import Alias, CudaMapping, Device, Origin, open_allocation, visible_devices
from etha.tensor_bus.ipc.mapping import MappingTable, import_memory

SIZES = {"legacy": (3 * GRANULARITY,), "fd": (GRANULARITY, 2 * GRANULARITY)}
kinds = pytest.mark.parametrize("kind", SIZES)


class Peer:
    """A script beside this one, as its own process, and the socket to it."""

    def __init__(self, script: str) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(60)
        with theirs:
            command = [sys.executable, str(Path(__file__).with_name(script)), str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    def end(self) -> None:
        self.process.kill()
        self.process.wait(60)
        self.socket.close()


@contextmanager
def peer(script: str = "cuda_peer.py") -> Iterator[Peer]:
    made = Peer(script)
    try:
        yield made
    finally:
        made.end()


@contextmanager
def offered(kind: str) -> Iterator[tuple[Peer, Manifest, list[int]]]:
    """Memory of another process, all bytes 1."""
    with peer() as other:
        send(other.socket, Told(kind, SIZES[kind]))
        manifest, fds = receive(other.socket, Manifest)
        try:
            yield other, manifest, fds
        finally:
            for fd in fds:
                os.close(fd)


def look(address: int) -> bytes:
    return ctypes.string_at(address, 4)


# -- devices -----------------------------------------------------------------------------------------------------


def test_a_device_is_found_by_its_uuid_wherever_it_stands():
    driver = FakeDriver((b"b" * 16, b"a" * 16))
    assert visible_devices(driver) == [b"b" * 16, b"a" * 16]
    assert driver.tables.contexts == {}
    device = Device(driver, b"a" * 16)
    assert (device.ordinal, driver.tables.contexts) == (1, {1: 1})
    device.close()
    device.close()
    assert driver.tables.contexts == {1: 0}


def test_a_device_that_is_not_visible_gets_no_context(driver):
    with pytest.raises(InvalidArgument) as caught:
        Device(driver, b"somewhere else!!")
    assert caught.value.resource == b"somewhere else!!".hex()
    assert driver.tables.contexts == {}


def test_its_context_is_current_only_inside(driver, device):
    with device.current(), device.current():
        assert len(driver.stack) == 2
    with pytest.raises(ZeroDivisionError), device.current():
        _ = 1 / 0
    assert driver.stack == []


# -- opening and closing -----------------------------------------------------------------------------------------


@kinds
def test_opens_what_another_process_exported(kind, driver, device):
    before = driver.left_open()
    with offered(kind) as (other, manifest, fds):
        opened = open_allocation(device, manifest.allocations[0], fds)
        assert isinstance(opened, CudaMapping)
        assert opened.size == sum(SIZES[kind])
        assert look(opened.address) == look(opened.address + opened.size - 4) == bytes([1]) * 4
        send(other.socket, Told("fill", (7,)))
        receive(other.socket, str)
        assert look(opened.address) == bytes([7]) * 4
        opened.close()
        opened.close()
        assert (opened.address, device.retired, device.drain(), device.drain()) == (0, 1, 1, 0)
    assert driver.left_open() == before


@kinds
def test_opened_twice_it_must_be_closed_twice(kind, driver, device):
    before = driver.left_open()
    with offered(kind) as (_, manifest, fds):
        first = open_allocation(device, manifest.allocations[0], fds)
        second = open_allocation(device, manifest.allocations[0], fds)
        assert (first.address == second.address) == (kind == "legacy")
        address = second.address
        first.close()
        device.drain()
        assert look(address) == bytes([1]) * 4
        second.close()
        device.drain()
    assert driver.left_open() == before


@kinds
def test_a_reader_may_write_legacy_memory_alone(kind, driver, device):
    with offered(kind) as (_, manifest, fds):

        def body():
            mine = FakeDriver()
            opened = open_allocation(Device(mine, mine.uuids[0]), manifest.allocations[0], fds)
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGSEGV, signal.SIG_DFL)
                ctypes.memset(opened.address, 2, 1)
                os._exit(0)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        assert in_fork(body) == repr(0 if kind == "legacy" else -signal.SIGSEGV)


@kinds
def test_a_claim_of_more_than_the_driver_has_is_refused(kind, driver, device):
    before = driver.left_open()
    with offered(kind) as (_, manifest, fds):
        (allocation,) = manifest.allocations
        if kind == "legacy":
            claim, error = msgspec.structs.replace(allocation, size=allocation.size + 1), InvalidRecord
        else:
            first, last = allocation.chunks
            larger = msgspec.structs.replace(last, size=last.size + GRANULARITY)
            claim, error = msgspec.structs.replace(allocation, chunks=(first, larger)), DriverError
        with pytest.raises(error):
            open_allocation(device, claim, fds)
        assert device.retired == 0
    assert driver.left_open() == before


def test_descriptors_must_be_as_many_as_chunks(driver, device):
    with offered("fd") as (_, manifest, fds):
        for wrong in (fds[:1], [*fds, fds[0]]):
            with pytest.raises(InvalidRecord):
                open_allocation(device, manifest.allocations[0], wrong)
    assert driver.tables.handles == {}


def test_memory_of_another_device_is_refused_and_gets_no_context(driver):
    device = Device(driver, driver.uuids[1])
    with offered("legacy") as (_, manifest, _):
        with pytest.raises(InvalidArgument) as caught:
            open_allocation(device, manifest.allocations[0], [])
        assert caught.value.resource == driver.uuids[0].hex()
    assert driver.tables.contexts == {1: 1}


def test_a_legacy_handle_of_a_dead_exporter_opens_nothing(driver, device):
    before = driver.left_open()
    with offered("legacy") as (other, manifest, _):
        other.process.kill()
        other.process.wait(60)
        with pytest.raises(DriverError):
            open_allocation(device, manifest.allocations[0], [])
    assert driver.left_open() == before


def test_memory_by_fd_outlives_its_exporter(driver, device):
    with offered("fd") as (other, manifest, fds):
        opened = open_allocation(device, manifest.allocations[0], fds)
        other.process.kill()
        other.process.wait(60)
        assert look(opened.address) == bytes([1]) * 4
        again = open_allocation(device, manifest.allocations[0], fds)
        assert look(again.address) == bytes([1]) * 4
        opened.close()
        again.close()
        device.drain()


# -- unmapping is put off ----------------------------------------------------------------------------------------


@kinds
def test_unmaps_after_the_work_that_may_read_it(kind, driver, device):
    stream, other = driver.create_stream(), driver.create_stream()
    started, go = threading.Event(), threading.Event()
    seen = []
    with offered(kind) as (_, manifest, fds):
        opened = open_allocation(device, manifest.allocations[0], fds)
        address = opened.address

        def kernel() -> None:
            started.set()
            go.wait(60)
            seen.append(look(address))

        driver.launch(stream, kernel)
        started.wait(60)
        opened.close()
        assert address in driver.tables.mapped
        drained = []
        thread = threading.Thread(target=lambda: drained.append(device.drain(stream)))
        thread.start()
        until(lambda: "cuCtxSynchronize" in driver.calls)
        assert (device.retired, address in driver.tables.mapped) == (1, True)
        assert device.drain(other) == 0  # another thread has it in hand
        go.set()
        thread.join(60)
        assert (drained, device.retired) == ([1], 0)
        assert seen == [bytes([1]) * 4]
        assert address not in driver.tables.mapped


def test_never_while_the_callers_stream_is_captured(driver, device):
    stream, other = driver.create_stream(), driver.create_stream()
    with offered("fd") as (_, manifest, fds):
        open_allocation(device, manifest.allocations[0], fds).close()
        calls = len(driver.calls)
        with driver.capture(stream):
            assert (device.drain(stream), device.drain(0), device.retired) == (0, 0, 1)
            assert set(driver.calls[calls:]) == {"cuStreamIsCapturing"}
            # What nobody can know beforehand, the driver says; nothing is lost.
            with pytest.raises(DriverError):
                device.drain(other)
            assert device.retired == 1
        assert device.drain(stream) == 1


def test_through_the_table_once_for_all_and_only_when_asked(driver, device):
    table = MappingTable()
    backend = FakeBackend(device, b"a reading client")
    before = driver.left_open()
    with offered("fd") as (_, manifest, fds), offered("legacy") as (_, other, _):
        memories = [
            import_memory(manifest, fds, table, backend),
            import_memory(manifest, fds, table, backend),
            import_memory(other, [], table, backend),
        ]
        assert len(table) == 2
        view = memories[0].buffer(0)
        for memory in memories:
            memory.close()
        del memory, memories
        table.reap()
        assert (len(table), device.retired) == (1, 1)
        assert bytes(view[:4]) == bytes([1]) * 4
        del view
        assert device.retired == 1
        table.reap()
        waited = driver.calls.count("cuCtxSynchronize")
        assert (len(table), device.retired, device.drain()) == (0, 2, 2)
        assert driver.calls.count("cuCtxSynchronize") == waited + 1
    assert driver.left_open() == before


def test_all_of_a_manifest_or_nothing(driver, device):
    table = MappingTable()
    backend = FakeBackend(device, b"a reading client")
    before = driver.left_open()
    with offered("fd") as (_, manifest, fds), offered("legacy") as (_, other, _):
        (wrong,) = other.allocations
        wrong = msgspec.structs.replace(wrong, size=wrong.size + 1)
        both = msgspec.structs.replace(manifest, allocations=(*manifest.allocations, wrong))
        with pytest.raises(InvalidRecord):
            import_memory(both, fds, table, backend)
        assert len(table) == 0
        assert device.drain() == 1
    assert driver.left_open() == before


def test_reopened_before_it_was_unmapped(driver, device):
    table = MappingTable()
    backend = FakeBackend(device, b"a reading client")
    with offered("legacy") as (_, manifest, _):
        import_memory(manifest, [], table, backend).close()
        again = import_memory(manifest, [], table, backend)
        device.drain()
        assert bytes(again.buffer(0)[:4]) == bytes([1]) * 4
        again.close()
        table.reap()
        device.drain()
    assert driver.tables.mapped == {}


def test_a_forked_child_unmaps_nothing(driver, device):
    with offered("fd") as (_, manifest, fds):
        opened = open_allocation(device, manifest.allocations[0], fds)
        opened.close()

        def body():
            calls = len(driver.calls)
            device.close()
            return device.retired, device.drain(), driver.calls[calls:]

        assert in_fork(body) == repr((0, 0, []))
        assert device.drain() == 1


# -- aliases -----------------------------------------------------------------------------------------------------


@kinds
def test_what_this_process_exported_is_aliased_while_it_is_exported(kind, driver, device):
    with device.current():
        address = make(driver, kind, SIZES[kind])
        manifest, fds = describe(driver, address, SIZES[kind])
    (allocation,) = manifest.allocations
    keeper: list[object] = [object()]
    origin = Origin(address, keeper)
    device.add_origin(allocation, origin)
    calls = len(driver.calls)
    alias = open_allocation(device, allocation, fds)
    assert isinstance(alias, Alias)
    assert (alias.address, alias.size, driver.calls[calls:]) == (address, sum(SIZES[kind]), [])
    del origin
    assert device.origin(allocation) is not None  # the alias keeps it
    alias.close()
    alias.close()
    assert (alias.address, device.origin(allocation), device.retired) == (0, None, 0)
    if kind == "legacy":
        with pytest.raises(StaleHandle):
            open_allocation(device, allocation, fds)
    for fd in fds:
        os.close(fd)


# -- every call may fail -----------------------------------------------------------------------------------------


@kinds
def test_each_call_of_opening_and_closing_failing_leaves_nothing_open(kind, driver):
    before = driver.left_open()
    failed = set()
    with offered(kind) as (_, manifest, fds):
        mine = driver.left_open()
        for k in range(1, 1000):
            start = len(driver.calls)
            driver.fail_at = start + k
            device = None
            try:
                device = Device(driver, driver.uuids[0])
                open_allocation(device, manifest.allocations[0], fds).close()
                device.close()
            except SystemFault:
                pass
            if len(driver.calls) - start < k:
                driver.fail_at = 0
                break
            name = driver.calls[start + k - 1]
            failed.add(name)
            driver.fail_at = 0
            driver.stack.clear()  # a thread whose context cannot be popped keeps it
            if device is not None:
                device.drain()
                device.close()
            assert driver.left_open() == mine, f"call {k}, {name}"
    assert driver.left_open() == before
    last = "cuIpcCloseMemHandle" if kind == "legacy" else "cuMemAddressFree"
    assert {"cuDevicePrimaryCtxRetain", "cuCtxSynchronize", "cuDevicePrimaryCtxRelease", last} <= failed


def test_one_that_cannot_be_undone_keeps_no_other(driver, device):
    before = driver.left_open()
    with offered("fd") as (_, manifest, fds), offered("legacy") as (_, other, _):
        open_allocation(device, manifest.allocations[0], fds).close()
        open_allocation(device, other.allocations[0], []).close()
        start = len(driver.calls)
        # is capturing, push, synchronise, and the first step
        driver.fail_at = start + 4
        with pytest.raises(EthaError):
            device.drain()
        assert device.retired == 1
        assert device.drain() == 1
    assert driver.left_open() == before
