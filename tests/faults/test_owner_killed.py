"""The owner is killed at every system call of what it does with a publication. Row 1, and the first half of row 4.

Readers see whole versions and then a typed error; the name is free again, in time; and Ω, with the same agent. It
runs, stands still meanwhile (so that commit, ring and descriptors wait for it, from an owner that is dead by then), or
is dead itself and followed by another.

``ETHA_K=pwrite64:2 pytest tests/faults/test_owner_killed.py -k "few and publish"`` repeats a round.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from harness import PATIENCE
from injection import KilledAt, died, needs_strace, sample, sweep
from omega import Omega
from scene import Scene, is_whole

pytestmark = needs_strace

FREE_SECONDS = 2.0
"""Within this a dead owner's name is free again."""

QUIET_SECONDS = 0.1
"""For what it still does once it has answered."""

WATCH = """
victim = client.subscribe('victim', timeout=20)
def watch():
    seen = []
    while True:
        found = look(20, seen[-1][0] + 1 if seen else 0, name='victim')
        if isinstance(found, str):
            return seen, found
        seen.append(found)
"""
"""Every version that a reader gets to see, and how it ends."""

ENDS = {"OwnerDiedError", "PublicationClosed", "StaleHandle"}

DEEDS = {
    "register": ("", "victim = client.register_tensors('victim', ready, timeout=20)"),
    "publish": ("", "victim.publish()"),
    "update": ("", "with victim.update(timeout=20): write(1)"),
    "close": ("", "victim.close(timeout=20)"),
    "rebind": ("fresh = made(1)", "victim.rebind(fresh, timeout=20)"),
    "suspend": ("", "victim.suspend(timeout=20)"),
    "resume": ("victim.suspend(timeout=20); write(1)", "victim.resume(timeout=20)"),
}
"""What comes before, and what the owner dies in."""

REGISTERED = "tensors = made(0)\nvictim = client.register_tensors('victim', tensors)"


def play(scene: Scene, deed: str, step: str | None, agent: str, directory: Path) -> KilledAt:
    """One owner's life: it does the deed and dies in it, or else after it."""
    before, act = DEEDS[deed]
    watched = deed != "register"
    victim = scene.worker("ready = made(0)" if deed == "register" else REGISTERED)
    pidfd = os.pidfd_open(victim.pid)
    try:
        if watched:
            scene.reader.do(WATCH)
            scene.reader.say("watch()")
        if before:
            victim.do(before)
        if agent == "stopped":
            scene.agent.kill(signal.SIGSTOP)
        elif agent == "dead":
            scene.end_agent()
        with KilledAt(victim.pid, step, directory) as injection:
            victim.say(act)
            # Nobody answers a waiting call while the agent is not there: then the owner is killed in its wait.
            seconds = PATIENCE if agent == "runs" else 0.3
            waited = 0.0
            while waited < seconds and not victim.heard() and not injection.fired:
                injection.fired = died(pidfd, 0.01)
                waited += 0.01
            injection.fired = injection.fired or died(pidfd, QUIET_SECONDS)  # its pipe ends before it does
        if not injection.fired and agent == "runs":
            victim.hear()
    finally:
        os.close(pidfd)
        scene.dismiss(victim)
        if agent == "stopped":
            scene.agent.kill(signal.SIGCONT)
        elif agent == "dead":
            scene.follow()
    if watched:
        seen, end = scene.reader.hear()
        assert all(is_whole(found) or (deed == "publish" and found == (1, [0])) for found in seen), seen
        assert [version for version, _ in seen] in ([], [0], [0, 1], [1])
        assert end in ENDS
        scene.reader.do("victim.close()")
    scene.owner.do(f"victim = client.register_tensors('victim', made(9), timeout={FREE_SECONDS})")
    scene.owner.do("victim.close(timeout=5)")
    return injection


def round_at(stage: tuple[Scene, Omega], deed: str, step: str | None, agent: str, directory: Path) -> KilledAt:
    """One round, and Ω."""
    scene, omega = stage
    pid = scene.agent.pid
    try:
        injection = play(scene, deed, step, agent, directory)
        assert agent == "dead" or scene.agent.pid == pid
        faults = omega.faults()
    except BaseException:
        print(f"ETHA_K={step} repeats this round")
        raise
    assert faults == [], f"ETHA_K={step} repeats this round"
    return injection


@pytest.mark.parametrize("deed", DEEDS)
def test_a_few_steps(stage: tuple[Scene, Omega], deed: str, tmp_path: Path):
    steps = round_at(stage, deed, None, "runs", tmp_path).steps
    fired = [round_at(stage, deed, step, "runs", tmp_path).fired for step in sample(steps, 2)]
    assert any(fired)


@pytest.mark.parametrize("agent", ["stopped", "dead"])
@pytest.mark.parametrize("deed", ["register", "publish", "rebind"])
def test_a_few_steps_that_no_agent_sees(stage: tuple[Scene, Omega], deed: str, agent: str, tmp_path: Path):
    steps = round_at(stage, deed, None, agent, tmp_path).steps
    for step in sample(steps, 1):
        round_at(stage, deed, step, agent, tmp_path)


@pytest.mark.stress
@pytest.mark.parametrize("agent", ["runs", "stopped", "dead"])
@pytest.mark.parametrize("deed", DEEDS)
def test_every_step(stage: tuple[Scene, Omega], deed: str, agent: str, tmp_path: Path):
    steps = {}
    for _ in range(2):
        steps |= round_at(stage, deed, None, agent, tmp_path).steps
    kills = sweep(steps, lambda step: round_at(stage, deed, step, agent, tmp_path).fired)
    print(f"{deed}, agent {agent}: killed at {kills} steps of {len(steps)} kinds")
