"""One process's part in the random waits of `test_waits`: three threads, two clients, two publications of its own.

A round is a random nest, up to three deep, of reads of anybody's publications and updates of one's own, entered
while the outer ones are held. Threads share clients, so every kind of cycle comes up. Each call is bounded.
"""

from __future__ import annotations

import random
import threading
from collections import Counter

from lanes import enter_update, leave_update, outcome, shared

from etha import bootstrap_client

EXPECTED = {
    "DeadlockError",
    "LeaseTimeout",
    "VersionTimeout",
    "VersionGone",
    "TornError",
}
"""What a wait may come to, apart from what was asked for."""


class Rig:
    """Clients, publications and subscriptions of one process."""

    def __init__(self, names: list[str], seed: int) -> None:
        self.seed = seed
        self.clients = [bootstrap_client()[0] for _ in range(2)]
        self.owned = [
            client.register_tensors(name, {"x": shared()}) for client, name in zip(self.clients, names, strict=True)
        ]

    def subscribe(self, names: list[str]) -> None:
        self.subscriptions = [client.subscribe(name) for client in self.clients for name in names]

    def run(self, rounds: int) -> dict[str, int]:
        """So many rounds, shared by three threads; how often each outcome came."""
        counts: Counter[str] = Counter()
        errors: list[BaseException] = []
        threads = [
            threading.Thread(target=self._thread, args=(self.seed * 7 + number, rounds // 3, counts, errors))
            for number in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        for publication in self.owned:
            # The other processes may still hold leases for a moment; nobody holds one for long.
            outcome(lambda publication=publication: leave_update(enter_update(publication)), 20)
        return dict(counts)

    def unsubscribe(self) -> None:
        for subscription in self.subscriptions:
            subscription.close()

    def end(self) -> None:
        for client in self.clients:
            client.close(20)

    def _thread(self, seed: int, rounds: int, counts: Counter[str], errors: list[BaseException]) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(rounds):
                self._nest(chance, chance.randint(1, 3), counts)
        except BaseException as error:
            errors.append(error)

    def _nest(self, chance: random.Random, depth: int, counts: Counter[str]) -> None:
        timeout = chance.choice([0.0, 0.02, 0.1, 0.2])
        if chance.random() < 0.5:
            publication = chance.choice(self.owned)
            revoke = "revoke" if chance.random() < 0.1 else "raise"
            got = outcome(lambda: enter_update(publication, timeout, on_timeout=revoke), timeout)
            word, end = "update", leave_update
        else:
            subscription = chance.choice(self.subscriptions)
            version = {"min_version": 10**6} if chance.random() < 0.1 else {}
            got = outcome(lambda: subscription.read(timeout=timeout, **version), timeout)
            word, end = "read", type(got).release if not isinstance(got, str) else None
        if isinstance(got, str):
            if got not in EXPECTED:
                raise AssertionError(f"{word} came to {got}")
            counts[got] += 1
            return
        counts[word] += 1
        try:
            if depth > 1:
                self._nest(chance, depth - 1, counts)
        finally:
            end(got)
