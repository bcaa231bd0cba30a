"""Row 5: eight agents start at once on one path, over the files of one that was killed and whose workers live.

Exactly one serves. The others say who it is and touch none of its files. The workers go on with it, and know nothing of
the race.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from counts import counts
from harness import Raised, Worker
from omega import Omega
from scene import Scene

RACERS = 8

RACE = """
from etha.tensor_bus.agent import TensorBusAgent

def race(moment):
    time.sleep(max(0.0, moment - time.monotonic()))
    agent = TensorBusAgent(0)
    signal.signal(signal.SIGTERM, lambda *_: agent.stop())
    agent.run(lambda: print(repr(("ok", "serves")), flush=True))
"""


def contents(directory: Path) -> dict[str, tuple[int, ...]]:
    """What stands there; size and times are the agent's that serves."""
    found = {path.name: path.lstat() for path in directory.iterdir()}
    return {name: (each.st_ino, each.st_mode, each.st_uid) for name, each in found.items()}


def race(scene: Scene, chance: random.Random) -> None:
    """Eight at once, from processes that have imported all they need."""
    racers = [Worker(scene.environment, scene.directory) for _ in range(RACERS)]
    try:
        for racer in racers:
            scene.strays.add(racer.pid)
            racer.do("import signal, time\n" + RACE)
        moment = time.monotonic() + 0.02
        for racer in racers:
            racer.say(f"race({moment + chance.choice((0, 0, chance.random() * 0.01))})")
        serving, refused = [], []
        for racer in racers:
            try:
                assert racer.hear() == "serves"
                serving.append(racer)
                there = contents(scene.runtime)
            except Raised as raised:
                refused.append(raised)
        assert len(serving) == 1, refused
        (winner,) = serving
        assert {(each.kind, each.holder) for each in refused} == {("AgentRunning", f"pid {winner.pid}")}
        assert {each.resource for each in refused} <= {str(path) for path in scene.runtime.iterdir()}
        assert contents(scene.runtime) == there
        scene.step()
        assert scene.reader.do(f"look(5, {scene.version})") == (scene.version, [scene.version])
        winner.kill(chance.choice((signal.SIGTERM, signal.SIGKILL)))
        assert winner.end() <= 0
        assert [racer.errors.read_text() for racer in racers] == [""] * RACERS
    finally:
        for racer in racers:
            racer.destroy()


@pytest.mark.parametrize("rounds", counts(3, 1000))
def test_one_serves(stage: tuple[Scene, Omega], rounds: int):
    scene, omega = stage
    seed = int(os.environ.get("ETHA_SEED", random.randrange(1 << 20)))
    print(f"ETHA_SEED={seed}")
    chance = random.Random(seed)
    for _ in range(rounds):
        scene.end_agent()
        race(scene, chance)
        scene.follow()
        assert omega.faults() == []
