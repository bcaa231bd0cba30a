"""Row 8: the agent dies with 1,000 commands of 8 workers in flight, each of a thread that waits for its answer.

Each is done once, or its caller gets a typed error in time; none hangs, and every worker goes on with the successor.
"""

from __future__ import annotations

import signal
from collections import Counter

import pytest
from box import until
from omega import Omega
from scene import Scene

from etha.tensor_bus.command_queue import CommandQueue
from etha.tensor_bus.paths import agent_paths

WORKERS = 8
SECONDS = 60.0

CREW = """
from concurrent.futures import ThreadPoolExecutor

def crew(name, count):
    global client_name, base, old, threads
    client_name = name
    base = torch.full((count, 8), 5, dtype=torch.int64).share_memory_()
    old = [client.register_tensors(f"{name} old {n}", {"x": base[n]}) for n in range(count // 4)]
    threads = ThreadPoolExecutor(count)

def act(n):
    began = time.monotonic()
    if n < len(old):
        value = attempt(lambda: old[n].close(timeout=SECONDS))
    else:
        value = attempt(lambda: client.register_tensors(f"{client_name} new {n}", {"x": base[n]}, timeout=SECONDS))
        if not isinstance(value, str):
            kept.append(value)
            value = value.generation
    took = time.monotonic() - began
    return value if took < SECONDS * 1.1 + 1 else f"{took} s"

kept = []
""".replace("SECONDS", str(SECONDS))

BEGIN = "going = [threads.submit(act, n) for n in range({count})]"
END = "told = [each.result(120) for each in going]; threads.shutdown(); told"


def in_the_queue(scene: Scene, clients: set[bytes], served: dict[bytes, int]) -> int:
    queue = CommandQueue(agent_paths(0, str(scene.runtime / "agent_rank0_command.lmdb"), scene.state.path))
    try:
        return sum(len(queue.commands_of(client, served[client])) for client in clients)
    finally:
        queue.close()


def play(scene: Scene, per_worker: int) -> Counter:
    workers = [scene.worker(CREW) for _ in range(WORKERS)]
    try:
        clients, served = set(), {}
        for number, worker in enumerate(workers):
            worker.do(f"crew('crew {number}', {per_worker})")
            client = worker.do("client._link.connection.client")
            clients.add(client)
            served[client] = per_worker // 4  # its registrations
        scene.agent.kill(signal.SIGSTOP)
        for worker in workers:
            worker.do(BEGIN.format(count=per_worker))
        until(lambda: in_the_queue(scene, clients, served) == WORKERS * per_worker)
        scene.follow()
        outcomes: Counter = Counter()
        for number, worker in enumerate(workers):
            told = worker.do(END, timeout=2 * SECONDS)
            for n, value in enumerate(told):
                old = n < per_worker // 4
                name = f"crew {number} {'old' if old else 'new'} {n}"
                if isinstance(value, str):
                    assert value.endswith(("Timeout", "Gone")), value
                    outcomes[value] += 1
                else:
                    assert scene.named(name) == ([] if old else [value]), name
                    outcomes["done"] += 1
            worker.do("client.close(); None", timeout=SECONDS)
        return outcomes
    finally:
        for worker in workers:
            scene.dismiss(worker)


@pytest.mark.parametrize(
    ("per_worker", "rounds"), [(32, 1), pytest.param(125, 20, marks=pytest.mark.stress)], ids=["few", "full"]
)
def test_each_is_done_once_or_its_caller_is_told(stage: tuple[Scene, Omega], per_worker: int, rounds: int):
    scene, omega = stage
    outcomes: Counter = Counter()
    for _ in range(rounds):
        outcomes += play(scene, per_worker)
        assert omega.faults() == []
    print(dict(outcomes))
    assert outcomes["done"] > 0
