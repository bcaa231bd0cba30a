"""A real agent under hostile workers: packets over its socket, commands through its queue. Row 13 of what etha
survives.

Rounds of `ROUND` cases, each by a process of its own that is killed at the end (`feeder`). Meanwhile and afterwards an
owner writes versions, a reader sees them whole, a canary is registered, read and closed; in the end Ω holds: the same
agent, no mistake of its own, nothing on stderr but what it refused, nothing left of anybody.

``ETHA_FUZZ_SEED`` gives another seed, ``ETHA_FUZZ_ROUNDS`` another number of rounds. ``ETHA_FUZZ_UNTIL=2741`` runs the
round of case 2741 up to it and no other: what a case does depends on those before it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from codec_cases import MEMORY, PER_BYTE, SECONDS, USUAL_SECONDS
from harness import Worker
from omega import Omega
from scene import Scene

ROUND = 500
BREATH = 100
"""After so many cases the owner and the canary have their turn."""

SEED = int(os.environ.get("ETHA_FUZZ_SEED", "1"))
ROUNDS = int(os.environ.get("ETHA_FUZZ_ROUNDS", "10"))
UNTIL = os.environ.get("ETHA_FUZZ_UNTIL")

REFUSALS = r"^etha agent: \S+ \S+ WARNING: (pid \d+ \(.*\) (sent what makes no sense: |does not read)|refused pid \d+ )"
"""All that a healthy agent may say of them, each on one line."""

HOSTILE = f"""
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
from feeder import Feeder
"""


class Price(NamedTuple):
    """What a case took of the agent, beyond what the question behind it takes."""

    number: int
    kind: str
    size: int
    spent: int
    grown: int
    control: int


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scene, Omega]]:
    scene = Scene(tmp_path_factory.mktemp("fuzzing"))
    try:
        scene.step()
        scene.follow()  # as the last test has it
        scene.step()
        omega = Omega(scene, may_say=REFUSALS, slack=2048)  # it takes commands of a megabyte
        yield scene, omega
        omega.close()
    finally:
        scene.close()


def step(scene: Scene) -> None:
    """The owner writes a version; who holds a lease on the last one loses it, as any reader may hold one for long."""
    scene.version += 1
    found = scene.owner.do(
        f"with policy.update(timeout=0.01, on_timeout='revoke'): write({scene.version})\npolicy.version"
    )
    assert found == scene.version


def hostile(scene: Scene) -> Worker:
    """A process that knows how to be hostile to the scene's agent."""
    return scene.worker(f"client.close()\n{HOSTILE}\nfeeder = Feeder({scene.agent.pid})")


def round_of(scene: Scene, omega: Omega, seed: int, numbers: range, *, alone: bool) -> tuple[list[Price], Counter[str]]:
    """One process's cases, its death, and Ω.

    Args:
        scene: at rest.
        omega: its baseline.
        seed: of the cases.
        numbers: of the cases.
        alone: nobody else asks the agent for anything while a case runs, so that what it costs is its own.
    """
    print(f"ETHA_FUZZ_SEED={seed} ETHA_FUZZ_UNTIL={numbers.stop - 1} repeats this round")
    pid = scene.agent.pid
    worker = hostile(scene)
    try:
        for first in range(numbers.start, numbers.stop, BREATH):
            worker.say(f"feeder.run({seed}, range({first}, {min(first + BREATH, numbers.stop)}))")
            while not alone and not worker.heard():
                step(scene)
                assert omega.canary() == []
            worker.hear()
            step(scene)
            assert omega.canary() == []
        prices, did = worker.do("(feeder.prices, dict(feeder.did))")
    finally:
        scene.dismiss(worker)
    assert scene.agent.pid == pid
    scene.state.everything()
    assert omega.faults() == []
    return [Price(*price) for price in prices], Counter(did)


def judge(prices: list[Price], did: Counter[str]) -> None:
    """What cases may cost the agent, and that they did what they are for."""
    hostile = [price for price in prices if price.kind != "friendly"]  # a registration is three packets, and sound
    spent = sorted(price.spent for price in hostile)
    control = sorted(price.control for price in hostile)
    dearest = sorted(hostile, key=lambda price: price.spent)[-8:]
    heaviest = max(prices, key=lambda price: price.grown - PER_BYTE * price.size)
    place = len(spent) * 999 // 1000
    print(
        f"{len(prices)} cases, {dict(did)}; of the loop's time a hostile one took {spent[len(spent) // 2] / 1e3:.0f} µs"
        f" (median), {spent[place] / 1e6:.2f} ms (p99.9; {control[place] / 1e6:.2f} ms where nothing was sent);"
        f" the dearest {dearest}, the heaviest {heaviest}"
    )
    assert spent[place] - control[place] <= USUAL_SECONDS * 1e9
    assert dearest[-1].spent <= SECONDS * 1e9
    assert [price for price in prices if price.grown > max(MEMORY, PER_BYTE * price.size)] == []
    granted = {"Outcome", "Imported", "Leased", "MayWrite", "Descriptors", "Refused"}
    assert granted <= did.keys()
    assert did["cut"] > len(prices) / 20


def test_an_agent_serves_on_whatever_it_is_sent(besieged: tuple[Scene, Omega]):
    scene, omega = besieged
    if UNTIL is not None:
        last = int(UNTIL)
        round_of(scene, omega, SEED, range(last - last % ROUND, last + 1), alone=True)
        return
    prices: list[Price] = []
    did: Counter[str] = Counter()
    for number in range(ROUNDS):
        some, done = round_of(scene, omega, SEED, range(number * ROUND, (number + 1) * ROUND), alone=True)
        prices += some
        did += done
    judge(prices, did)


@pytest.mark.skipif(UNTIL is not None, reason="one round is asked for")
def test_others_are_served_while_it_is_sent(besieged: tuple[Scene, Omega]):
    scene, omega = besieged
    round_of(scene, omega, SEED + 1, range(2 * ROUND), alone=False)


@pytest.mark.skipif(UNTIL is not None, reason="one round is asked for")
def test_its_successor_takes_over_what_it_left(besieged: tuple[Scene, Omega]):
    """What hostile workers that still live have made an agent record, another agent can read, and goes on."""
    scene, omega = besieged
    for number in range(3):
        worker = hostile(scene)
        try:
            worker.do(f"feeder.run({SEED + 3}, range({number * ROUND}, {number * ROUND + 200}))")
            scene.agent.kill()
            scene.agent.process.wait()
            assert omega.strange_lines() == []
            scene.follow(silent=False)
            step(scene)
        finally:
            scene.dismiss(worker)
        assert omega.faults() == []


@pytest.mark.stress
def test_an_agent_serves_on_after_many_rounds(besieged: tuple[Scene, Omega]):
    scene, omega = besieged
    prices: list[Price] = []
    did: Counter[str] = Counter()
    for number in range(400):
        some, done = round_of(scene, omega, SEED + 2, range(number * ROUND, (number + 1) * ROUND), alone=True)
        prices += some
        did += done
    judge(prices, did)
