"""The registry alone, in random interleavings, against a small model kept by other means."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from registry_world import World

from etha.tensor_bus.claims import (
    ClaimId,
    Import,
    Lease,
    Phase,
    Registration,
    Update,
)


@dataclass
class Model:
    """What must be true of one publication, kept by other means than the registry's."""

    version: int = 0
    torn: bool = False
    writer: ClaimId | None = None
    writes: int = 0
    leases: dict[ClaimId, tuple[int, int]] = field(default_factory=dict)


class Interleavings(RuleBasedStateMachine):
    """Two owners, three readers, two threads each, in any order; every grant is checked against `Model`."""

    @initialize()
    def start(self) -> None:
        self.world = World()
        self.model: dict[str, Model] = {}
        self.seen = 0
        self.owners = {name: self.world.client(f"owner of {name}") for name in "pq"}
        self.readers = [self.world.client(f"reader {n}") for n in range(3)]
        self.dead: set[bytes] = set()
        for name, owner in self.owners.items():
            self.world.register(owner, name)
            self.model[name] = Model()
        self.publications = {name: self.world.publication(name) for name in "pq"}
        for reader in (*self.readers, *self.owners.values()):
            for name in "pq":
                self.world.subscribe(reader, name)
        self.follow()

    def follow(self) -> None:
        """Check every grant since the last step against the model."""
        for claim in self.world.granted[self.seen :]:
            if claim.name not in self.model or isinstance(claim, Import | Registration):
                continue
            model = self.model[claim.name]
            if isinstance(claim, Update):
                assert model.writer is None, "two writers"
                if claim.revoke and claim.deadline <= self.world.now:
                    model.leases.clear()
                assert not model.leases, "a writer beside a lease"
                model.writer = claim.id
                model.writes += 1
            elif isinstance(claim, Lease):
                assert model.writer is None, "a lease while it is written"
                assert not model.torn, "a lease on torn bytes"
                assert claim.version == model.version
                assert claim.satisfied_by(model.version)
                model.leases[claim.id] = (model.version, model.writes)
        self.seen = len(self.world.granted)

    def alive(self, client: bytes) -> bool:
        return client not in self.dead

    def idle(self, client: bytes, thread: int) -> bool:
        """A thread that waits makes no further call."""
        pid = self.world.registry.table.clients[client].pid
        return not self.world.registry.table.waiting.get((pid, thread))

    @rule(
        name=st.sampled_from("pq"), thread=st.integers(1, 2), revoke=st.booleans(), timeout=st.sampled_from([0, 1, 9])
    )
    def update(self, name: str, thread: int, revoke: bool, timeout: float) -> None:
        owner = self.owners[name]
        if self.alive(owner) and self.idle(owner, thread):
            self.world.update(owner, self.publications[name], revoke, thread, timeout)
            self.follow()

    @rule(name=st.sampled_from("pq"), good=st.booleans())
    def end_update(self, name: str, good: bool) -> None:
        model = self.model[name]
        if model.writer is None or not self.alive(self.owners[name]):
            return
        writer = self.world.registry.table.claims[model.writer]
        model.writer = None
        model.torn = not good
        if good:
            model.version += 1
            self.world.publish(self.owners[name], self.publications[name], writer)
        else:
            self.world.abandon(self.owners[name], self.publications[name], writer)
        self.follow()

    @rule(name=st.sampled_from("pq"))
    def withdraw(self, name: str) -> None:
        model = self.model[name]
        if model.writer is not None and self.alive(self.owners[name]):
            writer = self.world.registry.table.claims[model.writer]
            model.writer = None
            self.world.release(writer)
            self.follow()

    @rule(name=st.sampled_from("pq"))
    def publish(self, name: str) -> None:
        model = self.model[name]
        if model.writer is None and self.alive(self.owners[name]):
            model.version += 1
            model.torn = False
            self.world.publish(self.owners[name], self.publications[name])
            self.follow()

    @rule(
        who=st.integers(0, 4),
        name=st.sampled_from("pq"),
        thread=st.integers(1, 2),
        ahead=st.integers(0, 2),
        exact=st.booleans(),
        timeout=st.sampled_from([0, 1, 9]),
    )
    def read(self, who: int, name: str, thread: int, ahead: int, exact: bool, timeout: float) -> None:
        client = [*self.readers, *self.owners.values()][who]
        if not self.alive(client) or not self.idle(client, thread):
            return
        wanted = self.model[name].version + ahead
        self.world.read(
            client, self.publications[name], wanted if exact else None, 0 if exact else wanted, thread, timeout
        )
        self.follow()

    @precondition(lambda self: any(model.leases for model in self.model.values()))
    @rule(which=st.integers(0, 1 << 16))
    def release(self, which: int) -> None:
        out = [claim_id for model in self.model.values() for claim_id in model.leases]
        if not out:
            return
        claim = self.world.registry.table.claims[out[which % len(out)]]
        del self.model[claim.name].leases[claim.id]
        self.world.release(claim)
        self.follow()

    @rule(seconds=st.sampled_from([0.5, 1.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)
        self.follow()

    @rule(who=st.integers(0, 9))
    def die(self, who: int) -> None:
        if who > 4:
            return
        client = [*self.readers, *self.owners.values()][who]
        if not self.alive(client):
            return
        self.dead.add(client)
        for name, model in self.model.items():
            model.leases = {c: held for c, held in model.leases.items() if c[0] != client}
            if self.owners[name] == client:
                model.writer = None
        self.world.die(client)
        self.follow()

    @rule()
    def restart(self) -> None:
        """Who waited does not any more: it would ask again. Everything else is as it was."""
        self.world.restart()
        known = self.world.registry.publications
        self.publications = {name: known.get(each.generation, each) for name, each in self.publications.items()}
        self.follow()

    @invariant()
    def agrees(self) -> None:
        for name, publication in self.publications.items():
            model = self.model[name]
            if not self.alive(self.owners[name]):
                assert publication.phase is Phase.DEAD
                assert not [c for c in publication.queue if isinstance(c, Lease)]
                continue
            assert set(publication.leases) == set(model.leases)
            assert (publication.update and publication.update.id) == model.writer
            assert publication.version == model.version
            assert publication.writes == model.writes
            torn = publication.phase is Phase.TORN
            assert torn == (model.torn and model.writer is None)

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        """What could be granted has been: no writer waits for nobody, no read waits for nothing."""
        for name, publication in self.publications.items():
            model = self.model[name]
            if not self.alive(self.owners[name]) or model.writer is not None:
                continue
            updates = publication.waiting_updates()
            assert not updates or model.leases, "an update waits and no lease is out"
            for claim in publication.queue:
                if isinstance(claim, Lease) and claim.satisfied_by(model.version) and not model.torn:
                    assert updates, "a read waits behind no writer"

    @invariant()
    def no_circle(self) -> None:
        """Among those who wait without an end of their own, someone always waits for a thread that does not wait."""
        table = self.world.registry.table
        waits_for: dict[tuple[int, int], set[tuple[int, int]]] = {}
        for actor, waiting in table.waiting.items():
            for claim in waiting:
                publication = self.publications.get(claim.name)
                if isinstance(claim, Update) and not claim.revoke and publication is not None:
                    waits_for.setdefault(actor, set()).update(c.actor for c in publication.leases.values())
                if isinstance(claim, Lease) and publication is not None and publication.update is not None:
                    waits_for.setdefault(actor, set()).add(publication.update.actor)
        while waits_for:
            free = [a for a, others in waits_for.items() if not others & waits_for.keys()]
            assert free, f"a circle: {waits_for}"
            for actor in free:
                del waits_for[actor]


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)

_CHECKS = ("agrees", "nobody_waits_in_vain", "no_circle")


def run_at_random(rng: random.Random, steps: int) -> None:
    """One interleaving by the same rules, drawn without hypothesis: a hundred times as fast, and it shrinks nothing."""
    machine = Interleavings()
    machine.start()
    moves = [
        lambda: machine.update(rng.choice("pq"), rng.randint(1, 2), rng.random() < 0.5, rng.choice((0, 1, 9))),
        lambda: machine.end_update(rng.choice("pq"), rng.random() < 0.5),
        lambda: machine.withdraw(rng.choice("pq")),
        lambda: machine.publish(rng.choice("pq")),
        lambda: machine.read(
            rng.randrange(5),
            rng.choice("pq"),
            rng.randint(1, 2),
            rng.randrange(3),
            rng.random() < 0.5,
            rng.choice((0, 1, 9)),
        ),
        lambda: machine.release(rng.randrange(1 << 16)),
        lambda: machine.pass_time(rng.choice((0.5, 1.0))),
        lambda: machine.die(rng.randrange(40)),
        machine.restart,
    ]
    weights = (4, 3, 1, 2, 6, 4, 2, 1, 1)
    for _ in range(steps):
        rng.choices(moves, weights)[0]()
        for check in _CHECKS:
            getattr(machine, check)()


@pytest.mark.parametrize("count", [1000, pytest.param(100_000, marks=pytest.mark.stress)])
def test_interleavings_at_random(count: int):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    for number in range(count):
        rng = random.Random(seed + number)
        try:
            run_at_random(rng, 25)
        except BaseException:
            print(f"interleaving {number}: run_at_random(random.Random({seed + number}), 25)")
            raise
    print(f"{count} interleavings of 25 steps: 0 disagreements with the model")
