"""Row 27: interpreters end, and objects are collected, in any order: exit status 0, nothing on stderr, and Ω."""

from __future__ import annotations

import os
import random

import pytest
from counts import counts
from omega import Omega
from scene import Scene

MAKE = """
tensors = made(2)
mine = client.register_tensors('mine', tensors, version=2)
policy = client.subscribe('policy')
own = client.subscribe('mine')
fd = policy.fileno()
lease = policy.read()
other = own.read()
view = lease['8192'].view(-1)[1:]
array = other['3'].numpy()
module = torch.nn.Module()
module.weight = torch.nn.Parameter(lease['3'].float(), requires_grad=False)
module.cycle = [module, lease, policy, client, mine]
iterator = iter(own)
stepped = next(iterator)
"""

NAMES = [
    "mine",
    "policy",
    "own",
    "lease",
    "other",
    "view",
    "array",
    "module",
    "iterator",
    "stepped",
    "client",
    "tensors",
]

ENDS = {
    "lease": "lease.release()",
    "other": "other.release()",
    "policy": "policy.close()",
    "own": "own.close()",
    "iterator": "iterator.close()",
    "stepped": "stepped.release()",
}
"""What may be said before something is dropped; what is not released warns, as it should, and that is on stderr."""


def play(scene: Scene, chance: random.Random) -> str:
    """One interpreter's life; what it did, to be told where it went wrong."""
    worker = scene.worker(MAKE)
    story = ["gc.disable()"] * chance.randrange(2)
    for name in ("lease", "other", "stepped"):
        story.append(ENDS[name])
    chance.shuffle(story)
    for name in chance.sample(NAMES, chance.randrange(len(NAMES) + 1)):
        if chance.randrange(2) and name in ENDS:
            story.append(ENDS[name])
        story.append(f"del {name}")
        story += ["gc.collect()"] * (chance.randrange(3) == 0)
    story += ["threading.Thread(target=gc.collect).start()"] * (chance.randrange(4) == 0)
    try:
        for line in story:
            worker.do(line)
        status = worker.end()
        said = worker.errors.read_text()
    finally:
        scene.dismiss(worker)
    assert (status, said) == (0, ""), story
    return "; ".join(story)


@pytest.mark.parametrize("rounds", counts(10, 1000))
def test_in_any_order(stage: tuple[Scene, Omega], rounds: int):
    scene, omega = stage
    seed = int(os.environ.get("ETHA_SEED", random.randrange(1 << 20)))
    print(f"ETHA_SEED={seed}")
    chance = random.Random(seed)
    for _ in range(rounds):
        story = play(scene, chance)
        assert omega.faults() == [], story
