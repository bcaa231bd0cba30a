"""`etha.tensor_bus.recovery`: an agent dies, another follows, and its workers go on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from box import until
from harness import Agent, Raised, Worker

from etha.tensor_bus.command_queue import CommandQueue
from etha.tensor_bus.ipc.process import process_state
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.records import SCHEMA
from etha.tensor_bus.state import ClaimRecord, StateReader


def raises(kind: str) -> AbstractContextManager:
    return pytest.raises(Raised, match=f"^{kind}:")


@pytest.fixture
def restart(agent: Agent, start_agent: Callable[..., Agent]) -> Callable[[], Agent]:
    """SIGKILL the agent, and start another on its path."""
    current = [agent]

    def kill() -> None:
        current[-1].kill()
        current[-1].process.wait()

    def start() -> Agent:
        kill()
        current.append(start_agent())
        return current[-1]

    start.kill = kill
    start.start = lambda: current.append(start_agent())
    return start


def test_owner_and_reader_go_on(owner: Worker, reader: Worker, restart):
    owner.do("with policy.update(): weights.fill_(1)")
    restart()
    owner.do("with policy.update(): weights.fill_(2)")
    assert reader.do("with policy.read() as w: v = (w.version, w['weights'][0].item())\nv") == (2, 2.0)
    owner.do("policy.publish()")
    assert reader.do("with policy.read(min_version=3) as w: v = w.version\nv") == 3
    reader.do("policy.close()")
    owner.do("policy.close(timeout=20)")


def test_a_lease_is_held_whoever_comes_back_first(owner: Worker, reader: Worker, restart):
    reader.do("lease = policy.read()")
    restart()
    with raises("LeaseTimeout") as caught:
        owner.do("with policy.update(timeout=0.2): pass")
    assert f"pid {reader.pid}" in caught.value.holder
    reader.do("lease.check(); lease.release()")
    owner.do("with policy.update(timeout=20): pass")


def test_an_update_excludes_whoever_comes_back_first(owner: Worker, reader: Worker, restart):
    owner.do("update = policy.update(); update.__enter__(); weights.fill_(4); None")
    restart()
    with raises("LeaseTimeout"):
        reader.do("policy.read(timeout=0.2)")
    owner.do("update.__exit__(None, None, None)")
    assert reader.do("with policy.read(timeout=20) as w: v = (w.version, w['weights'][0].item())\nv") == (1, 4.0)


def test_calls_that_wait_are_asked_again(owner: Worker, reader: Worker, restart):
    reader.say("with policy.read(min_version=1, timeout=50) as w: v = w.version\nv")
    restart()
    owner.do("with policy.update(): pass")
    assert reader.hear() == 1
    reader.do("lease = policy.read()")
    owner.say("with policy.update(timeout=50): pass")
    restart()
    reader.do("lease.release()")
    owner.hear()


def test_an_idle_owner_is_subscribed_to_anew(owner: Worker, reader: Worker, restart, start_worker):
    """It makes no call in all the time: the agent takes the descriptors from it."""
    owner.do("weights.fill_(5)")
    restart()
    fresh = start_worker(setup="policy = client.subscribe('policy', timeout=20)")
    assert fresh.do("with policy.read() as w: v = w['weights'][9].item()\nv") == 5.0
    owner.do("weights.fill_(6)")
    assert fresh.do("with policy.read() as w: v = w['weights'][9].item()\nv") == 6.0


def test_what_was_published_meanwhile_counts(owner: Worker, reader: Worker, restart):
    restart.kill()
    assert owner.do("[policy.publish() for _ in range(50)][-1]") == 50
    restart.start()
    assert reader.do("with policy.read(min_version=50, timeout=20) as w: v = w.version\nv") == 50


def test_a_lease_released_meanwhile_holds_nobody_up(owner: Worker, reader: Worker, restart):
    """The reader makes no further call."""
    reader.do("lease = policy.read()")
    restart.kill()
    reader.do("lease.release()")
    restart.start()
    owner.do("with policy.update(timeout=10): pass")


def test_who_died_meanwhile_holds_nobody_up(owner: Worker, reader: Worker, restart, start_worker):
    reader.do("lease = policy.read()")
    other = start_worker(setup="p = client.register_tensors('other', {'x': torch.zeros(4).share_memory_()})")
    restart.kill()
    reader.kill()
    reader.process.wait(20)
    other.kill()
    other.process.wait(20)
    restart.start()
    owner.do("with policy.update(timeout=10): pass")
    owner.do("other = client.register_tensors('other', {'x': torch.zeros(4).share_memory_()}, timeout=10)")
    owner.do("policy.close(timeout=10)")


def test_fileno_tells_and_goes_on_telling(owner: Worker, reader: Worker, restart):
    reader.do("fd = policy.fileno(); p = select.poll(); p.register(fd, select.POLLIN); lease = policy.read()")
    assert reader.do("p.poll(0)") == []
    restart()
    assert reader.do("bool(p.poll(20000))") is True
    reader.do("lease.release(); policy.read().release()")
    assert reader.do("policy.fileno() == fd and p.poll(0) == []") is True
    owner.do("with policy.update(): pass")
    assert reader.do("bool(p.poll(20000))") is True


def test_without_a_successor_a_call_fails_by_its_deadline(owner: Worker, reader: Worker, restart):
    restart.kill()
    started = time.monotonic()
    with raises("AgentGone"):
        reader.do("policy.read(timeout=0.5)")
    with raises("AgentGone"):
        owner.do("policy.close(timeout=0.5)")
    assert time.monotonic() - started < 3
    restart.start()
    reader.do("policy.read(timeout=20).release(); policy.close()")
    owner.do("policy.close(timeout=20)")


def test_a_registration_in_flight_is_served_once(agent, start_worker, restart):
    owner = start_worker()
    owner.do("weights = torch.ones(8).share_memory_()")
    restart.kill()
    owner.say("policy = client.register_tensors('policy', {'w': weights}, timeout=50)\npolicy.generation")
    restart.start()
    assert owner.hear() >= 1
    reader = start_worker(setup="policy = client.subscribe('policy', timeout=20)")
    assert reader.do("with policy.read() as w: v = w['w'].tolist()\nv") == [1.0] * 8
    reader.do("policy.close()")
    owner.do("policy.close(timeout=20)")


@pytest.mark.parametrize("sent", [True, False], ids=["sent", "unsent"])
def test_a_reader_that_unmapped_for_an_agent_that_died_unmaps_for_the_next(
    owner: Worker, reader: Worker, restart, agent: Agent, runtime: Path, sent: bool
):
    """It was asked to, by an owner that suspends, and what it answered was never read, or could not be sent any more.
    It asks for its lease again, and gets one and no more."""
    state = StateReader(str(runtime / "agent_rank0_state.lmdb"))
    reader.say("with policy.read(min_version=1, timeout=50) as w: v = w.version\nv")
    until(lambda: any(claim.kind == "lease" for claim in state.all(ClaimRecord).values()))
    reader.kill(signal.SIGSTOP)
    owner.say("policy.suspend(timeout=20)")
    until(lambda: any(claim.kind == "suspend" for claim in state.all(ClaimRecord).values()))
    asked = state.agent().heartbeat
    until(lambda: state.agent().heartbeat > asked)
    if sent:
        agent.kill(signal.SIGSTOP)
        reader.kill(signal.SIGCONT)
        until(lambda: "/torch_" not in Path(f"/proc/{reader.pid}/maps").read_text())
        restart()
    else:
        restart()
        reader.kill(signal.SIGCONT)
    owner.hear()
    owner.do("policy.resume(timeout=20)")
    assert reader.hear() == 1
    owner.do("with policy.update(timeout=5): pass")
    state.close()


def test_a_client_closed_meanwhile_leaves_nothing(owner: Worker, reader: Worker, restart, start_worker):
    restart.kill()
    reader.do("client.close()")
    owner.do("try: client.close(timeout=0.1)\nexcept etha.errors.EthaError: pass")
    restart.start()
    other = start_worker()
    other.do("p = client.register_tensors('policy', {'x': torch.zeros(4).share_memory_()}, timeout=20)")


def test_a_clean_stop_is_an_upgrade(owner: Worker, reader: Worker, restart, agent, start_agent):
    reader.do("lease = policy.read()")
    agent.kill(signal.SIGTERM)
    assert agent.process.wait(20) == 0
    start_agent()
    reader.do("lease.check(); lease.release()")
    owner.do("with policy.update(timeout=10): pass")


def stop(worker: Worker) -> None:
    worker.kill(signal.SIGSTOP)
    until(lambda: process_state(worker.pid) == "stopped")


def test_a_reader_that_stands_still_meanwhile_is_waited_for_and_named(owner: Worker, reader: Worker, restart):
    reader.do("lease = policy.read()")
    stop(reader)
    restart()
    with raises("LeaseTimeout") as caught:
        owner.do("with policy.update(timeout=0.2): pass")
    assert f"pid {reader.pid}" in caught.value.holder
    reader.kill(signal.SIGCONT)
    reader.do("lease.check(); lease.release()")
    owner.do("with policy.update(timeout=20): weights.fill_(3)")
    assert reader.do("with policy.read() as w: v = (w.version, w['weights'][0].item())\nv") == (1, 3.0)


def test_an_owner_that_stands_still_in_its_update_goes_on_in_it(owner: Worker, reader: Worker, restart):
    owner.do("update = policy.update(); update.__enter__(); weights.fill_(4); None")
    stop(owner)
    restart()
    with raises("LeaseTimeout") as caught:
        reader.do("policy.read(timeout=0.2)")
    assert f"pid {owner.pid}" in caught.value.holder
    owner.kill(signal.SIGCONT)
    owner.do("update.__exit__(None, None, None)")
    assert reader.do("with policy.read(timeout=20) as w: v = (w.version, w['weights'][0].item())\nv") == (1, 4.0)


MANY = """
base = torch.zeros(125, 8).share_memory_()
many = [client.register_tensors(f"{os.getpid()} {n}", {"x": base[n]}) for n in range(125)]
"""


def test_a_thousand_commands_that_wait_are_served(agent, start_worker, restart, request):
    workers = [start_worker() for _ in range(8)]
    for worker in workers:
        worker.say(MANY)
    for worker in workers:
        worker.hear()
    restart.kill()
    for worker in workers:
        assert worker.do("{p.publish() for _ in range(3) for p in many}") == {1, 2, 3}
    queue = CommandQueue(agent_paths(0))
    request.addfinalizer(queue.close)
    waiting = [sequence for client in queue.clients() for sequence, _ in queue.commands_of(client, 125)]
    assert len(waiting) == 1000  # of three that each publication saw, one
    restart.start()
    reader = start_worker()
    for worker in workers:
        reader.do(
            f"for n in range(0, 125, 31): client.subscribe(f'{worker.pid} {{n}}').read(version=3, timeout=20).release()"
        )
    reader.do("client.close()")
    for worker in workers:
        worker.do("client.close()")


NEWER = f"""
import sys
import etha.tensor_bus.agent
for module in list(sys.modules.values()):
    if module.__name__.startswith("etha.") and hasattr(module, "SCHEMA"):
        module.SCHEMA = {SCHEMA} + int(sys.argv[1])
from etha.errors import VersionMismatch
try:
    etha.tensor_bus.agent.TensorBusAgent()
except VersionMismatch as error:
    print(error.message)
"""


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("lock", ["there", "gone"])
def test_an_agent_of_another_schema_refuses_and_touches_nothing(
    owner: Worker, reader: Worker, restart, runtime: Path, by: int, lock: str
):
    reader.do("lease = policy.read()")
    restart.kill()
    paths = agent_paths(0)
    if lock == "gone":
        os.unlink(paths.lock)
    before = {path.name: path.read_bytes() for path in runtime.iterdir() if path.is_file()}
    command = [sys.executable, "-c", NEWER, str(by)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert str(SCHEMA) in done.stdout, done.stderr
    assert str(SCHEMA + by) in done.stdout
    after = {path.name: path.read_bytes() for path in runtime.iterdir() if path.is_file()}
    readers = {name for name in after if name.endswith("-lock")}  # LMDB's own table of who reads
    assert {name: data for name, data in after.items() if name not in readers} == {
        name: data for name, data in before.items() if name not in readers
    }
    restart.start()
    reader.do("lease.check(); lease.release()")
    owner.do("with policy.update(timeout=20): pass")
