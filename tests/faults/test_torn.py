"""Row 28: the body of `update()` raises, or its owner dies in it, when part of the bytes has been written.

Readers get `TornError` or `OwnerDiedError`, never those bytes. The next good update mends what was torn.
"""

from __future__ import annotations

import os
import random

import pytest
from counts import counts
from omega import Omega
from scene import Scene

OWN = "tensors = made(0); mine = client.register_tensors('mine', tensors)"

HALF = """
def half(elements, end):
    with mine.update(timeout=20):
        flat = tensors['8192']
        flat[:elements] = 777
        end()
        flat.fill_(777)

def raises():
    raise ZeroDivisionError

def dies():
    os.kill(os.getpid(), signal.SIGKILL)
"""

WATCH = """
def watch():
    seen = []
    while True:
        found = look(20, seen[-1][0] + 1 if seen else 0, name='mine')
        if isinstance(found, str):
            return seen, found
        seen.append(found)
mine = client.subscribe('mine')
"""


def play(scene: Scene, end: str, elements: int) -> None:
    owner = scene.worker(OWN + HALF)
    try:
        scene.reader.do(WATCH)
        scene.reader.say("watch()")
        owner.say(f"half({elements}, {end})")
        seen, told = scene.reader.hear()
        assert seen in ([], [(0, [0])])
        if end == "dies":
            assert told == "OwnerDiedError"
        else:
            assert told == "TornError"
            with pytest.raises(Exception, match="ZeroDivisionError"):
                owner.hear()
            assert scene.reader.do("[look(0, name='mine'), look(0.1, 0, name='mine')]") == ["TornError"] * 2
            owner.do("with mine.update(timeout=5): write(1)")
            assert scene.reader.do("look(5, 1, name='mine')") == (1, [1])
        scene.reader.do("mine.close()")
    finally:
        scene.dismiss(owner)
    scene.owner.do("mine = client.register_tensors('mine', made(9), timeout=2); mine.close(timeout=5)")


@pytest.mark.parametrize("rounds", counts(3, 300))
@pytest.mark.parametrize("end", ["raises", "dies"])
def test_never_the_half_written(stage: tuple[Scene, Omega], end: str, rounds: int):
    scene, omega = stage
    seed = int(os.environ.get("ETHA_SEED", random.randrange(1 << 20)))
    print(f"ETHA_SEED={seed}")
    chance = random.Random(seed)
    for _ in range(rounds):
        play(scene, end, chance.choice((0, 1, 8191, 8192, chance.randrange(8192))))
        assert omega.faults() == []
