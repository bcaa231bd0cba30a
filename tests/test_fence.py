"""`etha.tensor_bus.ipc.fence`: streams of two processes in order, and nobody waits for the dead."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from cuda_peer import Told, describe, make, receive, send
from fake_driver import DEVICE_OFFSET, GRANULARITY, FakeDriver
from fake_streams import reached
from gpu_player import Game
from test_cuda import peer

from etha.errors import DriverError, InvalidArgument, InvalidRecord, StreamCapturing, SystemFault, SystemLimit
from etha.tensor_bus.ipc.cuda import Device
from etha.tensor_bus.ipc.fence import RELEASED, SLOT_BYTES, SLOTS, Fences, FenceTable


@pytest.fixture
def table() -> Iterator[FenceTable]:
    made = FenceTable()
    yield made
    made.close()


@pytest.fixture
def fences(device: Device, table: FenceTable) -> Iterator[Fences]:
    made = Fences(device, table.fileno())
    yield made
    made.close()
    device.drain()


# -- the table ---------------------------------------------------------------------------------------------------


def test_no_slot_is_given_out_twice():
    table = FenceTable(slots=64)
    assert [table.take() for _ in range(64)] == list(range(64))
    with pytest.raises(SystemLimit) as caught:
        table.take()
    assert caught.value.resource == "fence slots"
    table.close()
    table.close()


def test_the_file_cannot_be_shrunk(table):
    with pytest.raises(PermissionError):
        os.ftruncate(table.fileno(), 0)
    assert not os.get_inheritable(table.fileno())


def unsealed() -> int:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    return fd


def odd() -> int:
    fd = os.memfd_create("odd", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4000)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


@pytest.mark.parametrize("what", [unsealed, odd, lambda: os.open("/dev/null", os.O_RDWR)])
def test_what_is_no_table_is_refused(what, driver, device):
    fd = what()
    before = driver.left_open()
    with pytest.raises(InvalidRecord):
        Fences(device, fd)
    assert driver.left_open() == before
    os.close(fd)


def test_a_device_without_the_operations_is_refused_by_name(driver, device, table):
    driver.has_stream_memory_operations = False
    with pytest.raises(DriverError) as caught:
        Fences(device, table.fileno())
    assert caught.value.resource == "64-bit stream memory operations"
    assert driver.tables.registered == {}


# -- signals and waits -------------------------------------------------------------------------------------------


def test_a_wait_ends_with_the_work_before_the_signal(driver, fences, table):
    writer, reader = table.take(), table.take()
    first, second = driver.create_stream(), driver.create_stream()
    done = []
    driver.launch(first, lambda: (time.sleep(0.02), done.append("written")))
    value = fences.signal(first, writer)
    assert value == 1
    fences.wait(second, writer, value)
    driver.launch(second, lambda: done.append("read"))
    assert fences.signal(second, reader) == 1
    assert driver.drain(second)
    assert done == ["written", "read"]
    assert fences.reached(writer, 1)
    assert not fences.reached(writer, 2)


def test_a_wait_returns_at_once_and_holds_its_stream(driver, fences, table):
    slot, stream = table.take(), driver.create_stream()
    fences.wait(stream, slot, 1)
    assert not driver.drain(stream, 0.1)
    table.release(slot)
    assert driver.drain(stream)


def test_numbers_grow_over_several_streams(driver, fences, table):
    slot = table.take()
    slow, quick = driver.create_stream(), driver.create_stream()
    seen = []
    word = ctypes.c_uint64.from_address(next(iter(driver.tables.registered)) + slot * SLOT_BYTES)
    driver.launch(slow, lambda: time.sleep(0.05))
    assert fences.signal(slow, slot) == 1
    assert fences.signal(quick, slot) == 2  # its stream is idle: it would come first
    driver.launch(quick, lambda: seen.append(word.value))
    driver.drain(quick)
    driver.drain(slow)
    assert (seen, word.value) == ([2], 2)


def test_whoever_waits_for_the_dead_is_let_go_now_and_later(driver, fences, table):
    slot = table.take()
    streams = [driver.create_stream() for _ in range(3)]
    for value, stream in zip((1, 1000, RELEASED - 1), streams, strict=True):
        fences.wait(stream, slot, value)
    assert not any(driver.idle(stream) for stream in streams)
    assert not fences.released(slot)
    table.release(slot)
    assert all(driver.drain(stream) for stream in streams)
    assert fences.released(slot)
    fences.wait(streams[0], slot, 77)
    assert driver.drain(streams[0])


def test_the_largest_number_would_hold_everyone(driver, fences, table):
    # Why RELEASED is what it is: the comparison is cyclic.
    assert reached(RELEASED, 1)
    assert reached(RELEASED, RELEASED - 1)
    assert not reached(2**64 - 1, 1)
    slot, stream = table.take(), driver.create_stream()
    word = ctypes.c_uint64.from_address(next(iter(driver.tables.registered)) + slot * SLOT_BYTES)
    word.value = 2**64 - 1
    fences.wait(stream, slot, 1)
    assert not driver.drain(stream, 0.1)
    table.release(slot)
    assert driver.drain(stream)


def test_the_device_has_an_address_of_its_own_for_a_slot(driver, device, fences):
    host = next(iter(driver.tables.registered))
    with device.current(), pytest.raises(DriverError):
        driver.write_value(0, host, 1)
    with device.current():
        driver.write_value(0, host + DEVICE_OFFSET + 5 * SLOT_BYTES, 3)
    assert driver.drain(0)
    assert fences.reached(5, 3)


@pytest.mark.parametrize(("slot", "value"), [(-1, 1), (SLOTS, 1), (0, -1), (0, RELEASED), (0, 2**64)])
def test_what_is_no_slot_or_value_is_refused(slot, value, driver, fences):
    stream = driver.create_stream()
    with pytest.raises(InvalidArgument):
        fences.wait(stream, slot, value)
    assert driver.drain(stream, 0)


def test_nothing_is_queued_on_a_stream_that_is_captured(driver, fences, table):
    slot, stream = table.take(), driver.create_stream()
    with driver.capture(stream):
        for captured in (stream, 0):
            with pytest.raises(StreamCapturing):
                fences.signal(captured, slot)
            with pytest.raises(StreamCapturing):
                fences.wait(captured, slot, 1)
    assert fences.signal(stream, slot) == 1


def test_closed_it_stays_mapped_until_no_stream_needs_it(driver, device, table):
    fences = Fences(device, table.fileno())
    slot, stream = table.take(), driver.create_stream()
    fences.wait(stream, slot, 1)
    fences.close()
    fences.close()
    with pytest.raises(InvalidArgument):
        fences.wait(stream, slot, 2)
    assert len(driver.tables.registered) == 1
    table.release(slot)
    assert device.drain() == 1
    assert driver.tables.registered == {}


def test_each_call_failing_leaves_nothing_open(driver, device, table):
    stream, slot = driver.create_stream(), table.take()
    before = driver.left_open()
    failed = set()
    for k in range(1, 1000):
        start = len(driver.calls)
        driver.fail_at = start + k
        fences = None
        try:
            fences = Fences(device, table.fileno())
            signalled = fences.signal(stream, slot)
            fences.wait(stream, slot, signalled)
            fences.close()
            driver.drain(stream)  # nothing is unmapped while a stream waits for another process
            device.drain()
        except SystemFault:
            pass
        if len(driver.calls) - start < k:
            driver.fail_at = 0
            break
        name = driver.calls[start + k - 1]
        failed.add(name)
        driver.fail_at = 0
        driver.stack.clear()  # a thread whose context cannot be popped keeps it
        if fences is not None:
            fences.close()
        table.release(slot)
        slot = table.take()
        device.drain()
        assert driver.left_open() == before, f"call {k}, {name}"
    assert {"cuMemHostRegister", "cuMemHostGetDevicePointer", "cuMemHostUnregister", "cuStreamWriteValue64"} <= failed


def test_a_signal_that_failed_is_not_counted(driver, fences, table):
    slot, stream = table.take(), driver.create_stream()
    assert fences.signal(stream, slot) == 1
    driver.fail_at = len(driver.calls) + 3  # is capturing, push, write
    with pytest.raises(DriverError):
        fences.signal(stream, slot)
    assert driver.calls[-2] == "cuStreamWriteValue64"
    assert fences.signal(stream, slot) == 2
    assert driver.drain(stream)


# -- order, across two processes ---------------------------------------------------------------------------------


def play(kind: str, versions: int, *, writer_waits: bool = True, reader_waits: bool = True) -> int:
    """An owner here and a reader there, hosts hand in hand, devices behind; how many reads were not one version.

    Each host goes on as soon as the other has queued, so that nothing but the fences keeps the streams in order.
    """
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    source = random.Random(seed)
    driver = FakeDriver()
    device = Device(driver, driver.uuids[0])
    table = FenceTable()
    mine, theirs = table.take(), table.take()
    fences = Fences(device, table.fileno())
    sizes = (GRANULARITY, GRANULARITY)
    with device.current():
        address = make(driver, kind, sizes)
        manifest, fds = describe(driver, address, sizes)
    words = (ctypes.c_uint64 * 64).from_address(address)
    streams = [driver.create_stream() for _ in range(3)]

    def kernel(version: int, pause: float) -> None:
        words[:32] = [version] * 32
        if pause:
            time.sleep(pause)
        words[32:] = [version] * 32

    with peer() as other:
        send(
            other.socket, Told("read", (theirs, mine, int(reader_waits), 3, seed + 1), manifest), [*fds, table.fileno()]
        )
        read = 0
        for version in range(1, versions + 1):
            stream = source.choice(streams)
            if writer_waits:
                fences.wait(stream, theirs, read)
            pause = source.uniform(0, 0.001) if source.random() < 0.05 else 0
            driver.launch(stream, lambda version=version, pause=pause: kernel(version, pause))
            written = fences.signal(stream, mine)
            send(other.socket, Told("version", (version, written)))
            read, _ = receive(other.socket, int)
        send(other.socket, Told("end"))
        torn, _ = receive(other.socket, int)
    for fd in fds:
        os.close(fd)
    driver.shut()
    fences.close()
    device.close()
    table.close()
    return torn


@pytest.mark.parametrize("kind", ["legacy", "fd"])
def test_no_read_of_many_is_torn(kind):
    assert play(kind, 1_000) == 0


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["legacy", "fd"])
def test_no_read_of_ten_thousand_is_torn(kind):
    assert play(kind, 10_000) == 0


@pytest.mark.parametrize("kind", ["legacy", "fd"])
@pytest.mark.parametrize("taken_out", ["writer_waits", "reader_waits"])
def test_without_either_wait_reads_are_torn(kind, taken_out):
    assert play(kind, 1_000, **{taken_out: False}) > 0


# -- the same on a GPU -------------------------------------------------------------------------------------------


def missing() -> str | None:
    """What a GPU test lacks here. It must not initialise CUDA in this process, whose other tests fork."""
    if not os.path.exists("/dev/nvidiactl"):
        return "no GPU: there is no /dev/nvidiactl"
    return None if importlib.util.find_spec("cuda") else "no cuda-bindings"


on_gpu = [pytest.mark.cuda, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def play_on_gpu(kind: str, versions: int, *, writer_waits: bool = True, reader_waits: bool = True) -> int:
    """As `play`, with two players that have the device, and this process for an agent, which has not."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    table = FenceTable()
    mine, theirs = table.take(), table.take()
    roles = {"owner": (mine, theirs, writer_waits), "reader": (theirs, mine, reader_waits)}
    with peer("gpu_player.py") as owner, peer("gpu_player.py") as reader:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for player, end, (role, (own, other, waits)) in zip((owner, reader), ends, roles.items(), strict=True):
            game = Game(role, kind, own, other, waits, versions, seed + own)
            send(player.socket, game, [table.fileno(), end.fileno()])
            end.close()
        owner.socket.settimeout(200)
        receive(owner.socket, int)
        torn, _ = receive(reader.socket, int)
    table.close()
    return torn


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=on_gpu) for kind in ("legacy", "fd")])
def test_no_read_on_a_gpu_is_torn(kind):
    assert play_on_gpu(kind, 10_000) == 0


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=on_gpu) for kind in ("legacy", "fd")])
@pytest.mark.parametrize("taken_out", ["writer_waits", "reader_waits"])
def test_without_either_wait_reads_on_a_gpu_are_torn(kind, taken_out):
    assert play_on_gpu(kind, 1_000, **{taken_out: False}) > 0


# -- interrupts, and three agents ---------------------------------------------------------------------------------


@pytest.mark.parametrize("queued", [True, False])
def test_an_interrupted_number_does_not_come_late(queued, driver, device, fences, table):
    """Ctrl-C comes between the device's taking of a number and the note of it: the next point is not reached early."""
    slot, first, second = table.take(), driver.create_stream(), driver.create_stream()
    gates = [threading.Event(), threading.Event()]
    write = driver.write_value

    def interrupted(*arguments: int) -> None:
        if queued:
            write(*arguments)
        raise KeyboardInterrupt

    driver.launch(first, gates[0].wait)
    driver.write_value = interrupted
    with pytest.raises(KeyboardInterrupt):
        fences.signal(first, slot)
    driver.write_value = write
    driver.launch(second, gates[1].wait)
    number = fences.signal(second, slot)
    gates[0].set()
    assert driver.drain(first)
    assert not fences.reached(slot, number)
    gates[1].set()
    assert driver.drain(second)
    assert fences.reached(slot, number)
    assert not fences.reached(slot, number + 1)


def test_who_died_under_an_agent_between_is_waited_for_by_nobody_in_the_file_before():
    first, third = FenceTable(), FenceTable()
    slots = [first.take() for _ in range(3)]
    third.inherit(3, [slots[0]])  # the others died under a second agent, which was never handed the first one's file
    third.adopt(first.fileno())
    assert [first.reached(slot, 1) for slot in slots] == [False, True, True]
    assert third.take() == third.given - 1 == 3
    third.release(slots[0])
    assert first.reached(slots[0], 1)
    first.close()
    third.close()


def test_it_is_unmapped_when_the_device_is_done(device, table):
    made = Fences(device, table.fileno())
    assert not made.unmapped
    made.close()
    assert not made.unmapped
    device.drain()
    assert made.unmapped
