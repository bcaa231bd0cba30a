"""`etha.tensor_bus.ipc.order`: points of a client's work, on the host and on streams, from one agent to the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from etha.errors import StreamCapturing
from etha.tensor_bus.ipc.cuda import Device
from etha.tensor_bus.ipc.fence import Fences, FenceTable
from etha.tensor_bus.ipc.order import HOST_ORDER, StreamOrder, wait_until_reached


@pytest.fixture
def tables() -> Iterator[list[FenceTable]]:
    made = [FenceTable(64) for _ in range(6)]
    yield made
    for table in made:
        table.close()


class Client:
    """An order whose current stream a test chooses."""

    def __init__(self, device: Device, table: FenceTable, slot: int) -> None:
        self.driver = device.driver
        self.current = device.driver.create_stream()
        self.order = StreamOrder(Fences(device, table.fileno()), slot, lambda: self.current)


def test_on_the_host_everything_is_done():
    assert HOST_ORDER.mark() == HOST_ORDER.stream() == 0
    HOST_ORDER.follow(3, 7)
    HOST_ORDER.follow(3, 7, fenced=False)
    HOST_ORDER.require_open()
    assert HOST_ORDER.reached(7)
    assert not HOST_ORDER.abandoned(3)


def test_a_point_lies_behind_every_stream_that_is_named(device, tables):
    client = Client(device, tables[0], 1)
    first, done, go = client.current, [], []
    client.driver.launch(first, lambda: done.append("first") if until(go) else None)
    client.current = client.driver.create_stream()
    point = client.order.mark(first)
    assert not wait_until_reached(client.order, point, 0.0, lambda: 1.0)
    go.append(1)
    assert client.driver.drain(client.current)
    assert (client.order.reached(point), client.order.newest, done) == (True, point, ["first"])


def until(go: list[int]) -> bool:
    while not go:
        pass
    return True


def test_numbers_go_on_in_a_successors_fences(device, tables):
    mine, other = Client(device, tables[0], 1), Client(device, tables[0], 2)
    point = mine.order.mark()
    before = mine.order.replace(lambda: Fences(device, tables[1].fileno()))
    assert mine.order.mark() == point + 1
    other.order.replace(lambda: Fences(device, tables[1].fileno()))
    other.order.follow(1, point + 1)
    assert other.driver.drain(other.current)
    assert before.value(1) == point


def test_who_has_not_come_back_is_followed_where_it_marked_its_points(device, tables):
    """Over four agents; the fifth's fences are too far."""
    idle, other = Client(device, tables[0], 1), Client(device, tables[0], 2)
    point = idle.order.mark()
    assert idle.driver.drain(idle.current)
    for number in range(1, 5):
        other.order.replace(lambda number=number: Fences(device, tables[number].fileno()))
        other.order.follow(1, point, fenced=False)
        assert other.driver.drain(other.current)
    other.order.follow(1, point)
    assert not other.driver.drain(other.current, 0.05)
    tables[4].release(1)
    assert other.driver.drain(other.current)
    assert other.order.abandoned(1)


def test_nothing_is_replaced_while_a_stream_of_its_is_captured(device, tables):
    client = Client(device, tables[0], 1)
    client.order.mark()
    marked, client.current = client.current, client.driver.create_stream()
    fences = client.order.fences
    with client.driver.capture(marked), pytest.raises(StreamCapturing):
        client.order.replace(lambda: pytest.fail("made in vain"))
    assert client.order.fences is fences
    with client.driver.capture(client.current), pytest.raises(StreamCapturing):
        client.order.require_open()


def test_a_replacement_that_fails_changes_nothing(device, tables):
    client = Client(device, tables[0], 1)
    point = client.order.mark()
    client.driver.fail_at = len(client.driver.calls) + 10**6

    def make() -> Fences:
        made = Fences(device, tables[1].fileno())
        client.driver.fail_at = len(client.driver.calls) + 2
        return made

    with pytest.raises(Exception, match="failed"):
        client.order.replace(make)
    client.driver.fail_at = 0
    assert client.order.mark() == point + 1
    device.drain()
    assert len(client.driver.tables.registered) == 1


def test_closed_fences_are_unmapped(device, tables):
    client = Client(device, tables[0], 1)
    client.order.mark()
    client.order.replace(lambda: Fences(device, tables[1].fileno()))
    client.order.close()
    device.drain()
    assert client.driver.tables.registered == {}
