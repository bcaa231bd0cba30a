"""Row 12: LMDB's table of readers is full, of the dead or of one that lives. Calls end well or typed, and go on."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from box import until
from omega import Omega
from scene import Scene

TAKE_ALL = """
import os, signal, sys
import lmdb
env = lmdb.open(sys.argv[1], subdir=False, readonly=True, create=False, max_spare_txns=0)
held = []
try:
    while True:
        held.append(env.begin())
except lmdb.ReadersFullError:
    pass
print(len(held), flush=True)
sys.stdin.read()
"""

CALLS = {
    "state": ("reader", "attempt(lambda: client.subscribe('policy', timeout=3).close())"),
    "command": ("owner", "attempt(lambda: client.register_tensors('extra', made(2), timeout=3).close(timeout=3))"),
}


@pytest.mark.parametrize("which", CALLS)
def test_full_of_one_that_lives_and_then_of_the_dead(stage: tuple[Scene, Omega], which: str):
    scene, omega = stage
    who, call = CALLS[which]
    worker = getattr(scene, who)
    path = scene.runtime / f"agent_rank0_{which}.lmdb"
    with subprocess.Popen(
        [sys.executable, "-c", TAKE_ALL, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as hog:
        try:
            assert int(hog.stdout.readline()) > 1000
            # Whoever has read before has a slot of its own, and goes on; whoever has none is told so.
            assert worker.do(call) in (None, "SystemLimit")
            stranger = "attempt(lambda: bootstrap_client(connection_timeout=1)[0].close())"
            assert worker.do(stranger) in (None, "SystemLimit", "AgentStopped")
        finally:
            hog.send_signal(signal.SIGKILL)
            hog.wait()
    until(lambda: omega.dead_readers() == [], 5)
    assert worker.do(call) is None
    said = omega.accept_said()
    assert "Traceback" not in said, said
    scene.agent.errors.write_text("")
    omega.accept_said()
    assert omega.faults() == []
