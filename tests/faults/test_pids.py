"""Row 9: who is who. A pid that goes to a stranger, two PID namespaces on one path, client ids that are forged.

No lease, handle or descriptor is ever credited to another than the process that it was given to.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from box import until
from counts import counts
from omega import Omega
from pid_rounds import LAST_PID, STRANGER
from scene import Scene

from etha.tensor_bus.state import ClaimRecord

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.mark.parametrize("rounds", counts(4, 100))
@pytest.mark.skipif(not LAST_PID.exists(), reason="a kernel without CONFIG_CHECKPOINT_RESTORE")
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="makes namespaces")
def test_a_pid_that_goes_to_a_stranger(tmp_path: Path, rounds: int):
    program = Path(__file__).with_name("pid_rounds.py")
    done = subprocess.run(
        [*UNSHARE, sys.executable, str(program), str(rounds), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"rounds": rounds, "leaves": {"StaleHandle": rounds}}


ANOTHER_AGENT = """
from etha.tensor_bus.agent import TensorBusAgent
from etha.errors import EthaError
try:
    TensorBusAgent(0)
except EthaError as error:
    print(type(error).__name__, error.holder, error.resource)
"""

A_WORKER = """
from etha import bootstrap_client
from etha.errors import EthaError
try:
    bootstrap_client(connection_timeout=20)
except EthaError as error:
    print(type(error).__name__, error.holder, error.resource)
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="makes namespaces")
@pytest.mark.parametrize(
    ("who", "expected"),
    [(ANOTHER_AGENT, "AgentRunning pid {pid} {command}.agent"), (A_WORKER, "OtherNamespace pid {pid} there {command}")],
    ids=["agent", "worker"],
)
def test_another_pid_namespace_on_the_same_path(stage: tuple[Scene, Omega], who: str, expected: str):
    scene, omega = stage
    done = subprocess.run(
        [*UNSHARE, sys.executable, "-c", who], env=scene.environment, capture_output=True, text=True, check=True
    )
    command = scene.runtime / "agent_rank0_command.lmdb"
    assert done.stdout.strip() == expected.format(pid=scene.agent.pid, command=command)
    assert done.stderr == ""
    assert omega.faults() == []


FORGE = """
from etha.tensor_bus import clock, commands
from etha.tensor_bus.ipc import host
from etha.tensor_bus.records import encode

own = made(8)
export = host.export(own)

def forge(client_id, sequence, name):
    record = commands.Register(name, export.manifest, 0, False, threading.get_native_id(), clock.now() + 0.5)
    client._link.queue.put(client_id, sequence, encode(record), clock.now() + 5)
    # Descriptors are taken from the connection of the client whose command it is, and from no other.
    client._link.send_descriptors(sequence, export.fds, clock.now() + 5)
    client._link.connection.hint(encode(packets.RingForCommands()))
"""


@pytest.mark.parametrize("whose", ["nobody's", "another's"])
def test_a_client_id_that_is_forged_in_the_queue(stage: tuple[Scene, Omega], whose: str):
    scene, omega = stage
    forger = scene.worker(STRANGER + FORGE)
    victim = scene.worker("lease = client.subscribe('policy').read()")
    try:
        client = victim.do("client._link.connection.client") if whose == "another's" else os.urandom(16)
        forger.do(f"forge({client!r}, 1 << 40, 'forged')")
        victim.do("policy = client.subscribe('policy'); policy.close()")  # it rings, too
        forger.do("client.subscribe('policy', timeout=5).close()")
        assert forger.do("attempt(lambda: client.subscribe('forged', timeout=0.7))") == "NoPublication"
        until(lambda: "forged" not in {claim.name for claim in scene.state.all(ClaimRecord).values()}, 5)
        assert forger.do(f"as_client({client!r})") == "StaleHandle"
        # The victim has what it had, and the forger has nothing of it.
        assert victim.do("lease.check(); stamps(lease)") == [scene.version]
        mine = [c.kind for c in scene.state.all(ClaimRecord).values() if c.pid == forger.pid]
        assert mine == []
        forger.do("export.close_fds()")
    finally:
        for worker in (forger, victim):
            scene.dismiss(worker)
    said = omega.accept_said(f"refused pid {forger.pid} ")
    assert "Traceback" not in said
    scene.agent.errors.write_text("")
    omega.accept_said()
    assert omega.faults() == []
