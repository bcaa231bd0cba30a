"""The test of the test: Ω catches each of thirteen planted faults by name, and is content again without it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from omega import Omega
from scene import Scene

HOLD_READER_SLOT = """
import lmdb, os, signal, sys
env = lmdb.open(sys.argv[1], subdir=False, readonly=True)
with env.begin():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@contextmanager
def descriptor(scene: Scene, omega: Omega) -> Iterator[str]:
    """A connection that never says who it is holds one of the agent's descriptors."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(str(scene.runtime / "agent_rank0_command.lmdb.sock"))
        yield "descriptors: more"


@contextmanager
def mapping(scene: Scene, omega: Omega) -> Iterator[str]:
    scene.owner.do("forgotten = client.register_tensors('forgotten', made(1))")
    yield "mappings: more"
    scene.owner.do("forgotten.close(timeout=5)")


@contextmanager
def publication(scene: Scene, omega: Omega) -> Iterator[str]:
    scene.owner.do("forgotten = client.register_tensors('forgotten', made(1))")
    yield "publications: more {'forgotten: ready'"
    scene.owner.do("forgotten.close(timeout=5)")


@contextmanager
def lease(scene: Scene, omega: Omega) -> Iterator[str]:
    scene.reader.do("forgotten = policy.read()")
    yield "claims: more {'lease of policy'"
    scene.reader.do("forgotten.release()")


@contextmanager
def stuck_import(scene: Scene, omega: Omega) -> Iterator[str]:
    scene.reader.do("forgotten = client.subscribe('policy')")
    yield "claims: more {'import of policy'"
    scene.reader.do("forgotten.close()")


@contextmanager
def shared_file(scene: Scene, omega: Omega) -> Iterator[str]:
    path = Path(f"/dev/shm/torch_{scene.owner.pid}_1_1")
    path.write_bytes(b"")
    yield f"new files: ['{path}']"
    path.unlink()


@contextmanager
def stale_socket(scene: Scene, omega: Omega) -> Iterator[str]:
    path = scene.runtime / "agent_rank1_command.lmdb.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(str(path))
    yield f"new files: ['{path}']"
    path.unlink()


@contextmanager
def client(scene: Scene, omega: Omega) -> Iterator[str]:
    scene.owner.do("forgotten, _ = bootstrap_client()")
    yield "clients: more"
    scene.owner.do("forgotten.close()")


@contextmanager
def corrupted_byte(scene: Scene, omega: Omega) -> Iterator[str]:
    scene.owner.do("tensors['8192'].view(torch.uint8)[12345] ^= 1")
    yield "a reader sees"
    scene.owner.do("write(policy.version)")


@contextmanager
def wrong_version(scene: Scene, omega: Omega) -> Iterator[str]:
    scene.owner.do("with policy.update(): write(policy.version + 1)")
    yield "was acknowledged"
    scene.version += 1


@contextmanager
def zombie(scene: Scene, omega: Omega) -> Iterator[str]:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    yield f"zombies: [{child.pid}]"
    child.wait()


@contextmanager
def growing_queue(scene: Scene, omega: Omega) -> Iterator[str]:
    """A client that stopped in a read transaction keeps every page of the queue from being used again."""
    source = """
pinned = client._link.queue._env.begin()
for _ in range(200):
    policy.publish()
"""
    scene.owner.do(source)
    scene.version += 200
    scene.owner.do("write(policy.version)")
    yield "the queue's file has grown"
    scene.owner.do("pinned.abort()")
    omega.accept_queue()


PLANTED = (
    descriptor,
    mapping,
    publication,
    lease,
    stuck_import,
    shared_file,
    stale_socket,
    client,
    corrupted_byte,
    wrong_version,
    zombie,
    growing_queue,
)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_caught(stage: tuple[Scene, Omega], plant, monkeypatch):
    monkeypatch.setattr("omega.PATIENCE_SECONDS", 0.5)
    scene, omega = stage
    with plant(scene, omega) as expected:
        assert any(expected in fault for fault in omega.faults())
    monkeypatch.undo()
    assert omega.faults() == []


def test_a_dead_reader_of_the_files_is_caught(stage: tuple[Scene, Omega]):
    """The agent frees its slot with its next heartbeat, and until then it is seen."""
    scene, omega = stage
    scene.agent.kill(signal.SIGSTOP)
    try:
        for path in ("agent_rank0_command.lmdb", "agent_rank0_state.lmdb"):
            before = omega.dead_readers()
            done = subprocess.run([sys.executable, "-c", HOLD_READER_SLOT, str(scene.runtime / path)], check=False)
            assert done.returncode == -signal.SIGKILL
            assert len(omega.dead_readers()) == len(before) + 1
    finally:
        scene.agent.kill(signal.SIGCONT)
    assert omega.faults() == []
