"""Row 7, its second half: a worker is stopped at every system call of a put, the queue's write lock in hand or not.

While it stands still, others that need the queue are told within their deadline who has it; leases are granted, a dead
reader's end, and the agent's heart beats. Let go on, it has put what it wanted to; and Ω.

``ETHA_K=pwrite64:1 pytest tests/faults/test_put_stopped.py -k few`` repeats a round.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from box import until
from harness import PATIENCE, Raised, Worker
from injection import Injected, needs_strace, sample, sweep
from omega import Omega
from scene import Scene

from etha.tensor_bus.command_queue import WriterTurn
from etha.tensor_bus.state import ClaimRecord

pytestmark = needs_strace

DEADLINE = 0.3
SLACK = 1.0
"""What a loaded box costs."""

IN_HAND = ("pwrite64:1", "pwritev:1")
"""LMDB writes its pages, whichever call it takes for it, under its lock."""

OWN = "mine = client.register_tensors('{name}', made(0))"
TIMED = """
def timed(call):
    began = time.monotonic()
    try:
        call()
    finally:
        print_took.append(time.monotonic() - began)
print_took = []
"""


class Stopped(Injected):
    """SIGSTOP at a step. The process stands still until SIGCONT, with strace beside it."""

    def __init__(self, pid: int, step: str | None, directory: Path) -> None:
        super().__init__(pid, step, directory, "signal=SIGSTOP")

    def stands(self) -> bool:
        return "stopped by SIGSTOP" in self.log.read_text(errors="replace")


def holder(scene: Scene) -> int:
    """Who has the turn to write the queue; 0 or less for nobody that could be named."""
    turn = WriterTurn(str(scene.runtime / "agent_rank0_command.lmdb.writer"))
    try:
        return turn._holder()
    finally:
        turn.close()


def held(scene: Scene, worker: Worker) -> list[str]:
    """Kinds of the claims of a worker."""
    return sorted(claim.kind for claim in scene.state.all(ClaimRecord).values() if claim.pid == worker.pid)


def others_go_on(scene: Scene, neighbour: Worker, doomed: Worker, held_by: int) -> None:
    began = time.monotonic()
    beat = scene.state.agent().heartbeat
    if held_by:
        with pytest.raises(Raised, match=r"^AgentTimeout:") as caught:
            neighbour.do("mine.publish()")
        assert DEADLINE <= time.monotonic() - began < DEADLINE + SLACK
        assert caught.value.holder.startswith(f"pid {held_by} ")
        assert caught.value.resource.endswith(".writer")
    else:
        neighbour.do("mine.publish()")
    assert scene.reader.do("look(5)") == (scene.version, [scene.version])
    assert held(scene, doomed) == ["import", "lease"]
    doomed.kill()
    until(lambda: held(scene, doomed) == [])
    until(lambda: scene.state.agent().heartbeat > beat)


def play(scene: Scene, step: str | None, directory: Path) -> tuple[Injected, bool]:
    """One put; whether it was stopped, and with the write lock in hand."""
    neighbour = scene.worker(OWN.format(name="neighbour") + f"; client._link.patience = {DEADLINE}")
    victim = scene.worker(OWN.format(name="victim"))
    doomed = scene.worker("policy = client.subscribe('policy'); lease = policy.read()")
    in_hand = False
    try:
        with Stopped(victim.pid, step, directory) as injection:
            victim.say("mine.publish()")
            until(lambda: injection.stands() or victim.heard())
            injection.fired = injection.stands()
            if injection.fired:
                held_by = holder(scene)
                in_hand = held_by == victim.pid
                others_go_on(scene, neighbour, doomed, held_by)
            victim.kill(signal.SIGCONT)  # in any case: it may stand still in the midst of its answer
            assert victim.hear(PATIENCE) == 1
        assert scene.reader.do(
            "seen = client.subscribe('victim'); value = look(5, 1, name='seen'); seen.close(); value"
        ) == (
            1,
            [0],
        )
        assert neighbour.do("mine.publish()") >= 1
    finally:
        for worker in (neighbour, victim, doomed):
            worker.kill(signal.SIGCONT)
            scene.dismiss(worker)
    return injection, in_hand


def round_at(stage: tuple[Scene, Omega], step: str | None, directory: Path) -> tuple[Injected, bool]:
    scene, omega = stage
    try:
        played = play(scene, step, directory)
        faults = omega.faults()
    except BaseException:
        print(f"ETHA_K={step} repeats this round")
        raise
    assert faults == [], f"ETHA_K={step} repeats this round"
    return played


def test_a_few_steps(stage: tuple[Scene, Omega], tmp_path: Path):
    steps = round_at(stage, None, tmp_path)[0].steps
    (certain,) = [step for step in IN_HAND if step.partition(":")[0] in steps][:1]
    injection, in_hand = round_at(stage, certain, tmp_path)
    assert injection.fired
    assert in_hand
    for step in sample(steps, 2):
        round_at(stage, step, tmp_path)


@pytest.mark.stress
def test_every_step(stage: tuple[Scene, Omega], tmp_path: Path):
    steps = {**round_at(stage, None, tmp_path)[0].steps, **round_at(stage, None, tmp_path)[0].steps}
    held = []

    def stop(step: str) -> bool:
        injection, in_hand = round_at(stage, step, tmp_path)
        held.append(in_hand)
        return injection.fired

    stops = sweep(steps, stop)
    print(f"stopped at {stops} steps of {len(steps)} kinds, {sum(held)} with the queue in hand")
    assert sum(held) > 0
