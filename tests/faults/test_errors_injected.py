"""Row 12: the k-th system call of the agent, or of a worker, fails as it does where something has run out.

``EMFILE`` where a descriptor is made, ``ENOMEM`` where memory is mapped, ``EIO`` and ``ENOSPC`` where a file is read or
written. The call succeeds all the same, or raises a typed error that names what ran out and what to do; what comes next
succeeds; the agent serves on, counts no mistake of its own, and Ω.

``ETHA_K=openat:1:EMFILE pytest tests/faults/test_errors_injected.py -k "few and agent and read"`` repeats a round.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Worker
from injection import Injected, needs_strace
from omega import Omega
from scene import Scene

pytestmark = needs_strace

SECONDS = 3
"""How long a call of these rounds may take."""

MAKES_A_DESCRIPTOR = ["EMFILE"]
WRITES = ["EIO", "ENOSPC"]

ERRORS = {
    "openat": MAKES_A_DESCRIPTOR,
    "socket": MAKES_A_DESCRIPTOR,
    "accept4": MAKES_A_DESCRIPTOR,
    "getsockopt": MAKES_A_DESCRIPTOR,  # of a peer's pidfd
    "pidfd_open": MAKES_A_DESCRIPTOR,
    "pidfd_getfd": MAKES_A_DESCRIPTOR,
    "pipe2": MAKES_A_DESCRIPTOR,
    "epoll_create1": MAKES_A_DESCRIPTOR,
    "eventfd2": MAKES_A_DESCRIPTOR,
    "dup": MAKES_A_DESCRIPTOR,
    "mmap": ["ENOMEM"],
    "mremap": ["ENOMEM"],
    "sendmsg": ["ENOBUFS", "ENOMEM"],
    "pread64": ["EIO"],
    "pwrite64": WRITES,
    "pwritev": WRITES,
    "pwritev2": WRITES,
    "ftruncate": WRITES,
    "fallocate": WRITES,
    "fdatasync": ["EIO"],
}
"""What each call may fail with, by its manual page, where a limit is met or a disk is full or broken."""

TRIED = """
def tried(source):
    try:
        exec(source, globals())
    except EthaError as error:
        return type(error).__name__, error.resource, error.holder, error.remedy
    except MemoryError:
        return "MemoryError", "memory", None, "the interpreter's own"
    return None
"""

DEEDS = {
    "connect": ("reader", "", f"another, _ = bootstrap_client(connection_timeout={SECONDS})\nanother.close()", ""),
    "register": (
        "owner",
        "ready = made(7)",
        f"extra = client.register_tensors('extra', ready, timeout={SECONDS})",
        "extra.close(timeout=5); del ready",
    ),
    "update": ("owner", "", f"with policy.update(timeout={SECONDS}): write(policy.version + 1)", ""),
    "read": ("reader", "", f"with policy.read(timeout={SECONDS}) as lease: stamps(lease)", ""),
    "subscribe": ("reader", "policy.close()", f"policy = client.subscribe('policy', timeout={SECONDS})", ""),
    "bell": ("reader", "extra = client.subscribe('policy')", "extra.fileno()", "extra.close()"),
    "close": (
        "owner",
        "extra = client.register_tensors('extra', made(7), timeout=5)",
        f"extra.close(timeout={SECONDS})",
        "",
    ),
    "rebind": (
        "owner",
        "fresh = made(policy.version + 1)",
        f"policy.rebind(fresh, timeout={SECONDS}); tensors = fresh",
        "del fresh",
    ),
}
"""Whose it is, what comes before, the call, and what clears up after it."""


def play(scene: Scene, omega: Omega, deed: str, on: str, step: str | None, directory: Path) -> Injected:
    """One call with one failure, and once more without."""
    actor_is, before, act, after = DEEDS[deed]
    actor: Worker = getattr(scene, actor_is)
    target = scene.agent.pid if on == "agent" else actor.pid
    kind, k, error = step.split(":") if step else ("", "", "")
    if before:
        actor.do(before)
    with Injected(target, f"{kind}:{k}" if step else None, directory, f"error={error}") as injection:
        told = actor.do(f"tried({act!r})")
    injection.fired = injection.failed > 0
    if told is not None:
        assert injection.fired, told
        name, resource, _, remedy = told
        assert resource, told
        assert remedy, told
        print(f"{step}: {name}: {resource}")
        assert actor.do(f"tried({act!r})") is None
    if after:
        actor.do(after)
    scene.version = scene.owner.do("policy.version")
    return injection


def round_at(room: tuple[Scene, Omega], deed: str, on: str, step: str | None, directory: Path) -> Injected:
    scene, omega = room
    try:
        injection = play(scene, omega, deed, on, step, directory)
        faults = [fault for fault in omega.faults() if not fault.startswith("the agent said")]
        said = omega.accept_said()  # it tells that a disk is full, and that it is not any more
        assert "Traceback" not in said
        assert "mistake" not in said
    except BaseException:
        print(f"ETHA_K={step} repeats this round")
        raise
    assert faults == [], f"ETHA_K={step} repeats this round"
    return injection


@pytest.fixture
def room(stage: tuple[Scene, Omega]) -> Iterator[tuple[Scene, Omega]]:
    """The stage; its agent, which has had reason to speak, is followed by one that has not."""
    scene, omega = stage
    scene.owner.do(TRIED)
    scene.reader.do(TRIED)
    yield stage
    omega.accept_said()
    scene.agent.errors.write_text("")
    omega.accept_said()


def steps_of(kinds: Counter) -> Iterator[str]:
    for kind, most in sorted(kinds.items()):
        for k, error in itertools.product(range(1, most + 1), ERRORS.get(kind, ())):
            if kind != "getsockopt" or k % 2 == 0:  # the first of a connection asks for its peer's uid
                yield f"{kind}:{k}:{error}"


@pytest.mark.parametrize("on", ["agent", "worker"])
@pytest.mark.parametrize("deed", DEEDS)
def test_a_few(room: tuple[Scene, Omega], deed: str, on: str, tmp_path: Path):
    every = list(steps_of(Counter(round_at(room, deed, on, None, tmp_path).steps)))
    seed = int(os.environ.get("ETHA_SEED", random.randrange(1 << 20)))
    chosen = random.Random(seed).sample(every, min(2, len(every)))
    if "ETHA_K" in os.environ:
        chosen = os.environ["ETHA_K"].split(",")
    print(f"ETHA_SEED={seed}: of {len(every)}: {chosen}")
    for step in chosen:
        round_at(room, deed, on, step, tmp_path)


@pytest.mark.stress
@pytest.mark.parametrize("on", ["agent", "worker"])
@pytest.mark.parametrize("deed", DEEDS)
def test_every_one(room: tuple[Scene, Omega], deed: str, on: str, tmp_path: Path):
    kinds: Counter = Counter()
    for _ in range(2):
        kinds |= Counter(round_at(room, deed, on, None, tmp_path).steps)
    fired = sum(round_at(room, deed, on, step, tmp_path).fired for step in steps_of(kinds))
    print(f"{deed}, {on}: {fired} calls failed of {len(list(steps_of(kinds)))} tried")
    assert fired > 0 or not any(steps_of(kinds))
