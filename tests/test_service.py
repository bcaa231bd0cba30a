"""`etha.tensor_bus.service`: what a worker may ask, and what happens when nothing can be recorded."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from samples import sealed

from etha.errors import QueueFull
from etha.tensor_bus import claims, clock, commands, journal, packets, wire
from etha.tensor_bus.command_queue import CommandQueue
from etha.tensor_bus.fencing import Fencing
from etha.tensor_bus.ipc.allocations import HostAllocation
from etha.tensor_bus.ipc.backend import HOST
from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.ipc.peer import Peer
from etha.tensor_bus.journal import Journal
from etha.tensor_bus.memory import Backstage
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.records import encode
from etha.tensor_bus.registry import Registry
from etha.tensor_bus.service import Service
from etha.tensor_bus.sessions import Session
from etha.tensor_bus.state import StateReader
from etha.tensor_bus.state_writer import StateWriter

CLIENT = b"c" * 16
EMPTY = Manifest((), (), (), {})


class Desk:
    """A service with one worker, whose packets and commands a test writes itself."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.paths = agent_paths(0)
        self.queue, self.writer = CommandQueue(self.paths, create=True), StateWriter(self.paths.state)
        self.backstage = Backstage()
        registry = Registry()
        self.journal = Journal(self.writer, registry)
        self.service = Service(self.queue, self.journal, registry, self.backstage, Fencing(device=False), lambda: HOST)
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.session = Session(ours, Peer.of(ours), 0.0)
        self.session.client = CLIENT
        self.service.joined(self.session, clock.now(), packets.Welcome(CLIENT, 1))
        for close in (self.queue.close, self.writer.close, self.session.close, self.theirs.close, self.backstage.close):
            request.addfinalizer(close)
        self.sequence = 0
        self.settle()

    def settle(self) -> list[packets.FromAgent]:
        """One turn, and what it says to the worker."""
        self.service.registry.judge(self.service.registry.table.take_beginners(), clock.now())
        self.backstage.results()
        self.service.settle(clock.now())
        heard = []
        while True:
            try:
                heard.append(packets.FROM_AGENT.decode(wire.receive(self.theirs)[0]))
            except BlockingIOError:
                return heard

    def command(self, command: commands.Command, sequence: int | None = None) -> list[packets.FromAgent]:
        self.sequence += 1
        sequence = self.sequence if sequence is None else sequence
        self.queue.put(CLIENT, sequence, encode(command), clock.now() + 9)
        self.service.serve(self.session, clock.now())
        return self.settle()

    def ask(self, packet: packets.FromWorker) -> list[packets.FromAgent]:
        self.service.packet(self.session, packet, [], clock.now())
        return self.settle()

    def register(self, name: str = "w", version: int = 0) -> list[packets.FromAgent]:
        heard = self.command(commands.Register(name, EMPTY, version, False, 1, clock.now() + 9))
        self.backstage._opener.submit(int).result(60)
        return heard + self.settle()


@pytest.fixture
def desk(runtime: Path, request) -> Iterator[Desk]:
    return Desk(request)


def leaf(heard: list[packets.FromAgent]) -> str | None:
    (said,) = heard
    return said.failure.leaf if said.failure is not None else None


@pytest.mark.parametrize("version", [1 << 63, (1 << 64) - 1, -1])
def test_versions_beyond_63_bits_are_refused(desk, version):
    assert leaf(desk.register(version=version)) == "InvalidArgument"
    assert leaf(desk.register()) is None
    assert leaf(desk.command(commands.Publish(1, version, 0))) == "InvalidArgument"
    desk.ask(packets.Subscribe(1, "w", 1, clock.now() + 9))
    if version > 0:
        assert leaf(desk.ask(packets.Read(2, 1, "w", None, version, 1, clock.now() + 9, 1))) == "InvalidArgument"
        assert leaf(desk.ask(packets.Read(3, 1, "w", version, 0, 1, clock.now() + 9, 1))) == "InvalidArgument"
    assert isinstance(desk.ask(packets.Read(4, 1, "w", None, 0, 1, clock.now() + 9, 1))[0], packets.Leased)


def test_the_largest_sequence_fails_and_ends_nothing(desk):
    assert leaf(desk.command(commands.Publish(1, 1, 0), sequence=(1 << 64) - 1)) == "InvalidArgument"
    desk.service.serve(desk.session, clock.now())
    assert desk.settle() == []


def test_numbers_of_any_size_end_nothing(desk):
    for number in (-(1 << 63), (1 << 64) - 1):
        desk.command(commands.Close(number, number, clock.now() + 9))
        desk.command(commands.Abandon(number, number))
        desk.command(commands.Cancel(number))
        desk.ask(packets.Release(number))
    assert leaf(desk.register()) is None


def test_a_commit_that_cannot_be_read_yet_is_looked_for_again(desk, monkeypatch):
    """LMDB says its number a moment before a reader sees it."""
    newest = desk.queue.last_transaction()
    with monkeypatch.context() as within:
        within.setattr(desk.queue, "last_transaction", lambda: newest + 1)
        desk.service.serve(desk.session, clock.now())
    assert desk.queue.last_transaction() == newest
    assert leaf(desk.register()) is None


def test_a_closing_that_came_too_late_is_named(desk):
    desk.register()
    (said,) = desk.command(commands.Close(1, 1, clock.now() - 1))
    assert '"w"' in said.failure.message


def test_manifests_have_a_budget_and_give_it_back(desk, monkeypatch):
    monkeypatch.setattr(journal, "MANIFESTS_LIMIT", 100)
    assert leaf(desk.register("a")) is None
    assert desk.journal._reserved_bytes > 0
    assert [leaf(desk.register(name)) for name in ("b", "c", "d")][-1] == "QueueFull"
    assert desk.service._memory._announced == {}
    for generation in list(desk.service.registry.publications):
        desk.command(commands.Close(generation, 1, clock.now() + 9))
    desk.backstage._opener.submit(int).result(60)
    desk.settle()
    assert desk.service.registry.publications == {}
    assert desk.journal._reserved_bytes == 0
    assert leaf(desk.register("d")) is None
    monkeypatch.setattr(journal, "MANIFEST_LIMIT", 10)
    assert leaf(desk.register("e")) == "QueueFull"


def test_a_registration_that_fails_gives_its_room_back(desk):
    desk.register("a")
    before = desk.journal._reserved_bytes
    assert leaf(desk.register("a")) == "NameTaken"
    assert desk.journal._reserved_bytes == before


def test_what_cannot_be_recorded_is_not_granted_until_it_can(desk, monkeypatch, caplog):
    desk.register()
    desk.ask(packets.Subscribe(1, "w", 1, clock.now() + 9))
    reader = StateReader(desk.paths.state)

    def full(*_):
        raise QueueFull("the disk is full.")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR), reader._env.begin() as transaction:
        transaction.get(b"a")
        patch.setattr(desk.writer, "write", full)
        assert desk.ask(packets.Read(2, 1, "w", None, 0, 1, clock.now() + 9, 1)) == []
        assert desk.command(commands.Publish(1, 1, 0)) == []
        assert desk.settle() == []
    assert caplog.text.count("nothing can be recorded") == 1
    assert f"oldest reader: {desk.session.peer.label.split(' (')[0]}" in caplog.text
    (said,) = desk.settle()
    assert (said.number, said.version) == (2, 0)
    assert reader.version(1).version == 1
    reader.close()


def test_a_mistake_in_one_effect_does_not_swallow_the_others(desk, monkeypatch, caplog):
    desk.register()
    desk.ask(packets.Subscribe(1, "w", 1, clock.now() + 9))
    reply = desk.service._reply

    def stumble(session, effect):
        if effect.claim.number == 2:
            raise RuntimeError("a mistake")
        reply(session, effect)

    monkeypatch.setattr(desk.service, "_reply", stumble)
    for number in (2, 3):
        desk.service.packet(desk.session, packets.Read(number, 1, "w", None, 0, 1, clock.now() + 9, 1), [], clock.now())
    (said,) = desk.settle()
    assert said.number == 3
    assert "a mistake" in caplog.text


def test_a_welcome_is_on_record_before_it_is_told(desk):
    """An agent that dies between the two would leave a worker that no successor knows."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    session = Session(ours, Peer.of(ours), 0.0)
    session.client = b"d" * 16
    desk.service.joined(session, clock.now(), packets.Welcome(session.client, 5))
    with pytest.raises(BlockingIOError):
        wire.receive(theirs)
    desk.settle()
    assert packets.FROM_AGENT.decode(wire.receive(theirs)[0]) == packets.Welcome(session.client, 5)
    session.close()
    theirs.close()


def test_a_newcomer_is_welcomed_once_that_can_be_recorded(desk, monkeypatch):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    session = Session(ours, Peer.of(ours), 0.0)
    session.client = b"d" * 16

    def full(*_):
        raise QueueFull("the disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(desk.writer, "write", full)
        desk.service.joined(session, clock.now(), packets.Welcome(session.client, 5))
        desk.settle()
        with pytest.raises(BlockingIOError):
            wire.receive(theirs)
    desk.settle()
    assert packets.FROM_AGENT.decode(wire.receive(theirs)[0]) == packets.Welcome(session.client, 5)
    session.close()
    theirs.close()


def test_who_comes_back_is_asked_for_what_it_has_only_just_committed(desk):
    """Its descriptors may have gone with the connection before the command was read."""
    shared = Manifest((HostAllocation(1, 2, 4096),), (), (), {})
    record = commands.Register("w", shared, 0, False, 1, clock.now() + 9)
    desk.queue.put(CLIENT, 1, encode(record), clock.now() + 9)
    desk.service.rejoined(desk.session, clock.now())
    assert packets.Wanted(1) in desk.settle()


def test_an_import_that_is_asked_for_again_waits_for_the_memory(desk):
    """It was granted by an agent that died before it had told: its successor has no descriptors yet."""
    desk.register()
    subscribe = packets.Subscribe(1, "w", 1, clock.now() + 9)
    assert isinstance(desk.ask(subscribe)[-1], packets.Imported)
    publication = desk.service.registry.publications[1]
    publication.recovering = True
    assert desk.ask(subscribe) == []
    desk.service._memory_opened(1, None)
    assert [type(each) for each in desk.settle()] == [packets.Imported]
    assert [claim.number for claim in publication.mapped] == [1]


# -- what hostile workers brought to light ---------------------------------------------------------------------------

ONE = Manifest((HostAllocation(1, 2, 4096),), (), (), {})


@pytest.mark.parametrize("wrong", [{"deadline": math.nan}, {"name": ""}, {"name": "x" * 256}, {"version": -1}])
def test_a_registration_that_is_refused_keeps_no_room(desk, wrong):
    """A deadline that is no number was seen only when room was kept and descriptors were promised, for good."""
    sound = commands.Register("w", ONE, 0, False, 1, clock.now() + 9)
    assert leaf(desk.command(msgspec.structs.replace(sound, **wrong))) in ("InvalidRecord", "InvalidArgument")
    assert desk.journal._reserved_bytes == 0
    assert desk.service._memory._announced == {}


def test_a_rebinding_that_is_refused_keeps_no_room(desk):
    desk.register()
    before = desk.journal._reserved_bytes
    desk.ask(packets.Write(1, 1, "w", False, 1, clock.now() + 9))
    assert leaf(desk.command(commands.Rebind(1, 1, ONE, 1, math.nan))) == "InvalidRecord"
    assert desk.journal._reserved_bytes == before
    assert desk.service._memory._announced == {}


def test_outcomes_are_told_once_however_often_they_are_asked_for(desk):
    """One packet could name one command 60,000 times, and got as many answers, in ten megabytes of backlog."""
    desk.register()
    asked = (desk.sequence,) * 8000
    assert len(desk.ask(packets.Reassert((), asked, False))) == 1


def test_numbers_that_are_no_claims_are_not_kept(desk):
    desk.register()
    desk.ask(packets.Subscribe(7, "w", 1, clock.now() + 9))
    for first in range(100, 50_000, 5000):
        desk.ask(packets.Reassert(tuple(range(first, first + 5000)), (), True))
    desk.ask(packets.Reassert((7,), (), True))
    assert desk.session.reasserted == {7}
    desk.ask(packets.Reassert((), (), False))
    assert len(desk.service.registry.publications[1].mapped) == 1


def test_the_bell_of_an_import_that_is_not_named_any_more_is_closed(desk):
    desk.register()
    ends = []
    for number in (7, 8):
        desk.ask(packets.Subscribe(number, "w", 1, clock.now() + 9))
        reading, writing = os.pipe2(os.O_NONBLOCK)
        ends.append(reading)
        desk.service.packet(desk.session, packets.Bell(number, 0), [writing], clock.now())
    desk.ask(packets.Reassert((8,), (), False))
    assert [os.read(ends[0], 1), desk.session._bells.keys()] == [b"", {8}]
    for end in ends:
        os.close(end)


def test_a_release_ends_no_command(desk):
    """It would leave behind what belongs to the command, its promised descriptors first of all. `Cancel` does not."""
    assert desk.command(commands.Register("w", ONE, 0, False, 1, clock.now() + 9)) == []
    number = claims.command_number(desk.sequence)
    desk.ask(packets.Release(number))
    desk.command(commands.Release(number))
    assert (CLIENT, number) in desk.service.registry.table.claims
    desk.command(commands.Cancel(claims.command_sequence(number)))
    assert (CLIENT, number) not in desk.service.registry.table.claims
    assert desk.service._memory._announced == {}


def test_a_claim_bears_its_publications_name_whatever_it_is_called(desk):
    """By a wrong name a wait would be no part of the search for circles."""
    desk.register()
    desk.ask(packets.Write(1, 1, "another name", False, 1, clock.now() + 9))
    assert desk.service.registry.table.claims[CLIENT, 1].name == "w"


@pytest.mark.parametrize("name", ["", "x" * 256, "é" * 128, "x" * 60_000])
def test_a_name_of_no_publication_is_not_waited_for(desk, name):
    assert leaf(desk.ask(packets.Subscribe(1, name, 1, clock.now() + 9))) == "InvalidArgument"


def test_an_update_that_is_given_back_takes_its_suspending_with_it(desk):
    """The memory would have been closed outside of every update."""
    desk.register()
    desk.ask(packets.Subscribe(2, "w", 1, clock.now() + 9))
    desk.ask(packets.Write(1, 1, "w", False, 1, clock.now() + 9))
    assert desk.command(commands.Suspend(1, 1, 1, clock.now() + 9)) == []
    assert leaf(desk.ask(packets.Release(1))) == "InvalidArgument"
    desk.ask(packets.Release(2))
    publication = desk.service.registry.publications[1]
    assert (publication.phase, publication.moving, publication.memory_closing) == ("ready", None, False)


def test_a_suspended_publication_may_end_as_it_is_given_memory_again(desk, caplog):
    """Both in one turn, as when an owner is killed behind its commit: nothing is left to be moved then."""
    desk.register()
    desk.ask(packets.Write(1, 1, "w", False, 1, clock.now() + 9))
    desk.command(commands.Suspend(1, 1, 1, clock.now() + 9))
    desk.backstage._opener.submit(int).result(60)
    assert leaf(desk.settle()) is None
    desk.queue.put(CLIENT, desk.sequence + 1, encode(commands.Rebind(1, 1, ONE, 1, clock.now() + 9)), clock.now() + 9)
    desk.service.died(desk.session, clock.now())
    desk.settle()
    assert desk.service.registry.publications == {}
    assert (desk.service.counters["mistakes"], caplog.text) == (0, "")


def test_what_a_record_is_not_is_told_in_few_words(desk):
    """A tag of ten megabytes came back in an outcome of ten, and one of 64 made the state unreadable."""
    desk.sequence += 1
    desk.queue.put(CLIENT, desk.sequence, sealed(msgspec.msgpack.encode(["no" * (1 << 20), 1])), clock.now() + 9)
    desk.service.serve(desk.session, clock.now())
    (said,) = desk.settle()
    assert said.failure.leaf == "InvalidRecord"
    assert len(said.failure.message) < 300
