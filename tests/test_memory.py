"""`etha.tensor_bus.memory`: the agent's descriptors, and the threads beside its loop."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator

import pytest

from etha.errors import EthaError, NotShareable, SystemLimit
from etha.tensor_bus import memory
from etha.tensor_bus.ipc import descriptors
from etha.tensor_bus.ipc.allocations import HostAllocation
from etha.tensor_bus.ipc.backend import HOST
from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.ipc.mapping import TABLE
from etha.tensor_bus.memory import Backstage, Memory


@pytest.fixture
def backstage() -> Iterator[Backstage]:
    backstage = Backstage()
    yield backstage
    backstage.close()


def wait_for(backstage: Backstage) -> None:
    assert select.select([backstage.fileno()], [], [], 60)[0]
    backstage.results()


@pytest.mark.parametrize("error", [OSError(12, "no memory"), RuntimeError("a mistake"), NotShareable("no")])
def test_whatever_a_job_raises_can_be_told_to_its_caller(backstage, error, caplog):
    def fail():
        raise error

    seen: list[object] = []
    backstage.open_or_close(fail, seen.append)
    wait_for(backstage)
    assert isinstance(seen[0], EthaError)
    assert seen[0] is error or (isinstance(seen[0], SystemLimit) and seen[0].remedy)
    assert ("a mistake" in caplog.text) == isinstance(error, RuntimeError)


def test_closing_waits_for_the_chore_that_is_going_on_and_not_for_ever(monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def chore() -> None:
        begun.set()
        go.wait(60)

    backstage = Backstage()
    backstage.chore(chore, lambda _: None)
    backstage.chore(lambda: pytest.fail("a chore that was not begun is dropped"), lambda _: None)
    assert begun.wait(60)
    monkeypatch.setattr(memory, "_CHORE_SECONDS", 0.01)
    assert not backstage.close()
    go.set()
    monkeypatch.setattr(memory, "_CHORE_SECONDS", 60)
    assert backstage.close()


def manifest(count: int) -> Manifest:
    return Manifest(tuple(HostAllocation(1, inode, 4096) for inode in range(count)), (), (), {})


def test_descriptors_promised_count_as_taken(backstage, monkeypatch):
    monkeypatch.setattr(memory, "_free_descriptors", lambda: 10)
    held = Memory(backstage, lambda: HOST, lambda *_: None, lambda *_: None, lambda *_: None)
    held.announce(b"a", 1, manifest(6))
    with pytest.raises(SystemLimit) as caught:
        held.announce(b"a", 2, manifest(6))
    assert caught.value.resource == "RLIMIT_NOFILE"
    held.retract(b"a", 1)
    held.announce(b"a", 2, manifest(6))


def test_what_is_fetched_for_memory_that_is_over_is_closed_and_nothing_twice(backstage, monkeypatch, caplog):
    """The owner of recovering memory sends some of it itself, and moves or closes it, before the fetched ones come."""
    fetched, sent = os.pipe(), os.dup(0)
    monkeypatch.setattr(memory, "fetch_descriptors", lambda *_: [list(fetched)])
    closed: list[int] = []
    held = Memory(backstage, lambda: HOST, lambda *_: None, lambda *_: None, closed.append)
    held.recover(b"a", None, [(1, 1, manifest(2))])
    held.arrived(b"a", 1, 0, [sent])
    held.close(1)
    backstage._opener.submit(int).result(60)
    other = os.dup(0)
    assert other == sent  # a number that was given back is the next one's
    backstage._helper.submit(int).result(60)
    backstage.results()
    assert closed == [1]
    os.close(other)
    for fd in fetched:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)
    assert caplog.text == ""


def test_to_have_none_left_for_the_look_means_none(monkeypatch):
    def none_left(_: str):
        raise OSError(24, "too many")

    monkeypatch.setattr(os, "listdir", none_left)
    monkeypatch.setattr(os, "stat", lambda _: os.stat_result((0,) * 10))  # as before Linux 6.2
    free = memory._free_descriptors()
    monkeypatch.undo()
    assert free == 0


def test_descriptors_are_counted_alike_by_the_kernel_and_by_name(monkeypatch):
    known = descriptors.in_use(1 << 20)
    nothing = os.stat_result((0,) * 10)
    monkeypatch.setattr(os, "stat", lambda _: nothing)
    listed = descriptors.in_use(1 << 20)
    monkeypatch.undo()
    assert listed - known in (0, 1)  # the listing has one of its own


def test_a_mistake_in_one_result_does_not_swallow_the_others(backstage, caplog):
    def fail(_: object) -> None:
        raise RuntimeError("a mistake")

    seen: list[object] = []
    backstage.open_or_close(lambda: 1, fail)
    backstage.open_or_close(lambda: 2, seen.append)
    backstage._opener.submit(int).result(60)
    backstage.results()
    assert seen == [2]
    assert "a mistake" in caplog.text


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_what_is_fetched_too_late_is_closed_and_nothing_else(backstage, monkeypatch):
    """Meanwhile the owner has sent some, and closed; their numbers are others' by now."""
    go, fetched, sent = threading.Event(), os.memfd_create("fetched"), os.memfd_create("sent")
    monkeypatch.setattr(memory, "fetch_descriptors", lambda *_: [[-1, fetched]] if go.wait(60) else [])
    closed: list[int] = []
    held = Memory(backstage, lambda: HOST, lambda *_: None, lambda *_: None, closed.append)
    held.recover(b"a", None, [(7, 1, manifest(2))])
    held.arrived(b"a", 1, 0, [sent])
    held.close(7)
    wait_for(backstage)
    assert closed == [7]
    assert not is_open(sent)
    others = os.dup2(backstage.fileno(), sent, inheritable=False)
    go.set()
    wait_for(backstage)
    assert not is_open(fetched)
    assert is_open(others)
    os.close(others)


class Aside:
    """A backstage whose jobs are done when the test says so."""

    def __init__(self) -> None:
        self.chores: list = []

    def chore(self, job, then) -> None:
        self.chores.append((job, then))

    def open_or_close(self, job, then) -> None:
        then(job())


@pytest.fixture
def aside(monkeypatch) -> Aside:
    class Nothing:
        """What the table would have mapped."""

    monkeypatch.setattr(TABLE, "open", lambda *_: Nothing())
    monkeypatch.setattr(TABLE, "release", lambda mapping: None)
    return Aside()


def opened(count: int) -> list[int]:
    return [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(count)]


@pytest.mark.parametrize("end", ["closed", "replaced"])
def test_a_fetch_that_comes_after_the_end_closes_what_it_fetched_and_nothing_else(aside, end):
    """The numbers of what was closed before it are other files' by then."""
    seen: list[object] = []
    held = Memory(aside, lambda: HOST, lambda *each: seen.append(each), lambda *_: None, lambda *_: None)
    held.recover(b"a", None, [(7, 1, manifest(2))])
    held.arrived(b"a", 1, 0, opened(2))
    assert seen == [(7, None)]
    if end == "closed":
        held.close(7)
    else:
        held.announce(b"a", 2, manifest(1))
        held.replace(7, b"a", 2)
    others, fetched = opened(2), opened(2)
    ((_, then),) = aside.chores
    then([fetched])
    for fd in others:
        os.close(fd)
    for fd in fetched:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_rebinding_gets_what_arrives_for_the_memory_before_it(aside):
    """An agent that has just followed another has no descriptors yet, and its owner sends only those that are new."""
    moved: list[object] = []
    held = Memory(aside, lambda: HOST, lambda *_: None, lambda *each: moved.append(each), lambda *_: None)
    held.recover(b"a", None, [(7, 1, manifest(3))])
    held.announce_move(b"a", 2, manifest(4), 7)
    held.move(7, b"a", 2)
    held.arrived(b"a", 2, 3, opened(1))
    assert held.wanting(b"a") == [2, 1]
    held.arrived(b"a", 1, 0, opened(1))
    ((_, then),) = aside.chores
    then([[-1, *opened(2)]])
    assert held.wanting(b"a") == []
    assert moved == [(7, None)]
    held.replace(7, b"a", 2)
    held.close(7)


def test_the_end_of_an_opening_that_was_given_up_is_not_taken_for_the_next_ones(backstage):
    """A rebinding that timed out is opened all the same, if a thread has begun; what follows it has opened nothing."""
    opened: list[int] = []
    moved: list[int] = []
    held = Memory(backstage, lambda number, _: opened.append(number), lambda number, _: moved.append(number), print)
    empty = manifest(0)
    go = threading.Event()
    backstage.open_or_close(lambda: go.wait(60), lambda _: None)
    held.announce(b"a", 1, empty)
    held.expect(7, b"a", 1, empty)
    held.announce_move(b"a", 2, empty, 7)
    held.move(7, b"a", 2)
    held.retract(b"a", 2)
    go.set()
    wait_until_done(backstage)
    assert (opened, moved) == ([7], [])
    held.announce_move(b"a", 3, empty, 7)
    held.move(7, b"a", 3)
    wait_until_done(backstage)
    assert (opened, moved) == ([7], [7])
    held.close(7)
    held.retract(b"a")
    wait_until_done(backstage)


def wait_until_done(backstage: Backstage) -> None:
    """All that was asked of the opener, and what it led to."""
    backstage._opener.submit(int).result(60)
    backstage.results()
