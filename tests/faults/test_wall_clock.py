"""Row 22: the wall clock is a day ahead, a day behind, or jumps from one to the other with every look.

No lease, deadline or verdict on who lives may change by it. A library that is loaded before everything else answers for
the wall clock: time(2), gettimeofday(2), and clock_gettime(2) of ``CLOCK_REALTIME``. The other clocks are the kernel's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from box import until
from harness import Agent, Raised
from omega import Omega
from scene import Scene

from etha.tensor_bus.state import ClaimRecord

LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* 1: ahead, 2: behind, 3: now this, now that */
static long off(void)
{
    static __thread unsigned looks;
    const char *how = getenv("WALL_CLOCK");
    int kind = how ? how[0] - '0' : 0;
    return kind == 1 ? 86400 : kind == 2 ? -86400 : kind == 3 ? (looks++ % 2 ? 86400 : -86400) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int status = syscall(SYS_clock_gettime, clock, now);
    if (status == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += off();
    return status;
}

int gettimeofday(struct timeval *now, void *zone)
{
    struct timespec found;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out)
{
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (out)
        *out = found.tv_sec;
    return found.tv_sec;
}
"""

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

HOURS = {"ahead": "1", "behind": "2", "to and fro": "3"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wall")
    (directory / "wall.c").write_text(LIBRARY)
    shared = directory / "wall.so"
    subprocess.run(["cc", "-O1", "-fPIC", "-shared", "-o", shared, directory / "wall.c"], check=True)
    return shared


@pytest.fixture(params=HOURS)
def elsewhen(
    request: pytest.FixtureRequest, library: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Scene, Omega, str]]:
    """A scene whose agent lives in another day than its workers."""
    how = HOURS[request.param]

    class Elsewhen(Agent):
        command = ("env", f"LD_PRELOAD={library}", f"WALL_CLOCK={how}", sys.executable, "-m", "etha", "agent")

    scene = Scene(tmp_path_factory.mktemp("faults"), agent=Elsewhen)
    omega = Omega(scene)
    yield scene, omega, how
    omega.close()
    scene.close()


def test_the_library_lies(library: Path):
    """Else all of this would show nothing."""
    for how, hours in (("1", {24}), ("2", {-24}), ("3", {-24, 24})):
        code = "import time; print([round((time.time() - float(__import__('sys').argv[1])) / 3600) for _ in range(2)])"
        done = subprocess.run(
            [sys.executable, "-c", code, str(time.time())],
            env={**os.environ, "LD_PRELOAD": str(library), "WALL_CLOCK": how},
            capture_output=True,
            text=True,
            check=True,
        )
        assert set(eval(done.stdout)) == hours


def test_nothing_changes(elsewhen: tuple[Scene, Omega, str]):
    scene, omega, _ = elsewhen
    scene.step()
    assert scene.reader.do("lease = policy.read(); lease.version") == scene.version
    # A deadline is as long as it is, whichever side keeps it.
    for seconds in (0.3, 1.0):
        began = time.monotonic()
        assert scene.owner.do(f"step({seconds})") == "LeaseTimeout"
        assert seconds <= time.monotonic() - began < seconds * 1.1 + 1.0
    # A holder that stands still is alive, and an orphaned claim is held; a death is seen at once.
    scene.reader.kill(signal.SIGSTOP)
    with pytest.raises(Raised, match=r"^LeaseTimeout:") as caught:
        scene.owner.do("policy.update(timeout=0.3).__enter__()")
    assert f"pid {scene.reader.pid} " in caught.value.holder
    scene.reader.kill(signal.SIGCONT)
    doomed = scene.worker("lease = client.subscribe('policy').read()")
    until(lambda: sum(claim.kind == "lease" for claim in scene.state.all(ClaimRecord).values()) == 2)
    died = time.monotonic()
    scene.dismiss(doomed)
    until(lambda: sum(claim.kind == "lease" for claim in scene.state.all(ClaimRecord).values()) == 1, 5)
    assert time.monotonic() - died < 0.5
    scene.reader.do("lease.check(); lease.release()")
    scene.step()
    assert omega.faults() == []
    # Nor does a successor judge anything by it.
    scene.follow()
    scene.step()
    assert omega.faults() == []
