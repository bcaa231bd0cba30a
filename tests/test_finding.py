"""`etha.tensor_bus.finding` and `TensorBusClient.for_device`: the agent that serves a device."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch

from etha.errors import AgentStopped, InvalidArgument, NoAgent
from etha.tensor_bus import clock
from etha.tensor_bus.client import TensorBusClient
from etha.tensor_bus.finding import device_name, find_agent, serves
from etha.tensor_bus.ipc import devices
from etha.tensor_bus.ipc.process import boot_id, pid_namespace
from etha.tensor_bus.lockfile import LockText
from etha.tensor_bus.paths import agent_paths, locks_by_convention
from etha.tensor_bus.records import SCHEMA

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
TEXT = LockText(4122, boot_id(), pid_namespace(), 7, SCHEMA, 0, "cpu")


class Locks:
    """Lock files, held as a living agent holds its own."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def write(self, rank: int, *, held: bool = True, **changes: object) -> Path:
        path = Path(agent_paths(rank).lock)
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(TEXT, rank=rank, **changes)))
        path.chmod(0o600)
        if held:
            self._fds.append(os.open(path, os.O_RDWR))
            fcntl.flock(self._fds[-1], fcntl.LOCK_EX)
        return path

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


@pytest.fixture
def locks(runtime: Path):
    made = Locks()
    yield made
    made.close()


def now() -> float:
    return clock.now()


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("cpu", "cpu"),
        ("cpu:0", "cpu"),
        (torch.device("cpu"), "cpu"),
        (torch.device("cpu", 0), "cpu"),
        ("cuda:1", "cuda:1"),
        (torch.device("cuda", 1), "cuda:1"),
        (torch.device("cuda"), "cuda"),
    ],
)
def test_a_device_by_string_or_by_torch(device: str | torch.device, name: str):
    assert device_name(device) == name


NO_DEVICES = ["", "CPU", "cpu:", "cpu:x", "cpu 0", " cpu", "cpu\n", 0, None, b"cpu", torch.float32]


@pytest.mark.parametrize("device", NO_DEVICES)
def test_what_is_no_device_is_refused(device: object):
    with pytest.raises(InvalidArgument) as caught:
        device_name(device)
    assert caught.value.resource == "device"


def test_a_string_loads_no_torch(runtime: Path):
    code = (
        "import sys, etha\n"
        "try: etha.TensorBusClient.for_device('cpu', connection_timeout=0)\n"
        "except etha.errors.NoAgent: print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")


# -- which agent -------------------------------------------------------------------------------------------------------


GPU = "cuda:74686520-6669-7273-7420-646576696365"


def test_the_lowest_rank_that_serves_it(locks: Locks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "visible", lambda: (b"another of these", b"the first device"))
    locks.write(0, device=GPU)
    for rank in (10, 2, 3):
        locks.write(rank)
    assert locks_by_convention() == [0, 2, 3, 10]
    assert find_agent("cpu", now()) == (2, agent_paths(2))
    assert find_agent("cuda:1", now())[0] == 0
    assert not serves(TEXT, GPU)
    with pytest.raises(NoAgent):
        find_agent("cuda:0", now())
    with pytest.raises(InvalidArgument):
        find_agent("cuda:2", now())


def test_who_cannot_be_talked_to_is_passed_over_and_named(locks: Locks, runtime: Path):
    locks.write(0, held=False)
    locks.write(1, boot="another")
    locks.write(2, namespace=TEXT.namespace + 1)
    locks.write(3, schema=SCHEMA + 1)
    locks.write(4).write_bytes(b"no JSON")
    locks.write(5).write_bytes(b"")
    locks.write(6, device=GPU)
    with pytest.raises(NoAgent) as caught:
        find_agent("cpu", now())
    assert caught.value.resource == "cpu"
    for part in (
        "rank 0 (dead)",
        "rank 1 (dead)",
        "rank 2 (in another PID namespace)",
        f"rank 3 (of record schema {SCHEMA + 1}",
        "rank 4 (unreadable",
        "rank 5 (starting)",
        f"rank 6 (serves {GPU})",
    ):
        assert part in caught.value.message
    locks.write(7)
    assert find_agent("cpu", now())[0] == 7


@as_root
def test_another_users_agent_is_not_ours(locks: Locks):
    os.chown(locks.write(0), 65534, 65534)
    with pytest.raises(NoAgent, match="of uid 65534"):
        find_agent("cpu", now())


@pytest.mark.parametrize("timeout", [0.0, 0.3])
def test_none_at_all_after_the_timeout_and_not_before(runtime: Path, timeout: float):
    began = time.monotonic()
    with pytest.raises(NoAgent) as caught:
        TensorBusClient.for_device("cpu", connection_timeout=timeout)
    assert timeout - 0.05 <= time.monotonic() - began < timeout + 1
    assert str(runtime) in caught.value.message
    assert "etha agent --device cpu" in caught.value.remedy


def test_a_directory_that_is_not_there_has_no_agent(runtime: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ETHA_RUNTIME_DIR", str(runtime / "missing"))
    with pytest.raises(NoAgent):
        find_agent("cpu", now())


# -- with real agents --------------------------------------------------------------------------------------------------


def test_a_client_for_a_device(start_agent):
    start_agent("--rank", "7")
    fourth = start_agent("--rank", "4")
    with TensorBusClient.for_device(torch.device("cpu"), connection_timeout=20) as client:
        assert (client.agent_rank, client.agent_pid, client.device) == (4, fourth.pid, "cpu")
        publication = client.register_tensors("w", {"w": torch.zeros(4).share_memory_()})
        publication.close()
    fourth.kill()
    fourth.process.wait(60)
    with TensorBusClient.for_device("cpu", connection_timeout=20) as client:
        assert client.agent_rank == 7


def test_it_waits_for_one_that_comes_later(start_agent, start_worker):
    worker = start_worker(connect=False)
    worker.say("client = TensorBusClient.for_device('cpu', connection_timeout=40); client.agent_rank")
    start_agent("--rank", "3")
    assert worker.hear() == 3


def test_the_search_takes_nothing_from_the_clients_patience(agent):
    with TensorBusClient.for_device("cpu", connection_timeout=17.0) as client:
        assert client._link.patience == 17.0


def test_a_stopped_one_is_said_to_be_stopped(agent):
    agent.kill(signal.SIGSTOP)
    assert os.waitpid(agent.pid, os.WUNTRACED)[0] == agent.pid
    with pytest.raises(AgentStopped):
        TensorBusClient.for_device("cpu", connection_timeout=0.3)
    agent.kill(signal.SIGCONT)
