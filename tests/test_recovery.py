"""`etha.tensor_bus.recovery`: an agent dies, another follows, and its workers go on as if nothing had been."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import gates
import pytest
from box import until
from harness import Agent, Raised, Worker
from msgspec import structs
from registry_world import Records, World

from etha.errors import InvalidRecord, NoPublication
from etha.tensor_bus import link
from etha.tensor_bus.agent import TensorBusAgent
from etha.tensor_bus.claims import Phase
from etha.tensor_bus.client import TensorBusClient
from etha.tensor_bus.command_queue import CommandQueue
from etha.tensor_bus.ipc import fetching
from etha.tensor_bus.ipc.process import open_files, process_state
from etha.tensor_bus.journal import Journal
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.records import SCHEMA
from etha.tensor_bus.recovery import recover, rehearse
from etha.tensor_bus.registry import Registry
from etha.tensor_bus.state import (
    ClaimRecord,
    ClientRecord,
    GenerationRecord,
    PublicationRecord,
    ServedRecord,
    StateReader,
    VersionRecord,
    publication_key,
    version_key,
)
from etha.tensor_bus.state_writer import StateWriter


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


@pytest.mark.parametrize("there", ["dead", "followed"])
def test_a_subscription_closed_meanwhile_holds_nobody_up(owner: Worker, reader: Worker, restart, there: str):
    """Its reader makes no further call, and has made none with the agent that followed."""
    restart.kill() if there == "dead" else restart()
    reader.do("policy.close()")
    if there == "dead":
        restart.start()
    owner.do("policy.close(timeout=10)")


@pytest.mark.parametrize("held", ["update", "lease"])
def test_a_name_of_an_owner_that_has_not_come_back_is_waited_for_and_its_holder_named(
    owner: Worker, reader: Worker, restart, start_worker, held: str
):
    """Whether it computes or is dying, nobody can tell; whoever leases or updates it is not who has the name."""
    other = start_worker(setup="x = torch.zeros(4).share_memory_()")
    if held == "update":
        owner.do("update = policy.update(); update.__enter__(); None")
    else:
        reader.do("lease = policy.read()")
    restart()
    with raises("NameTaken") as caught:
        other.do("client.register_tensors('policy', {'x': x}, timeout=0.3)")
    assert f"pid {owner.pid}" in caught.value.holder
    other.say("client.register_tensors('policy', {'x': x}, timeout=50).generation")
    owner.kill()
    owner.process.wait(20)
    assert other.hear() > 1


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


OWN = """
base = torch.zeros(20, 8).share_memory_()
for n in range(20):
    client.register_tensors(f"own {n}", {"x": torch.full((4,), n).share_memory_()})
    client.register_tensors(f"common {n}", {"x": base[n]})
"""


def test_one_look_at_an_owner_brings_all_its_publications(agent, start_worker, restart, monkeypatch):
    """A look goes through all that it has open, which grows with its publications."""
    owner = start_worker(setup=OWN)
    restart.kill()
    looks: list[int] = []
    monkeypatch.setattr(fetching, "open_files", lambda pid: looks.append(pid) or open_files(pid))
    successor, ready = TensorBusAgent(), threading.Event()
    thread = threading.Thread(target=successor.run, args=(ready.set,))
    thread.start()
    try:
        assert ready.wait(20)
        with TensorBusClient(0, connection_timeout=20) as client:
            for n in range(20):
                for name, value in ((f"own {n}", n), (f"common {n}", 0)):
                    with client.subscribe(name, timeout=20) as policy, policy.read() as weights:
                        assert weights["x"][0].item() == value
    finally:
        successor.stop()
        thread.join(60)
    assert looks == [owner.pid]


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


# -- memory that cannot be opened again --------------------------------------------------------------------------------

BIG = """
big = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(512 << 20))
big[-1] = 7
policy = client.register_tensors("policy", {"big": big})
"""


class Narrow(Agent):
    """It has no room for 512 MiB more in its address space, until it is given some."""

    command = (
        sys.executable,
        "-W",
        "error",
        "-c",
        """
import resource, sys
from etha.cli import main
from etha.tensor_bus import agent
def door(path, door=agent.FrontDoor):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (400 << 20), resource.RLIM_INFINITY))
    return door(path)
agent.FrontDoor = door
sys.argv = ["etha", "agent"]
main()
""",
    )

    def widen(self) -> None:
        resource.prlimit(self.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.fixture
def narrow(agent: Agent, start_worker, restart, runtime: Path, tmp_path: Path) -> Iterator[tuple]:
    """An owner, a reader from before, and an agent that could not open the memory when it followed."""
    owner, reader = start_worker(setup=BIG), start_worker(setup="policy = client.subscribe('policy')")
    restart.kill()
    successor = Narrow(dict(os.environ), tmp_path)
    yield owner, reader, successor
    successor.stop()


COME_BACK = "try: client.subscribe('nothing', timeout=0)\nexcept etha.errors.NoPublication: pass"
"""A call that is answered: what the agent has to say to who has come back is heard before that."""

WHOLE = "with client.subscribe('policy', timeout=20) as p, p.read(timeout=20) as w: v = w['big'][-1].item()\nv"


def test_memory_that_cannot_be_opened_again_is_told_of(narrow, start_worker):
    """A reader at once and with the reason, as often as it asks; the owner once; and who has it mapped reads on."""
    owner, reader, successor = narrow
    fresh = start_worker()
    for _ in range(2):
        with raises("SystemLimit") as caught:
            fresh.do("client.subscribe('policy', timeout=50)", timeout=20)
        assert caught.value.resource
    assert reader.do("with policy.read() as w: v = w['big'][-1].item()\nv") == 7
    owner.do(COME_BACK)
    with raises("SystemLimit"):
        owner.do("policy.publish()")
    assert owner.do("policy.publish()") == 1
    with raises("SystemLimit"):
        fresh.do("client.subscribe('policy', timeout=0)")
    owner.do("policy.publish()")
    assert successor.errors.read_text().count("policy") == 1


def test_memory_that_could_not_be_opened_is_tried_again(narrow, start_worker):
    _, _, successor = narrow
    fresh = start_worker()
    with raises("SystemLimit"):
        fresh.do("client.subscribe('policy', timeout=50)", timeout=20)
    successor.widen()
    assert fresh.do(WHOLE) == 7


def test_memory_that_could_not_be_opened_is_rebound(narrow, start_worker):
    owner, reader, _ = narrow
    fresh = start_worker()
    with raises("SystemLimit"):
        fresh.do("client.subscribe('policy', timeout=50)", timeout=20)
    owner.do(COME_BACK)
    owner.do("one = torch.full((1,), 9, dtype=torch.uint8).share_memory_()")
    with raises("SystemLimit"):
        owner.do("policy.rebind({'big': one.expand(512 << 20)})")
    owner.do("policy.rebind({'big': one.expand(512 << 20)})")
    assert fresh.do(WHOLE) == 9
    assert reader.do("with policy.read(timeout=20) as w: v = w['big'][-1].item()\nv") == 9


class Crowded(Agent):
    """It may take no descriptors from an owner, and has no room for 40 that it is sent, until it is given some."""

    command = (
        sys.executable,
        "-W",
        "error",
        "-c",
        gates.filtered(gates.PIDFD_GETFD)
        + """
import os, resource, sys
from etha.cli import main
from etha.tensor_bus import agent
def door(path, door=agent.FrontDoor):
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 30, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return door(path)
agent.FrontDoor = door
sys.argv = ["etha", "agent"]
main()
""",
    )

    def widen(self) -> None:
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (hard, hard))


def test_descriptors_that_a_new_agent_had_no_room_for_are_asked_for_again(
    agent: Agent, start_worker, restart, runtime: Path, tmp_path: Path, request
):
    owner = start_worker(setup="many = {str(n): torch.full((4,), n).share_memory_() for n in range(40)}")
    owner.do("policy = client.register_tensors('policy', many)")
    fresh = start_worker()
    restart.kill()
    successor = Crowded(dict(os.environ), tmp_path)
    request.addfinalizer(successor.stop)
    owner.do(COME_BACK)  # it sends them at the end of this
    owner.do(COME_BACK)
    with raises("SystemLimit") as caught:
        owner.do("policy.publish()")
    assert caught.value.resource == "RLIMIT_NOFILE"
    with raises("SystemLimit"):
        fresh.do("client.subscribe('policy', timeout=0.5)")
    successor.widen()
    fresh.say("with client.subscribe('policy', timeout=50) as p, p.read() as w: v = w['33'].tolist()\nv")
    while not fresh.heard():
        owner.do("policy.publish()")
    assert fresh.hear() == [33] * 4


# -- what is recorded contradicts itself -------------------------------------------------------------------------------

Garble = Callable[[dict], None]
"""Changes records, key to record, as no agent writes them; their checksums will be right."""


def _change(records: dict, kind: type, **fields) -> None:
    key = min(key for key, record in records.items() if type(record) is kind)
    records[key] = structs.replace(records[key], **fields)


def _move(records: dict, kind: type, to: Callable[[bytes], bytes]) -> None:
    key = min(key for key, record in records.items() if type(record) is kind)
    records[to(key)] = records.pop(key)


def _twins(records: dict) -> None:
    """Another live publication of the same name and owner."""
    _change(records, GenerationRecord, newest=9)
    for key in (publication_key, version_key):
        records[key(9)] = records[key(1)]


def _lease_of_the_future(records: dict) -> None:
    lease = next(key for key, record in records.items() if type(record) is ClaimRecord and record.kind == "lease")
    records[lease] = structs.replace(records[lease], version=8)


GARBLED: dict[str, Garble] = {
    "a phase that there is not": lambda records: _change(records, VersionRecord, phase="asleep"),
    "a rest that is none": lambda records: _change(records, VersionRecord, rest="writing"),
    "a version below zero": lambda records: _change(records, VersionRecord, version=-1),
    "a version that went back": _lease_of_the_future,
    "a process that cannot be": lambda records: _change(records, ClientRecord, pid=-1),
    "a key that is too short": lambda records: _move(records, PublicationRecord, lambda key: key[:3]),
    "a claim of half a client": lambda records: _move(records, ClaimRecord, lambda key: key[:12]),
    "two of one name": _twins,
    "numbers used up": lambda records: _change(records, GenerationRecord, newest=(1 << 64) - 1),
    "numbers given before": lambda records: _change(records, GenerationRecord, newest=0),
    "served before the first": lambda records: _change(records, ServedRecord, sequence=-7),
}


def garble(garbled: Garble) -> None:
    """Change the state at rank 0's path, of which no agent lives."""
    path = agent_paths(0).state
    reader = StateReader(path)
    before = reader.everything()
    reader.close()
    after = dict(before)
    garbled(after)
    assert after != before
    writer = StateWriter(path)
    writer.write({**dict.fromkeys(before), **after})
    writer.close()


@pytest.mark.parametrize("name", ["a phase that there is not", "a process that cannot be", "two of one name"])
def test_a_state_that_contradicts_itself_is_set_aside(
    owner: Worker, reader: Worker, restart, start_agent, runtime: Path, name: str
):
    """Else each agent that starts there would end on it."""
    reader.do("lease = policy.read()")
    restart.kill()
    garble(GARBLED[name])
    agent = start_agent()
    for path in (agent_paths(0).state, agent_paths(0).command):
        assert os.path.exists(path + ".damaged")
    said = agent.errors.read_text()
    assert said.count(".damaged") == 2
    assert "Traceback" not in said
    with raises("StaleHandle"):
        owner.do("with policy.update(): pass")
    for worker in (owner, reader):
        worker.do("client.close(); client = TensorBusClient(0)")
    owner.do("policy = client.register_tensors('policy', {'weights': weights})")
    reader.do("client.subscribe('policy').read().release()")


def test_a_lease_that_the_agent_has_forgotten_is_not_vouched_for(owner: Worker, reader: Worker, restart):
    """The reader has the file open that was set aside, in which its lease is as good as ever."""
    assert reader.do("lease = policy.read(); lease.check(); lease.wanted") is False
    restart.kill()
    garble(GARBLED["a phase that there is not"])
    restart.start()
    with raises("StaleHandle") as caught:
        reader.do("lease.check()")
    assert caught.value.resource == "policy"
    assert reader.do("lease.wanted") is True


def test_a_client_that_is_made_while_one_agent_follows_another(agent, restart, monkeypatch):
    """The first has welcomed it, and the state is the second's when it is opened."""

    def late(path: str) -> StateReader:
        restart()
        return StateReader(path)

    monkeypatch.setattr(link, "StateReader", late)
    with TensorBusClient(0, connection_timeout=20) as client:
        with pytest.raises(NoPublication):
            client.subscribe("policy", timeout=0.2)
        assert client.agent_pid != agent.pid


@pytest.fixture(scope="module")
def recorded() -> dict:
    """What a registry with an owner, a writer, readers and one who waits has on record."""
    world = World()
    owner, reader = world.client("owner"), world.client("reader")
    for name in ("w", "x"):
        world.register(owner, name)
        world.subscribe(reader, name)
    world.publish(owner, world.publication())
    world.read(reader, world.publication())
    world.update(owner, world.publication("x"))
    world.read(reader, world.publication("x"), minimum=5)
    records = world.records.decoded()
    return {**records, b"s" + owner: ServedRecord(3)}


@pytest.mark.parametrize("garbled", GARBLED.values(), ids=GARBLED)
def test_a_rehearsal_finds_what_no_agent_writes(recorded: dict, garbled: Garble):
    rehearse(recorded, 5.0)
    records = dict(recorded)
    garbled(records)
    with pytest.raises(InvalidRecord) as caught:
        rehearse(records, 5.0)
    assert caught.value.resource == "state"


def test_what_a_rehearsal_lets_pass_can_be_recovered(recorded: dict):
    """Whoever lives: 1,000 states, each with up to three fields changed to what its type allows."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    source = random.Random(seed)
    passed = 0
    for _ in range(1_000):
        records = dict(recorded)
        for _ in range(source.randrange(1, 4)):
            key = source.choice(sorted(records))
            records[key] = _changed(records[key], source)
        try:
            rehearse(records, 5.0)
        except InvalidRecord:
            continue
        passed += 1
        registry = Registry()
        journal = Journal(Records(), registry)
        found = recover(records, registry, journal, 5.0, lambda pid, started, source=source: _perhaps(source))
        for client in (*found.dead, *(session.client for session in found.living)):
            registry.client_died(client, 6.0)
            journal.commit(6.0)
    assert 50 < passed < 950


def _perhaps(source: random.Random) -> None:
    if source.random() < 0.5:
        raise ProcessLookupError


def _changed(record, source: random.Random):
    field = source.choice(structs.fields(record))
    value = getattr(record, field.name)
    choices = {
        bool: (True, False),
        int: (value, 0, 1, 2, -1, 5, 1 << 31, (1 << 63) - 1, (1 << 64) - 1),
        str: ("", "w", "x", *Phase, "lease", "update", "import", "close"),
        bytes: (b"", b"owner...........", b"reader.........."),
    }
    return structs.replace(record, **{field.name: source.choice(choices.get(type(value), (value,)))})
