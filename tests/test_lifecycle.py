"""Many agents and workers, started, stopped and killed: nothing is left of them anywhere."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from harness import Agent, Worker

from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.state import ClientRecord, PublicationRecord, StateReader


def processes() -> set[int]:
    """Every process whose ancestor this one is."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(fields[1])
    ours = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= grown
    return ours


def left_by(pids: set[int]) -> list[str]:
    """Files in shared memory that bear one of these pids, and what stands at the agents' default place."""
    shared = [name for name in os.listdir("/dev/shm") if name.split("_")[1:2] and name.split("_")[1] in map(str, pids)]
    return shared + [name for name in os.listdir("/tmp") if name.startswith("agent_rank")]


def run_many(runtime: Path, directory: Path, agents: int, workers: int, seed: int, leave: bool = False) -> set[int]:
    """Start agents, and workers that publish to and read from one another; end half of each by SIGKILL.

    Returns the workers' pids.
    """
    rng = random.Random(seed)
    running = {rank: Agent(dict(os.environ), directory, "--rank", str(rank)) for rank in range(agents)}
    crew: list[Worker] = []
    for number in range(workers):
        rank = number % agents
        worker = Worker({**os.environ, "AGENT_RANK": str(rank)}, directory)
        crew.append(worker)
        worker.do(
            "import os, torch\nfrom etha import bootstrap_client\nclient, _ = bootstrap_client(connection_timeout=30)"
        )
        name = f"w{number}"
        worker.do(f"w = torch.ones(2048).share_memory_(); p = client.register_tensors({name!r}, {{'w': w}})")
        if number >= agents:
            worker.do(f"s = client.subscribe('w{number - agents}'); lease = s.read(); t = lease['w'].sum().item()")
    rng.shuffle(crew)
    for number, worker in enumerate(crew):
        if number % 2:
            worker.kill()
            worker.process.wait(60)
            worker.destroy()
        else:
            assert worker.end() == 0
    for rank in list(running):
        if rank % 2:
            running[rank].kill(signal.SIGKILL)
            running[rank].process.wait(60)
            running[rank].process.stdout.close()
            if leave:
                continue
            running[rank] = Agent(dict(os.environ), directory, "--rank", str(rank))
        assert running[rank].stop() == 0
        assert running[rank].errors.read_text() == ""
    return {worker.pid for worker in crew}


@pytest.mark.parametrize(("agents", "workers"), [(3, 9), pytest.param(10, 50, marks=pytest.mark.stress)])
def test_nothing_is_left(start_worker, runtime: Path, tmp_path: Path, agents: int, workers: int):
    start_worker(connect=False)  # so that the process that forks workers is there before the count
    before = processes()
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    pids = run_many(runtime, tmp_path, agents, workers, seed)
    assert os.listdir(runtime) == []
    assert processes() == before
    assert left_by(pids) == []


def test_the_check_sees_a_killed_agent_that_no_successor_cleared(runtime: Path, tmp_path: Path):
    run_many(runtime, tmp_path, 2, 2, 1, leave=True)
    assert {name.split("_")[1] for name in os.listdir(runtime)} == {"rank1"}


def test_an_agent_that_stops_leaves_its_workers_to_its_successor(start_agent, start_worker):
    first = start_agent()
    worker = start_worker(setup="w = torch.ones(8).share_memory_(); p = client.register_tensors('w', {'w': w})")
    assert first.stop() == 0
    runtime = Path(os.environ["ETHA_RUNTIME_DIR"])
    assert "agent_rank0_state.lmdb" in os.listdir(runtime)
    second = start_agent()
    worker.do("with p.update(): w.fill_(2)")
    assert second.stop() == 0
    assert "agent_rank0_state.lmdb" in os.listdir(runtime)
    third = start_agent()
    worker.do("client.close()")
    assert third.stop() == 0
    assert os.listdir(runtime) == []


def test_the_agent_holds_nothing_of_workers_that_are_gone(agent, start_worker, request):
    def held() -> tuple[int, int]:
        fds = len(os.listdir(f"/proc/{agent.pid}/fd"))
        mappings = sum("/dev/shm" in line for line in Path(f"/proc/{agent.pid}/maps").read_text().splitlines())
        return fds, mappings

    state = StateReader(agent_paths(0).state)
    request.addfinalizer(state.close)

    def until_all_are_gone() -> None:
        deadline = time.monotonic() + 20
        while state.all(ClientRecord) or state.all(PublicationRecord):
            assert time.monotonic() < deadline

    start_worker().end()
    until_all_are_gone()
    before = held()
    for ending in ("end", "kill"):
        owner = start_worker(setup="ts = {str(i): torch.ones(9).share_memory_() for i in range(300)}")
        owner.do("p = client.register_tensors('many', ts)")
        reader = start_worker(setup="s = client.subscribe('many'); lease = s.read(); fd = s.fileno()")
        assert held()[1] == before[1] + 300
        getattr(reader, ending)()
        getattr(owner, ending)()
        for worker in (reader, owner):
            worker.process.wait(60)
        until_all_are_gone()
        assert held() == before, ending
