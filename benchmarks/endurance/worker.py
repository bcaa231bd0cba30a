"""An owner and reader, at random, paced: a process of its own.

It talks with the crew: says ``"registered"``, then ``"subscribed"``, each when told to go on; hears ``"stop"``, closes
what it reads, and says how often it did what; hears ``"leave"``, and says goodbye to the agent. So nobody reads any
longer when the first owner leaves.

A call may end as `LEGAL` says: neighbours are closed and registered again while one subscribes to them, and on a
machine this full a wait may last too long. Whatever else is raised ends the worker, and with it the run.
"""

from __future__ import annotations

import random
import select
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import torch
from costs.processes import Talk, client
from costs.tensors import parameters

from endurance.plan import ANSWERED_FIRST, MOVING, SUBSCRIPTIONS, Plan
from etha.errors import EthaError
from etha.tensor_bus.publication import Publication
from etha.tensor_bus.subscription import Subscription

TIMEOUT: Final = 20.0
"""Seconds, of every call; a restart of the agent lies well within."""

LEGAL: Final = {
    "LeaseTimeout",
    "MappingTimeout",
    "VersionTimeout",
    "AgentTimeout",
    "NoPublication",
    "PublicationClosed",
    "OwnerDiedError",
    "StaleHandle",
}

_TENSORS: Final = 2
_BYTES: Final = 4096


class Worker:
    """One of them."""

    def __init__(self, plan: Plan, number: int) -> None:
        torch.set_num_threads(1)
        self._plan = plan
        self._chance = random.Random(f"{plan.seed}/{number}")
        self._bus = client()
        self._names = plan.names(number)
        self._staying, self._moving = plan.staying(), plan.moving()
        self._owned = {name: self._register(name) for name in self._names}
        self._doubtful: set[str] = set()
        self._read: list[Subscription] = []
        self.count: Counter[str] = Counter()
        weights = parameters(1)
        for _ in range(ANSWERED_FIRST // 2):
            self._bus.register_tensors(f"soak/first/{number}", weights, timeout=TIMEOUT).close(TIMEOUT)

    def subscribe(self) -> None:
        """To the publications that it reads all along; the last one also by a descriptor."""
        for name in self._chance.choices(self._staying, k=SUBSCRIPTIONS):
            self._read.append(self._bus.subscribe(name, timeout=TIMEOUT))
        self._read[-1].fileno()

    def step(self) -> None:
        """One operation, by its weight."""
        (operation,) = self._chance.choices(_OPERATIONS, _WEIGHTS)
        name = operation.__name__.strip("_")
        try:
            operation(self)
        except EthaError as error:
            if type(error).__name__ not in LEGAL:
                raise
            self.count[f"{name}: {type(error).__name__}"] += 1
        else:
            self.count[name] += 1

    def stop(self) -> None:
        """Read no more."""
        for subscription in self._read:
            subscription.close()

    def leave(self) -> None:
        """Close what it owns, and say goodbye."""
        self._bus.close(TIMEOUT)

    # -- operations -------------------------------------------------------------------------------

    def _update(self) -> None:
        _, (publication, tensors) = self._one(self._names)
        with publication.update(timeout=TIMEOUT):
            for tensor in tensors.values():
                tensor.fill_(publication.version + 1)

    def _publish(self) -> None:
        _, (publication, _) = self._one(self._names)
        publication.publish()

    def _look(self) -> None:
        subscription = self._chance.choice(self._read)
        with subscription.read(timeout=TIMEOUT) as weights:
            for tensor in weights.values():
                tensor.sum().item()

    def _wake(self) -> None:
        select.select([self._read[-1]], [], [], 0)
        with self._read[-1].read(timeout=TIMEOUT):
            pass

    def _visit(self) -> None:
        """Somebody's publication that may be rebound, suspended or closed at this moment."""
        with self._bus.subscribe(self._chance.choice(self._moving), timeout=TIMEOUT) as subscription:
            for _ in range(2):
                with subscription.read(timeout=TIMEOUT) as weights:
                    for tensor in weights.values():
                        tensor.sum().item()

    def _swap(self) -> None:
        """Another publication to read all along, in the place of one of them."""
        place = self._chance.randrange(len(self._read) - 1)
        self._read[place].close()
        self._read[place] = self._bus.subscribe(self._chance.choice(self._staying), timeout=TIMEOUT)

    def _register_again(self) -> None:
        name, (publication, _) = self._one(self._names[:MOVING])
        publication.close(TIMEOUT)
        self._owned[name] = self._register(name)

    def _rebind(self) -> None:
        name, (publication, _) = self._one(self._names[:MOVING])
        fresh = parameters(_TENSORS, _BYTES)
        self._doubtful.add(name)
        publication.rebind(fresh, TIMEOUT)
        self._doubtful.discard(name)
        self._owned[name] = publication, fresh

    def _suspend(self) -> None:
        name, (publication, _) = self._one(self._names[:MOVING])
        self._doubtful.add(name)
        publication.suspend(TIMEOUT)
        fresh = parameters(_TENSORS, _BYTES)
        publication.resume(fresh, TIMEOUT)
        self._doubtful.discard(name)
        self._owned[name] = publication, fresh

    # ---------------------------------------------------------------------------------------------

    def _register(self, name: str) -> tuple[Publication, dict[str, torch.Tensor]]:
        tensors = parameters(_TENSORS, _BYTES)
        return self._bus.register_tensors(name, tensors, timeout=TIMEOUT), tensors

    def _one(self, names: list[str]) -> tuple[str, tuple[Publication, dict[str, torch.Tensor]]]:
        name = self._chance.choice(names)
        if self._owned[name][0].closed or name in self._doubtful:
            self._owned[name][0].close(TIMEOUT)
            self._owned[name] = self._register(name)
            self._doubtful.discard(name)
        return name, self._owned[name]


_MIX: Final[dict[Callable[[Worker], None], float]] = {
    Worker._update: 40,
    Worker._publish: 30,
    Worker._look: 20,
    Worker._wake: 3,
    Worker._visit: 2,
    Worker._swap: 1,
    Worker._register_again: 2,
    Worker._rebind: 1,
    Worker._suspend: 1,
}
"""How often each, of a hundred."""
_OPERATIONS: Final = list(_MIX)
_WEIGHTS: Final = list(_MIX.values())


def work(talk: Talk, plan: Plan, number: int) -> None:
    """A worker's life; for `costs.processes.Helper`."""
    worker = Worker(plan, number)
    talk.say("registered")
    talk.hear()
    worker.subscribe()
    talk.say("subscribed")
    talk.hear()
    due = time.monotonic() + random.Random(number).random() * plan.pause
    while not talk.waiting():
        rest = due - time.monotonic()
        if rest > 0:
            select.select([talk.sock], [], [], rest)
            continue
        worker.step()
        # Late is late: a worker that was held up does not catch up in a burst.
        due = max(due, time.monotonic() - plan.pause) + plan.pause
    talk.hear()
    worker.stop()
    talk.say(worker.count)
    talk.hear()
    worker.leave()
    talk.say("left")
    talk.hear()
