"""What room things take on the disk, and what happens when there is none."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import OWNER, Agent, Worker

from etha.errors import SystemLimit
from etha.tensor_bus.agent import TensorBusAgent
from etha.tensor_bus.command_queue import CommandQueue
from etha.tensor_bus.environments import MAX_READERS, open_environment
from etha.tensor_bus.paths import agent_paths

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts")


@pytest.fixture(autouse=True)
def descriptor_limit() -> Iterator[None]:
    """An agent raises it; here some are made in the test's own process."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# -- publishes by a worker that never reads ----------------------------------------------------------------------------


def measured(agent: Agent, worker: Worker, runtime: Path) -> dict[str, int]:
    """KiB on the disk of each file that grows, and descriptors of both processes."""
    sizes = {path.suffix[1:] + path.stem[-8:]: path.stat().st_blocks // 2 for path in runtime.glob("*.lmdb")}
    pids = {"agent": agent.pid, "worker": worker.pid}
    return sizes | {f"fds of {who}": len(os.listdir(f"/proc/{pid}/fd")) for who, pid in pids.items()}


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.stress)])
@pytest.mark.parametrize("agent_is", ["running", "stopped"])
def test_publishes_that_nobody_waits_for_take_no_room(
    agent: Agent, owner: Worker, runtime: Path, agent_is: str, count: int
):
    """They are conflated. What an agent adds that loses the processor while it reads is bounded by that time."""
    owner.do("for _ in range(1_000): policy.publish()")
    if agent_is == "stopped":
        agent.kill(signal.SIGSTOP)
        os.waitid(os.P_PID, agent.pid, os.WSTOPPED | os.WNOWAIT)
    before = measured(agent, owner, runtime)
    took = owner.do(f"began = time.monotonic()\nfor _ in range({count}): policy.publish()\ntime.monotonic() - began")
    after = measured(agent, owner, runtime)
    agent.kill(signal.SIGCONT)
    print(f"{count} publishes, agent {agent_is}: {took / count * 1e6:.0f} us each; KiB, fds: {before} -> {after}")
    assert before.keys() == after.keys()
    spare = {"running": 4096, "stopped": 64}[agent_is]
    for name, amount in after.items():
        assert amount <= before[name] + (0 if name.startswith("fds") else spare), name
    queue = CommandQueue(agent_paths(0))
    assert sum(len(queue.commands_of(client, 0)) for client in queue.clients()) < 5
    queue.close()
    wait = "with client.subscribe('policy').read(min_version=policy.version, timeout=20) as w: v = w.version\nv"
    assert owner.do(wait) == count + 1_000
    assert agent.errors.read_text() == ""


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.stress)])
def test_a_reader_that_is_stopped_while_it_reads(agent: Agent, owner: Worker, runtime: Path, count: int):
    """It keeps every page that is freed. The agent goes on, and when the reader has ended, the file grows no more."""
    path = str(runtime / "agent_rank0_state.lmdb")
    code = """
import os, signal, sys
from etha.tensor_bus.state import StateReader
transaction = StateReader(sys.argv[1])._env.begin()
os.kill(os.getpid(), signal.SIGSTOP)
"""
    publish = (
        f"for _ in range({count} // 20): [policy.publish() for _ in range(20)]; client.subscribe('policy').close()"
    )
    with subprocess.Popen([sys.executable, "-c", code, path]) as reader:
        os.waitid(os.P_PID, reader.pid, os.WSTOPPED | os.WNOWAIT)
        before = measured(agent, owner, runtime)
        owner.do(publish, timeout=600)
        during = measured(agent, owner, runtime)
        reader.kill()
    survivor = open_environment(path, map_size=1 << 30, readonly=True)
    survivor.env.reader_check()  # as the agent does at its next heartbeat
    survivor.close()
    owner.do("for _ in range(200): policy.publish(); client.subscribe('policy').close()")
    freed = measured(agent, owner, runtime)
    owner.do(publish, timeout=600)
    after = measured(agent, owner, runtime)
    print(f"{count} versions: {before} -> {during}; then, the reader dead: {freed} -> {after}")
    (state,) = (name for name in before if "state" in name)
    assert before[state] < during[state] <= 1 << 20
    assert after[state] <= freed[state] + 4096
    assert agent.errors.read_text() == ""


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(runtime: Path) -> Iterator[Path]:
    """The runtime directory, on a file system of 1 MiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "etha-test", runtime], check=True)
    yield runtime
    subprocess.run(["umount", "--lazy", runtime], check=True)


def fill(directory: Path) -> Path:
    """Leave no byte free."""
    filler = directory / "filler"
    filler.touch()
    fd = os.open(filler, os.O_WRONLY)
    for size in (1 << 16, 1 << 12):
        for place in itertools.count(filler.stat().st_blocks * 512, size):
            try:
                os.posix_fallocate(fd, place, size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                break
    os.close(fd)
    return filler


@as_root
def test_no_room_to_start_is_a_typed_error(small: Path):
    filler = fill(small)
    done = subprocess.run([sys.executable, "-m", "etha", "agent"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("etha agent: SystemLimit: " + str(small))
    assert "Traceback" not in done.stderr
    assert list(small.iterdir()) == [filler]


@as_root
@pytest.mark.parametrize("rooms", [1, 5, 33, 40, 65, 66, 67, 68, 69, 70, 71, 72, 73, 90])
def test_too_little_room_to_start_is_a_typed_error_and_leaves_nothing(small: Path, rooms: int):
    """Pages free, in ever larger number: whatever step it is that fails."""
    filler = fill(small)
    os.truncate(filler, filler.stat().st_size - rooms * 4096)
    failed = None
    try:
        agent = TensorBusAgent(0)
        agent.stop()
        agent.run()
    except SystemLimit as error:
        failed = error.resource
    assert failed is not None if rooms < 64 else failed is None or rooms < 80
    assert failed is None or failed.startswith(str(small))
    assert list(small.iterdir()) == [filler]


@as_root
def test_an_agent_survives_a_full_disk(small: Path, start_agent: Callable[..., Agent], start_worker):
    """What cannot be recorded is not granted; with room again, everything goes on."""
    agent = start_agent()
    connect = "client, _ = bootstrap_client(connection_timeout=1)\n"
    worker = start_worker(connect=False, setup=connect + OWNER + "reading = client.subscribe('policy'); leases = []")
    fill(small)
    assert (
        worker.do("""
error = None
while error is None:
    try:
        leases.append(reading.read(timeout=0.2))
    except etha.EthaError as caught:
        error = type(caught).__name__
error
""")
        == "AgentTimeout"
    )
    assert worker.do("""
try:
    for number in range(5_000):
        policy.publish()
        client.register_tensors(f"other {number}", {"x" * 500: weights}, timeout=0.2)
except etha.EthaError as caught:
    error = type(caught).__name__
error
""") in ("QueueFull", "AgentTimeout")
    assert agent.process.poll() is None
    os.unlink(small / "filler")
    found = worker.do("""
for lease in leases:
    lease.release()
with policy.update(timeout=20):
    weights.fill_(5)
with reading.read(min_version=policy.version, timeout=20) as lease:
    found = lease["weights"][0].item()
client.close()
found
""")
    assert found == 5
    assert agent.stop() == 0
    said = agent.errors.read_text()
    assert "nothing can be recorded, so nothing is granted" in said
    assert str(small) in said
    assert "it can be recorded again" in said
    assert "Traceback" not in said
    assert list(small.iterdir()) == []


@as_root
def test_a_full_disk_ends_no_reader(small: Path):
    """LMDB writes its table of readers through a mapping: a page that is not on the disk would be SIGBUS."""
    path = str(small / "data.lmdb")
    environment = open_environment(path, map_size=1 << 20, create=True)
    fill(small)
    transactions = [environment.env.begin() for _ in range(MAX_READERS)]
    assert len(environment.env.readers().splitlines()) > MAX_READERS
    for transaction in transactions:
        transaction.abort()
    environment.close()
