"""Row 3: the agent is killed at every system call of every command and claim, and another follows.

What was acknowledged has happened exactly once; the call that was under way is served by the successor; what ran is
still protected; the successor serves within `SERVING_SECONDS`; and Ω. Where k is even the actor stands still until the
*other* side has called first.

``ETHA_K=pwrite64:2 pytest tests/faults/test_agent_killed.py -k "few and publish"`` repeats a round.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from harness import PATIENCE, Worker
from injection import KilledAt, died, needs_strace, sample, sweep
from omega import Omega
from scene import SERVING_SECONDS, Scene

pytestmark = needs_strace

QUIET_SECONDS = 0.3
"""For what the agent still does once it has answered."""

CERTAIN = "recvmsg:1"
"""Every deed makes the agent do this: the packet, or the ring, that asks for it."""


class Deed:
    """Something that a worker asks of the agent.

    Attributes:
        actor: whose call it is.
        act: the call.
    """

    actor = "owner"
    act = ""

    def before(self, scene: Scene) -> None:
        """Come to where it makes sense."""

    def other(self, scene: Scene) -> None:
        """The other side calls first after the restart; whatever it gets must make sense."""

    def after(self, scene: Scene, answer: object) -> None:
        """The call has returned; what must be so, and back to rest."""


class Register(Deed):
    act = "extra = client.register_tensors('extra', ready, version=7, timeout=20); extra.generation"

    def before(self, scene):
        scene.owner.do("ready = made(7)")

    def other(self, scene):
        got = scene.reader.do("extra = attempt(lambda: client.subscribe('extra', timeout=0.2))\nrepr(extra)")
        if got != "'NoPublication'":
            assert scene.reader.do("value = look(5, name='extra')\nextra.close()\nvalue") == (7, [7])

    def after(self, scene, answer):
        assert scene.named("extra") == [answer]
        scene.reader.do("extra = client.subscribe('extra', timeout=5)")
        assert scene.reader.do("value = look(5, name='extra')\nextra.close()\nvalue") == (7, [7])
        scene.owner.do("extra.close(timeout=5)")


class Publish(Deed):
    act = "policy.publish()"

    def other(self, scene):
        found = scene.reader.do("look(0.2)")
        assert found[0] - scene.version in (0, 1)
        assert found[1] == [scene.version]

    def after(self, scene, answer):
        assert answer == scene.version + 1
        assert scene.reader.do(f"look(5, {answer})") == (answer, [scene.version])
        scene.version = answer
        scene.step()


class Enter(Deed):
    act = "update.__enter__(); None"

    def before(self, scene):
        scene.owner.do("update = policy.update(timeout=20)")

    def other(self, scene):
        assert scene.reader.do("look(0.2)") in ("LeaseTimeout", (scene.version, [scene.version]))

    def after(self, scene, answer):
        assert scene.reader.do("look(0.2)") == "LeaseTimeout"
        scene.owner.do("write(policy.version + 1); update.__exit__(None, None, None)")
        scene.version += 1
        assert scene.reader.do(f"look(5, {scene.version})") == (scene.version, [scene.version])


class Leave(Enter):
    act = "update.__exit__(None, None, None); policy.version"

    def before(self, scene):
        scene.owner.do("update = policy.update(timeout=20); update.__enter__(); write(policy.version + 1)")

    def other(self, scene):
        version = scene.version + 1
        assert scene.reader.do("look(0.2)") in ("LeaseTimeout", (version, [version]))

    def after(self, scene, answer):
        scene.version += 1
        assert answer == scene.version
        assert scene.reader.do(f"look(5, {answer})") == (answer, [answer])


class Read(Deed):
    actor = "reader"
    act = "lease = policy.read(timeout=20); lease.version"

    def other(self, scene):
        answer = scene.owner.do("step(1.0)")
        if answer != "LeaseTimeout":
            scene.version += 1
            assert answer == scene.version

    def after(self, scene, answer):
        assert scene.owner.do("step(1.0)") == "LeaseTimeout"
        assert scene.reader.do("lease.check(); (lease.version, stamps(lease))") == (answer, [answer])
        assert answer == scene.version
        scene.reader.do("lease.release()")
        scene.step()


class Release(Deed):
    actor = "reader"
    act = "lease.release()"

    def before(self, scene):
        scene.reader.do("lease = policy.read(timeout=20)")

    other = Read.other

    def after(self, scene, answer):
        # A release is one unanswered send. One that the agent had not read when it died is made up for when its reader
        # next calls; until then the lease stands, and who waits for it is told by whom it is held.
        assert scene.reader.do("look(5)") == (scene.version, [scene.version])
        scene.step()


class Subscribe(Deed):
    actor = "reader"
    act = "extra = client.subscribe('policy', timeout=20)"
    other = Read.other

    def after(self, scene, answer):
        scene.step()
        expected = (scene.version, [scene.version])
        assert scene.reader.do("value = look(5, name='extra')\nextra.close()\nvalue") == expected


class Close(Deed):
    act = "extra.close(timeout=20)"

    def before(self, scene):
        scene.owner.do("extra = client.register_tensors('extra', made(3), timeout=5)")

    def other(self, scene):
        got = scene.reader.do("extra = attempt(lambda: client.subscribe('extra', timeout=0.2))\nrepr(extra)")
        if "Subscription" in got:
            found = scene.reader.do("value = look(0.2, name='extra')\nextra.close()\nvalue")
            assert found in ((0, [3]), "PublicationClosed")
        else:
            assert got in ("'NoPublication'", "'StaleHandle'")

    def after(self, scene, answer):
        assert scene.named("extra") == []
        scene.owner.do("extra = client.register_tensors('extra', made(3), timeout=5); extra.close(timeout=5)")


class Rebind(Deed):
    act = "policy.rebind(fresh, timeout=20); tensors = fresh; policy.version"

    def before(self, scene):
        scene.owner.do("fresh = made(policy.version + 1)")

    def other(self, scene):
        versions = (scene.version, scene.version + 1)
        assert scene.reader.do("look(0.2)") in ("LeaseTimeout", *((version, [version]) for version in versions))

    def after(self, scene, answer):
        scene.version += 1
        assert answer == scene.version
        assert scene.reader.do(f"look(5, {answer})") == (answer, [answer])
        scene.owner.do("del fresh")


class Suspend(Deed):
    """The reader waits for the next version all the while, and so unmaps when it is asked to."""

    act = "policy.suspend(timeout=20)"

    def before(self, scene):
        scene.reader.say(f"look(50, {scene.version + 1})")

    def after(self, scene, answer):
        assert scene.recorded().suspended
        assert not scene.reader.heard()
        scene.owner.do("write(policy.version + 1); policy.resume(timeout=5)")
        scene.version += 1
        assert scene.reader.hear() == (scene.version, [scene.version])


class Resume(Deed):
    act = "policy.resume(timeout=20)"

    def before(self, scene):
        scene.reader.say(f"look(50, {scene.version + 1})")
        scene.owner.do("policy.suspend(timeout=5); write(policy.version + 1)")

    def after(self, scene, answer):
        scene.version += 1
        assert scene.reader.hear() == (scene.version, [scene.version])
        assert not scene.recorded().suspended


DEEDS = (Register, Publish, Enter, Leave, Read, Release, Subscribe, Close, Rebind, Suspend, Resume)


def each(deed: type[Deed]) -> str:
    return deed.__name__.lower()


def play(scene: Scene, deed: Deed, step: str | None, directory: Path) -> KilledAt:
    """Do it while the agent dies at ``step``, and follow it up. The injection, with `fired` set."""
    actor: Worker = getattr(scene, deed.actor)
    deed.before(scene)
    agent = scene.agent
    pidfd = os.pidfd_open(agent.pid)
    began = time.monotonic()
    try:
        with KilledAt(agent.pid, step, directory) as injection:
            actor.say(deed.act)
            while not (dead := died(pidfd, 0.0)) and not actor.heard():
                if time.monotonic() - began > PATIENCE:
                    raise TimeoutError(f"{deed.act}: no answer, and nobody has died")
                died(pidfd, 0.01)
            injection.fired = dead or died(pidfd, QUIET_SECONDS)
    finally:
        os.close(pidfd)
    if injection.fired:
        other_first = step.endswith(("2", "4", "6", "8", "0"))
        if other_first:
            actor.kill(signal.SIGSTOP)
        began = time.monotonic()
        scene.follow()
        if other_first:
            deed.other(scene)
            actor.kill(signal.SIGCONT)
    answer = actor.hear()
    if injection.fired and not other_first:
        scene.serving.append(time.monotonic() - began)
    deed.after(scene, answer)
    return injection


def round_at(stage: tuple[Scene, Omega], deed: Deed, step: str | None, directory: Path) -> KilledAt:
    """One round, and Ω."""
    scene, omega = stage
    try:
        injection = play(scene, deed, step, directory)
        faults = omega.faults()
    except BaseException:
        print(f"ETHA_K={step} repeats this round")
        raise
    assert faults == [], f"ETHA_K={step} repeats this round"
    return injection


def tell_serving(scene: Scene) -> None:
    times = sorted(scene.serving)
    if times:
        print(f"served after {times[len(times) // 2]:.2f} s (median of {len(times)}), {times[-1]:.2f} s (worst)")
        assert times[len(times) // 2] <= SERVING_SECONDS


@pytest.mark.parametrize("deed", DEEDS, ids=each)
def test_a_few_steps(stage: tuple[Scene, Omega], deed: type[Deed], tmp_path: Path):
    steps = round_at(stage, deed(), None, tmp_path).steps
    for step in sample(steps, 1):
        round_at(stage, deed(), step, tmp_path)
    assert round_at(stage, deed(), CERTAIN, tmp_path).fired


@pytest.mark.stress
@pytest.mark.parametrize("deed", DEEDS, ids=each)
def test_every_step(stage: tuple[Scene, Omega], deed: type[Deed], tmp_path: Path):
    steps = {**round_at(stage, deed(), None, tmp_path).steps, **round_at(stage, deed(), None, tmp_path).steps}
    kills = sweep(steps, lambda step: round_at(stage, deed(), step, tmp_path).fired)
    print(f"{each(deed)}: killed at {kills} steps of {len(steps)} kinds")
    tell_serving(stage[0])
