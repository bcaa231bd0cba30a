"""`etha.tensor_bus.held`: what the agent holds of a publication, opened and given back over the fake driver."""

from __future__ import annotations

import os

import pytest
import torch
from fake_backend import FakeBackend
from fake_driver import GRANULARITY, FakeDriver

from etha.errors import DriverError
from etha.tensor_bus.held import Held
from etha.tensor_bus.ipc.cuda import Device
from etha.tensor_bus.memory import Backstage, Memory


@pytest.fixture
def shared():
    """Two runs of chunks of one owner, exported: manifest, and copies of the descriptors."""
    driver = FakeDriver()
    backend = FakeBackend(Device(driver, driver.uuids[0]), bytes(16))
    addresses, spacers, tensors = [], [], {}  # not neighbours, which would be one run
    for index in range(2):
        with backend.device.current():
            addresses.append(driver.allocate_chunks(GRANULARITY))
            spacers.append(driver.allocate_chunks(GRANULARITY))
        tensors[f"w{index}"] = _over(addresses[-1])
    export = backend.export(tensors)
    yield export.manifest, lambda: [os.dup(fd.fileno()) for fd in export.fds]
    export.close_fds()
    for address in (*addresses, *spacers):
        driver.free(address)


def _over(address: int) -> torch.Tensor:
    import ctypes

    return torch.frombuffer((ctypes.c_ubyte * 64).from_address(address), dtype=torch.uint8)


@pytest.fixture
def agent() -> FakeBackend:
    driver = FakeDriver()
    return FakeBackend(Device(driver, driver.uuids[0]), bytes(16))


def test_opened_and_given_back(shared, agent):
    manifest, fds = shared
    before = agent.device.driver.left_open()
    held = Held(manifest, bytes(16), 1, fds())
    held.open(lambda: agent)
    assert len(held.mappings) == len(manifest.allocations)
    held.close(lambda: agent)
    held.close(lambda: agent)
    assert agent.device.driver.left_open() == before


def test_whatever_call_fails_nothing_stays_open(shared, agent):
    manifest, fds = shared
    driver = agent.device.driver
    before = driver.left_open()
    k, failed = 0, True
    while failed:
        k += 1
        held = Held(manifest, bytes(16), 1, fds())
        driver.calls.clear()
        driver.fail_at = k
        failed = False
        for step in (held.open, held.close, held.close):
            try:
                step(lambda: agent)
            except DriverError:
                failed = True
                if step == held.open:
                    held.close()
                    break
        failed = failed or len(driver.calls) >= k
        driver.fail_at = 0
        driver.stack.clear()  # a pop that failed
        agent.settle()
        assert driver.left_open() == before, f"call {k}"
    assert k > 10


def test_a_failed_opening_gives_back_what_was_open_by_then(shared, agent):
    """Its owner is told that it failed, and may free the memory at once."""
    manifest, fds = shared
    driver = agent.device.driver
    held = Held(manifest, bytes(16), 1, fds())
    original, seen = driver.reserve, []

    def second(size):
        seen.append(size)
        if len(seen) == 2:
            raise DriverError("no more", resource="cuMemAddressReserve")
        return original(size)

    driver.reserve = second
    with pytest.raises(DriverError):
        held.open(lambda: agent)
    assert driver.tables.mapped == {}
    held.close(lambda: agent)


def test_what_a_device_keeps_is_not_reported_closed(shared, agent):
    """Not before the device has given it back may its owner have it."""
    manifest, fds = shared
    driver = agent.device.driver
    closed: list[int] = []
    backstage = Backstage()
    memory = Memory(backstage, lambda: agent, lambda *_: None, lambda *_: None, closed.append)
    unmap, refusing = driver.unmap, [True]

    def refuse(*numbers: int) -> None:
        if refusing:
            raise DriverError("not now", resource="cuMemUnmap")
        unmap(*numbers)

    driver.unmap = refuse
    held = Held(manifest, bytes(16), 1, fds())
    held.open(lambda: agent)
    memory._held[7] = held
    memory.close(7)
    backstage._opener.submit(lambda: None).result()
    backstage.results()
    assert closed == []
    refusing.clear()
    memory.close_again()
    backstage._opener.submit(lambda: None).result()
    backstage.results()
    assert closed == [7]
    assert driver.tables.mapped == {}
    backstage.close()
    os.close(backstage.fileno())
