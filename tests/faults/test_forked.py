"""Row 10: a worker that holds leases and owns a publication forks; its child ends before it or after it.

The child gets a typed error from everything that it inherited. What the parent holds it holds until it ends, and no
longer: a child that lives on keeps nothing of it alive.
"""

from __future__ import annotations

import os
import signal

import pytest
from box import until
from counts import counts
from omega import Omega
from scene import Scene

from etha.tensor_bus.state import ClaimRecord

HOLD = """
policy = client.subscribe('policy')
leases = [policy.read() for _ in range(10)]
mine = client.register_tensors('mine', made(3))
"""

FORK = """
def use():
    uses = [policy.read, lambda: leases[0]['3'], leases[0].check, mine.publish, mine.close,
            lambda: client.subscribe('policy'), lambda: client.register_tensors('theirs', made(1))]
    return [attempt(call) for call in uses]

def fork():
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(theirs, repr(use()).encode())
        os.close(theirs)
        if ending == 'last':
            signal.pause()
        os._exit(0) if ending == 'exit' else os.kill(os.getpid(), signal.SIGKILL)
    os.close(theirs)
    with os.fdopen(ours, 'rb') as pipe:
        told = eval(pipe.read())
    return child, told
"""


def held(scene: Scene) -> int:
    return sum(claim.kind == "lease" for claim in scene.state.all(ClaimRecord).values())


def play(scene: Scene, ending: str, parent_ends: str) -> None:
    parent = scene.worker(HOLD + FORK + f"ending = {ending!r}")
    child = 0
    try:
        child, told = parent.do("fork()")
        assert told == ["ForkedClient"] * 7
        if ending != "last":
            status = parent.do(f"os.waitpid({child}, 0)[1]")
            assert status == (0 if ending == "exit" else signal.SIGKILL)
            child = 0
        # The parent has lost nothing by it.
        assert held(scene) == 10
        assert scene.owner.do("step(0)") == "LeaseTimeout"
        assert parent.do("[lease.check() for lease in leases]; stamps(leases[0])") == [scene.version]
        assert parent.do("mine.publish()") == 1
        if parent_ends == "exit":
            assert parent.end() == 0
            assert parent.errors.read_text() == ""
        else:
            parent.kill()
        until(lambda: held(scene) == 0, 5)
        scene.dismiss(parent)
        scene.step()
        scene.owner.do("mine = client.register_tensors('mine', made(4), timeout=2); mine.close(timeout=5)")
        if child:
            os.kill(child, 0)  # it still lives
    finally:
        if parent in scene.workers:
            scene.dismiss(parent)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize("rounds", counts(1, 100))
@pytest.mark.parametrize("parent_ends", ["exit", "kill"])
@pytest.mark.parametrize("ending", ["exit", "signal", "last"])
def test_the_parents_own_and_nobody_elses(stage: tuple[Scene, Omega], ending: str, parent_ends: str, rounds: int):
    scene, omega = stage
    for _ in range(rounds):
        play(scene, ending, parent_ends)
        assert omega.faults() == []
