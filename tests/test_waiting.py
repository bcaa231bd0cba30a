"""`etha.tensor_bus.waiting`: whether one more wait would close a circle."""

from __future__ import annotations

import pytest

from etha.errors import DeadlockError
from etha.tensor_bus.claims import Actor, Claim, Lease, Phase, Publication, Update
from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.waiting import refuse_cycle

LENGTH = 5000


def who(thread: int, publication: Publication) -> dict:
    return {
        "client": b"c",
        "number": thread,
        "actor": (1, thread),
        "label": "pid 1",
        "name": publication.name,
        "generation": publication.generation,
        "deadline": 9.0,
        "since": 0.0,
    }


def chain(length: int) -> tuple[dict[Actor, list[Claim]], dict[str, Publication]]:
    """Thread n updates publication n and waits to read publication n + 1, for n from 1."""
    publications = [
        Publication(n, f"w{n}", b"c", n, Manifest((), (), (), {}), 0, 0.0, phase=Phase.WRITING)
        for n in range(length + 2)
    ]
    waiting: dict[Actor, list[Claim]] = {}
    for n in range(1, length + 1):
        publications[n].update = Update(**who(n, publications[n]), granted=True)
        waiting[1, n] = [Lease(**who(n, publications[n + 1]))]
    return waiting, {publication.name: publication for publication in publications}


def test_a_chain_of_any_length_is_followed():
    waiting, publications = chain(LENGTH)
    refuse_cycle(waiting[1, 1][0], waiting, publications)
    publications[f"w{LENGTH + 1}"].update = Update(**who(1, publications[f"w{LENGTH + 1}"]), granted=True)
    with pytest.raises(DeadlockError) as caught:
        refuse_cycle(waiting[1, 1][0], waiting, publications)
    assert caught.value.holder.count("waits to read") == LENGTH


def test_the_shortest_circle_is_named():
    waiting, publications = chain(3)
    publications["w4"].update = Update(**who(1, publications["w4"]), granted=True)
    publications["w2"].leases[b"c", 1] = Lease(**who(1, publications["w2"]), version=0)
    closing = Update(**who(2, publications["w2"]))
    publications["w2"].update = None
    publications["w2"].queue.append(closing)
    waiting[1, 2].append(closing)
    with pytest.raises(DeadlockError) as caught:
        refuse_cycle(closing, {(1, 1): [Lease(**who(1, publications["w2"]), minimum=1)]}, publications)
    assert caught.value.holder.count("waits to") == 2


def test_a_publication_of_the_same_name_that_came_later_is_another():
    waiting, publications = chain(1)
    publications["w2"].update = Update(**who(1, publications["w2"]), granted=True)
    waiting[1, 1][0].generation = 77
    refuse_cycle(waiting[1, 1][0], waiting, publications)
