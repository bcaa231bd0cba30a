"""Row 17: a handle of what is over, while something else stands at the same name, the same address, the same number.

Refused with a typed error, never granted, never opened: by the rules alone, a million times; and by a real agent, where
a second owner shares other bytes at the very address of the first.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
from counts import counts
from omega import Omega
from registry_world import World
from scene import Scene

from etha.errors import OwnerDiedError, PublicationClosed, StaleHandle
from etha.tensor_bus.claims import Publication

# -- the rules ---------------------------------------------------------------------------------------------------------

GONE = (StaleHandle, OwnerDiedError, PublicationClosed)
NAMES = ("a", "b")


class Town:
    """Owners that come and go at two names, and readers that keep every handle they ever had."""

    def __init__(self, chance: random.Random) -> None:
        self.world = World()
        self.chance = chance
        self.born = 0
        self.over: list[tuple[bytes, Publication]] = []
        self.owners: dict[str, bytes] = {}
        self.reader = self.world.client("reader")

    def turn(self) -> None:
        """Somebody comes, goes, moves or writes."""
        name = self.chance.choice(NAMES)
        owner = self.owners.get(name)
        if owner is None:
            self.born += 1
            owner = self.owners[name] = self.world.client(f"o{self.born}", pid=1000 + self.born % 7)
            self.world.register(owner, name, version=self.chance.randrange(3))
            return
        publication = self.world.publication(name)
        what = self.chance.randrange(5)
        if what == 0:
            self.world.die(owner)
        elif what == 1:
            self.world.close(owner, publication)
            self.world.registry.client_left(owner, self.world.now)
            self.world.run()
        elif what == 2:
            self.over.append((owner, publication))
            self.world.register(owner, name, replace=True)
            return
        else:
            self.world.release(self.world.read(self.reader, publication))
            self.world.publish(owner, publication)
            return
        self.over.append((owner, publication))
        del self.owners[name]

    def use_what_is_over(self) -> str:
        """Somebody tries something with a handle of what is over; which error that was."""
        world = self.world
        owner, publication = self.chance.choice(self.over[-50:])
        what = self.chance.choice(("read", "update", "subscribe", "publish"))
        before = len(world.granted)
        if what == "publish" or owner not in world.registry.table.clients:
            with pytest.raises(GONE) as refused:
                world.publish(owner, publication, version=1 << 40)
            return refused.type.__name__
        if what == "read":
            claim = world.read(self.reader, publication)
        elif what == "update":
            claim = world.update(owner, publication)
        else:
            claim = world.subscribe(self.reader, publication.name, follows=publication.generation)
        assert not any(granted is claim for granted in world.granted[before:]), publication
        error = world.failed.pop(claim)
        assert isinstance(error, GONE), error
        return type(error).__name__


@pytest.mark.parametrize("uses", counts(20_000, 1_000_000))
def test_what_is_over_is_refused(uses: int):
    seed = int(os.environ.get("ETHA_SEED", random.randrange(1 << 20)))
    print(f"ETHA_SEED={seed}")
    refused: Counter = Counter()
    town = Town(random.Random(seed))
    for use in range(uses):
        if not town.over or use % 4 == 0:
            town.turn()
        if use % 10_000 == 9_999:
            town = Town(random.Random(f"{seed} {use}"))  # its lists grow
        while not town.over:
            town.turn()
        refused[town.use_what_is_over()] += 1
    print(dict(refused))
    assert refused["StaleHandle"] > uses // 10


# -- a real agent ------------------------------------------------------------------------------------------------------

OWN = "tensors = made({n}); mine = client.register_tensors('mine', tensors, version={n}); tensors['8192'].data_ptr()"

ASK = """
from etha.tensor_bus import clock, packets

def ask(make):
    number = client._link.number()
    def request():
        reply, mail = client._link.request(number, make(number, clock.now() + 2), 2)
        return repr(reply)
    try:
        return attempt(request)
    finally:
        client._link.release(number)

def ask_all(generation, through):
    thread = threading.get_native_id()
    return [
        ask(lambda n, d: packets.Read(n, generation, 'mine', None, 0, thread, d, through)),
        ask(lambda n, d: packets.Write(n, generation, 'mine', True, thread, d)),
        ask(lambda n, d: packets.Subscribe(n, 'mine', thread, d, follows=generation)),
    ]
"""

REFUSED = {"StaleHandle", "OwnerDiedError", "PublicationClosed"}


def play(scene: Scene, n: int, end: str, chance: random.Random) -> tuple[bool, Counter]:
    """One owner after another; whether they were at one address, and what stale handles came to."""
    first, reader = scene.worker(), scene.worker(ASK)
    second = None
    refused: Counter = Counter()
    try:
        address = first.do(OWN.format(n=2 * n))
        reader.do("old = client.subscribe('mine'); lease = old.read(); stamps(lease)")
        generation, through = reader.do("old.generation, old._mapped.number")
        if end == "dies":
            first.kill()
            first.process.wait()
        else:
            reader.do("lease.release()")
            first.say("mine.close(timeout=20)")
            assert reader.do("look(20, 1 << 40, name='old')") in REFUSED
            reader.do("lease = None; gc.collect(); client.subscribe('policy').close()")
            first.hear()
            scene.dismiss(first)
        second = scene.worker()
        there = second.do(OWN.format(n=2 * n + 1))
        told = [reader.do("look(2, name='old')"), *reader.do(f"ask_all({generation}, {through})")]
        assert set(told) <= REFUSED, told
        refused.update(told)
        if end == "dies":
            assert reader.do("stamps(lease)") == [2 * n]  # its own mapping, of bytes that are nobody's any more
        reader.do("old = lease = None; gc.collect(); new = client.subscribe('mine')")
        assert reader.do("look(5, name='new')") == (2 * n + 1, [2 * n + 1])
        return address == there, refused
    finally:
        for worker in (first, reader, second):
            if worker in scene.workers:
                scene.dismiss(worker)


@pytest.mark.parametrize("rounds", counts(3, 200))
@pytest.mark.parametrize("end", ["dies", "closes"])
def test_a_second_owner_at_the_same_place(stage: tuple[Scene, Omega], end: str, rounds: int):
    scene, omega = stage
    chance = random.Random(rounds)
    same, refused = 0, Counter()
    for n in range(rounds):
        at_one_address, told = play(scene, n, end, chance)
        same += at_one_address
        refused += told
        assert omega.faults() == []
    print(f"{same} of {rounds} at one address; {dict(refused)}")
    assert same > 0
