"""The other process of the fake driver's tests. It imports no torch, so it starts at once.

    cuda_peer.py SOCKET

It owns memory, or reads what the test owns; what it does first is the first message. Messages are msgpack; descriptors
come along.
"""

from __future__ import annotations

import ctypes
import os
import random
import socket
import sys
import time
from typing import Any

import msgspec
from fake_driver import FakeDriver

from etha.tensor_bus.ipc import driver as api
from etha.tensor_bus.ipc.allocations import Chunk, CudaAllocation, LegacyAllocation, VirtualAllocation
from etha.tensor_bus.ipc.cuda import Device
from etha.tensor_bus.ipc.cuda_backend import CudaBackend
from etha.tensor_bus.ipc.driver import Driver
from etha.tensor_bus.ipc.fence import Fences
from etha.tensor_bus.ipc.manifest import Manifest, Storage, TensorSpec
from etha.tensor_bus.ipc.mapping import MappingTable, import_memory

OWNER = b"the other client"


class Told(msgspec.Struct, array_like=True):
    """One message: what to do, and its numbers."""

    do: str
    numbers: tuple[int, ...] = ()
    manifest: Manifest | None = None


def send(sock: socket.socket, message: Any, fds: list[int] | None = None) -> None:
    socket.send_fds(sock, [msgspec.msgpack.encode(message)], fds or [])


def receive(sock: socket.socket, kind: Any) -> tuple[Any, list[int]]:
    data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 253)
    if not data:
        raise EOFError
    return msgspec.msgpack.decode(data, type=kind), fds


def describe(driver: Driver, address: int, sizes: tuple[int, ...]) -> tuple[Manifest, list[int]]:
    """A manifest of one storage over what lies there, and its descriptors: chunks, or one legacy allocation."""
    uuid = driver.device_uuid(0)
    fds: list[int] = []
    allocation: CudaAllocation
    if driver.pointer_attribute(api.IS_LEGACY_CAPABLE, address):
        buffer = driver.pointer_attribute(api.BUFFER_ID, address)
        allocation = LegacyAllocation(uuid, OWNER, buffer, driver.ipc_get_handle(address), sum(sizes))
    else:
        chunks, at = [], address
        for size in sizes:
            handle = driver.retain_allocation(at)
            fds.append(driver.export_fd(handle))
            driver.release_allocation(handle)
            chunks.append(Chunk(driver.pointer_attribute(api.MEMORY_BLOCK_ID, at), size))
            at += size
        allocation = VirtualAllocation(uuid, OWNER, tuple(chunks))
    spec = TensorSpec(0, "uint8", (allocation.size,), (1,), 0)
    return Manifest((allocation,), (Storage(0, 0, allocation.size),), (spec,), {"w": 0}), fds


def make(driver: FakeDriver, kind: str, sizes: tuple[int, ...]) -> int:
    return driver.allocate(sum(sizes)) if kind == "legacy" else driver.allocate_chunks(*sizes)


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    driver = FakeDriver()
    device = Device(driver, driver.uuids[0])
    told, fds = receive(sock, Told)
    if told.do == "read":
        if told.manifest is None:
            raise ValueError("who reads is told of a manifest")
        fences = Fences(device, fds.pop())
        memory = import_memory(told.manifest, fds, MappingTable(), CudaBackend(device, OWNER))
        read(sock, driver, fences, memory.buffer(0), told.numbers)
        return
    with device.current():
        address = make(driver, told.do, told.numbers)
        manifest, fds = describe(driver, address, told.numbers)
    ctypes.memset(address, 1, sum(told.numbers))
    send(sock, manifest, fds)
    for fd in fds:
        os.close(fd)
    while True:
        told, _ = receive(sock, Told)
        if told.do == "free":
            driver.free(address)
        else:
            ctypes.memset(address, told.numbers[0], 16)
        send(sock, told.do)


def read(sock: socket.socket, driver: FakeDriver, fences: Fences, memory: Any, numbers: tuple[int, ...]) -> None:
    """Queue a read of each version that is announced, and announce the number that says it is done."""
    mine, theirs, waits, streams, seed = numbers
    source = random.Random(seed)
    words = (ctypes.c_uint64 * 64).from_buffer(memory)
    made = [driver.create_stream() for _ in range(streams)]
    torn = [0]

    def kernel(version: int, pause: float) -> None:
        first = words[:32]
        if pause:
            time.sleep(pause)
        torn[0] += {*first, *words[32:]} != {version}

    while True:
        told, _ = receive(sock, Told)
        if told.do == "end":
            break
        version, value = told.numbers
        stream = source.choice(made)
        if waits:
            fences.wait(stream, theirs, value)
        pause = source.uniform(0, 0.001) if source.random() < 0.05 else 0
        driver.launch(stream, lambda version=version, pause=pause: kernel(version, pause))
        send(sock, fences.signal(stream, mine))
    for stream in made:
        if not driver.drain(stream):
            raise TimeoutError("a stream waits")
    send(sock, torn[0])


if __name__ == "__main__":
    main()
