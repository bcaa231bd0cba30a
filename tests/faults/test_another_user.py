"""Row 18: another user of the box tries everything that the kernel lets one try. Not one byte of it is parsed.

It connects, opens each file of the agent's and of a worker's, and replays descriptor numbers and handles.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omega import Omega
from scene import Scene

NOBODY = 65534

ATTEMPTS = f"""
import ctypes, os, socket, sys
directory, pids, command = sys.argv[1], list(map(int, sys.argv[2].split(","))), sys.argv[3]
libc = ctypes.CDLL(None, use_errno=True)
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
told = []

def attempt(what, call):
    try:
        call()
        told.append((what, "succeeded"))
    except OSError as error:
        told.append((what, type(error).__name__))

def system(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "")

def connect():
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(command + ".sock")
        sock.send(b"bytes that are not to be parsed")
        sock.recv(100)

for name in sorted(os.listdir(directory)):
    path = os.path.join(directory, name)
    for mode in (os.O_RDONLY, os.O_RDWR) if not name.endswith(".sock") else ():
        attempt(f"open {{name}}", lambda: os.open(path, mode))
    attempt(f"unlink {{name}}", lambda: os.unlink(path))
    attempt(f"replace {{name}}", lambda: os.rename(path, path + "-taken"))
attempt("connect", connect)
attempt("plant", lambda: open(os.path.join(directory, "planted"), "x"))
for pid in pids:
    pidfd = os.pidfd_open(pid)
    attempt(f"/proc/{{pid}}/fd", lambda: os.listdir(f"/proc/{{pid}}/fd"))
    attempt(f"/proc/{{pid}}/mem", lambda: os.open(f"/proc/{{pid}}/mem", os.O_RDONLY))
    attempt(f"kill {{pid}}", lambda: os.kill(pid, 9))
    for number in range(64):
        attempt(f"pidfd_getfd {{pid}} {{number}}", lambda: system(438, pidfd, number, 0))
        attempt(f"/proc/{{pid}}/fd/{{number}}", lambda: os.open(f"/proc/{{pid}}/fd/{{number}}", os.O_RDONLY))
for name in os.listdir("/dev/shm"):
    if name.startswith(tuple(f"torch_{{pid}}_" for pid in pids)):
        for mode in (os.O_RDONLY, os.O_RDWR):
            attempt(f"/dev/shm/{{name}}", lambda: os.open("/dev/shm/" + name, mode))
print(told)
"""

ALLOWED = {"PermissionError", "ConnectionResetError", "BrokenPipeError"}


def torchs_helpers() -> list[int]:
    """Children of this process that remove a worker's names in /dev/shm once it is dead."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("torch_shm")]


def counted(scene: Scene, name: str) -> int:
    return scene.state.agent().counters.get(name, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("modes", ["as they are", "all open"])
def test_everything_is_refused(stage: tuple[Scene, Omega], modes: str):
    """Where the file system would let it in, too, the kernel says who it is; but a file that is open to all is open."""
    scene, omega = stage
    named = scene.worker("torch.multiprocessing.set_sharing_strategy('file_system')")
    named.do("tensors = made(5); mine = client.register_tensors('mine', tensors)")
    before = {name: counted(scene, name) for name in ("refused packets", "leases")}
    command = str(scene.runtime / "agent_rank0_command.lmdb")
    pids = [scene.agent.pid, scene.owner.pid, scene.reader.pid, named.pid]
    old = [(path, path.stat().st_mode & 0o7777) for path in (scene.runtime, scene.runtime / f"{command}.sock")]
    try:
        if modes == "all open":
            scene.runtime.chmod(0o755)
            os.chmod(command + ".sock", 0o666)
        done = subprocess.run(
            [sys.executable, "-c", ATTEMPTS, str(scene.runtime), ",".join(map(str, pids)), command],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        for path, mode in old:
            path.chmod(mode)
    if modes == "as they are":  # nobody cannot even list the directory
        assert "PermissionError" in done.stderr
    else:
        assert done.stderr == ""
        told = ast.literal_eval(done.stdout)
        assert {outcome for _, outcome in told} <= ALLOWED, [each for each in told if each[1] not in ALLOWED]
        assert len([what for what, _ in told if what.startswith("/dev/shm/")]) >= 2, "nothing there was tried"
        assert dict(told)["connect"] in ("ConnectionResetError", "BrokenPipeError")
        omega.accept_said(f"refused a connection of uid {NOBODY}")
        scene.agent.errors.write_text("")
        omega.accept_said()
    named.do("mine.close(timeout=5)")
    scene.dismiss(named)
    for helper in torchs_helpers():  # ours by now: see `zygote`
        os.waitpid(helper, 0)
    scene.step()
    assert {name: counted(scene, name) for name in before}["refused packets"] == before["refused packets"]
    assert omega.faults() == []
