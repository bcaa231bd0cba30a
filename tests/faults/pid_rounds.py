"""The program of `test_pids`: PID 1 of a namespace of its own, where a dead worker's pid goes to a stranger at once.

``python pid_rounds.py ROUNDS DIRECTORY`` prints one line of JSON. In every round a worker dies that owns a publication
and holds a lease, while its agent stands still or is dead; before that goes on, or another follows, the kernel is told
to give the worker's number to the next process: a stranger, which also says that it is the dead worker's client.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import Worker
from omega import Omega
from requiring import require
from scene import Scene

from etha.tensor_bus.state import ClaimRecord, ClientRecord

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")

HOLD = """
policy = client.subscribe('policy'); lease = policy.read()
mine = client.register_tensors('mine', made(3))
"""

STRANGER = """
from etha.tensor_bus import packets, wire
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.reach import dial

def as_client(client):
    '''Connect, and go on as this client; the leaf of what that comes to.'''
    channel, _ = dial(agent_paths(0), 0, client)
    try:
        select.select([channel.sock], [], [], 20)
        data, fds = wire.receive(channel.sock)
        wire.close_all(fds)
        reply = packets.FROM_AGENT.decode(data)
        return reply.failure.leaf if isinstance(reply, packets.Refused) else type(reply).__name__
    finally:
        channel.close()
"""


def fork_as(scene: Scene, pid: int) -> Worker:
    """A process with this number. The zygote forks twice: the middle one takes the number before."""
    LAST_PID.write_text(str(pid - 2))
    worker = Worker(scene.environment, scene.directory)
    scene.strays.add(worker.pid)
    return worker


def play(scene: Scene, omega: Omega, dead: bool) -> str:
    """One death and one stranger; the leaf that this got."""
    victim = scene.worker(HOLD)
    pid = victim.pid
    client = victim.do("client._link.connection.client")
    if dead:
        scene.end_agent()
    else:
        scene.agent.kill(signal.SIGSTOP)
    scene.dismiss(victim)
    stranger = fork_as(scene, pid)
    try:
        require(stranger.pid == pid, f"the kernel gave {stranger.pid}, not {pid}")
        stranger.do("import os, select\n" + STRANGER)
        if dead:
            scene.follow()
        else:
            scene.agent.kill(signal.SIGCONT)
        leaf = stranger.do(f"as_client({client!r})")
        scene.step()  # nobody's lease is in the way, and nobody's name
        scene.owner.do("mine = client.register_tensors('mine', made(1), timeout=2); mine.close(timeout=5)")
        kept = [claim.kind for claim in scene.state.all(ClaimRecord).values() if claim.pid == pid]
        kept += ["client" for known in scene.state.all(ClientRecord).values() if known.pid == pid]
        require(kept == [], f"credited to the stranger: {kept}")
    finally:
        stranger.destroy()
    omega.accept_said(f"refused pid {pid} ")
    scene.agent.errors.write_text("")
    omega.accept_said()
    faults = omega.faults()
    require(faults == [], faults)
    return leaf


def main() -> None:
    rounds, directory = int(sys.argv[1]), Path(sys.argv[2])
    scene = Scene(directory)
    omega = Omega(scene)
    leaves: Counter = Counter()
    try:
        for number in range(rounds):
            leaves[play(scene, omega, dead=number % 2 == 1)] += 1
    finally:
        omega.close()
        scene.close()
    os.write(1, (json.dumps({"rounds": rounds, "leaves": dict(leaves)}) + "\n").encode())


if __name__ == "__main__":
    main()
