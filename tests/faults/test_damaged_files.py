"""Row 15: the agent's LMDB files have flipped bits, or are cut short, when no agent runs; or are another boot's.

Whatever is damaged: ``etha status`` answers, an agent starts and serves, what it cannot read it sets aside and says so;
no reader gets a wrong tensor. Nobody dies of it.

Each round has a directory of its own, with copies of the files that a killed agent left; the workers that it knew live.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from box import until
from counts import counts
from harness import PRELUDE, Worker
from omega import Omega
from scene import PLAYER, Scene

from etha.tensor_bus.state import AGENT_KEY, ClaimRecord, StateReader
from etha.tensor_bus.state_writer import StateWriter

FILES = ("agent_rank0_state.lmdb", "agent_rank0_command.lmdb")
LOCK = "agent_rank0_command.lmdb.agent"
ANOTHER_BOOT = "00000000-0000-4000-8000-000000000000"

VISIT = """
import logging, traceback
from etha.cli.survey import survey
from etha.tensor_bus.agent import TensorBusAgent

def looked():
    return [(view.condition, view.problem) for view in survey()]

def serve():
    # Answers with the pid of an agent that serves, and then with what that ended with.
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format="%(message)s")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            agent = TensorBusAgent(0)
            signal.signal(signal.SIGTERM, lambda *_: agent.stop())
            agent.run(lambda: print(repr(("ok", os.getpid())), flush=True))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""

USE = """
from etha.tensor_bus.state import PublicationRecord
client, info = bootstrap_client(connection_timeout=10)
own = made(6)
mine = client.register_tensors("a visitor's", own, version=6, timeout=10)
for _ in range(8):
    mine.publish()
theirs = client.subscribe("a visitor's", timeout=10)
if look(10, 14, name="theirs") != (14, [6]):
    raise ValueError("the visitor sees something else than it published")
theirs.close()

def seen(name, timeout):
    '''What a reader gets of what the files told of: a version and its bytes, or an error.'''
    def read():
        subscription = client.subscribe(name, timeout=timeout)
        try:
            with subscription.read(timeout=timeout) as lease:
                return lease.version, {name: (tuple(t.shape), sorted({int(v) for v in torch.aminmax(t)}))
                                       for name, t in lease.items()}
        finally:
            subscription.close()
    return attempt(read)
"""


class Left:
    """What a killed agent left, and what is true of it."""

    def __init__(self, scene: Scene, directory: Path) -> None:
        self.scene = scene
        self.directory = directory
        self.owners = [
            scene.worker(f"tensors = made({n}); p = client.register_tensors('of {n}', tensors, version={n})")
            for n in (11, 22, 33)
        ]
        self.readers = [scene.worker(f"s = client.subscribe('of {n}'); lease = s.read()") for n in (11, 22)]
        self.owners[2].do("[p.publish() for _ in range(50)]")
        until(lambda: scene.recorded("of 33").version == 83)
        until(lambda: sum(claim.kind == "lease" for claim in scene.state.all(ClaimRecord).values()) == 2)
        self.truth = {"of 11": (11, 11), "of 22": (22, 22), "of 33": (83, 33)}
        scene.agent.kill(signal.SIGSTOP)
        self.owners[2].do("[p.publish() for _ in range(3)]")  # stands in the queue
        # By another process: to close one of LMDB's lock files drops the record locks of whoever has it open, too.
        subprocess.run(["cp", "-a", scene.runtime, directory], check=True)
        (directory / "agent_rank0_command.lmdb.sock").unlink()
        scene.agent.kill(signal.SIGCONT)

    def close(self) -> None:
        while workers := self.owners or self.readers:
            self.scene.dismiss(workers.pop())


@pytest.fixture
def left(stage: tuple[Scene, Omega], tmp_path: Path) -> Iterator[Left]:
    left = Left(stage[0], tmp_path / "left")
    yield left
    left.close()


def damage(chance: random.Random, directory: Path) -> str:
    """Damage one file, or both; what was done."""
    done = []
    for name in chance.choice(((FILES[0],), (FILES[1],), FILES)):
        path = directory / name
        data = bytearray(path.read_bytes())
        kind = chance.randrange(4)
        if kind == 0:
            length = chance.choice((chance.randrange(len(data)), 4096 * chance.randrange(len(data) // 4096)))
            del data[length:]
            done.append(f"{name} cut to {length}")
        else:
            flips = {1: 1, 2: 16, 3: 256}[kind]
            # LMDB's structure is at the beginning of pages, and so few bytes that chance alone would miss it.
            places = [
                chance.choice(
                    (chance.randrange(len(data)), 4096 * chance.randrange(len(data) // 4096) + chance.randrange(64))
                )
                for _ in range(flips)
            ]
            for place in places:
                data[place] ^= 1 << chance.randrange(8)
            done.append(f"{name} flipped at {places[:4]}, {flips} in all")
        path.write_bytes(data)
    return "; ".join(done)


class Visitors:
    """One looks at the files, one becomes an agent there, one is its worker; all of them again and again."""

    def __init__(self, scene: Scene, runtime: Path) -> None:
        self.runtime = runtime
        environment = {**scene.environment, "ETHA_RUNTIME_DIR": str(runtime)}
        self.looker, self.server, self.user = (Worker(environment, scene.directory) for _ in range(3))
        scene.strays.update(worker.pid for worker in self.all)
        for worker in self.all:
            worker.do(PRELUDE + PLAYER + VISIT)
        self._heard = 0

    @property
    def all(self) -> tuple[Worker, Worker, Worker]:
        return self.looker, self.server, self.user

    def look(self) -> tuple[str, str | None]:
        (found,) = self.looker.do("looked()")
        return found

    def serve(self) -> int:
        """Its pid. An agent that does not start has ended, and its status is no pid."""
        self.server.say("serve()")
        pid = self.server.hear()
        assert pid > 1, self.said()
        return pid

    def end(self, pid: int) -> str:
        """What the agent has said, which ends well."""
        os.kill(pid, signal.SIGTERM)
        assert self.server.hear() == 0
        return self.said()

    def said(self) -> str:
        text = self.server.errors.read_text()
        new, self._heard = text[self._heard :], len(text)
        return new

    def close(self) -> None:
        for worker in self.all:
            worker.destroy()
        shutil.rmtree(self.runtime, ignore_errors=True)


@pytest.fixture
def visitors(stage: tuple[Scene, Omega]) -> Iterator[Visitors]:
    visitors = Visitors(stage[0], Path(f"/tmp/etha-damaged-{os.getpid()}"))
    yield visitors
    visitors.close()


def visit(left: Left, visitors: Visitors, chance: random.Random) -> str:
    """One damage, and all that comes of it; what became of it."""
    runtime, user = visitors.runtime, visitors.user
    shutil.copytree(left.directory, runtime)
    done = damage(chance, runtime)
    before, _ = visitors.look()
    assert before in ("dead", "unreadable", "starting", "of another boot"), done
    agent = visitors.serve()
    user.do(USE)
    assert visitors.look()[0] == "serving", done
    there = user.do("{record.name for record in client._link.state.all(PublicationRecord).values()}")
    found = 0
    for name, (version, stamp) in left.truth.items():
        value = user.do(f"seen({name!r}, {2 if name in there else 0})")
        if not isinstance(value, str):
            assert value[0] in (version, version + 3), (done, name, value)
            assert value[1] == {size: ((int(size),), [stamp]) for size in ("8192", "3")}, (done, name, value)
            found += 1
    user.do("mine.close(timeout=10); client.close()")
    said = visitors.end(agent)
    assert "Traceback" not in said, (done, said)
    aside = [name for name in os.listdir(runtime) if name.endswith(".damaged")]
    assert all(name in said for name in aside), (done, said)
    shutil.rmtree(runtime)
    return "set aside" if aside else f"{found} of {len(left.truth)} found"


@pytest.mark.parametrize("rounds", counts(150, 10_000))
def test_nobody_dies_and_nothing_is_wrong(left: Left, visitors: Visitors, stage: tuple[Scene, Omega], rounds: int):
    seed = int(os.environ.get("ETHA_SEED", random.randrange(1 << 20)))
    first = int(os.environ.get("ETHA_ROUND", 0))
    outcomes: Counter = Counter()
    for number in range(first, first + rounds):
        chance = random.Random(f"{seed} {number}")
        try:
            outcome = visit(left, visitors, chance)
        except BaseException:
            print(f"ETHA_SEED={seed} ETHA_ROUND={number} repeats this")
            raise
        outcomes[outcome] += 1
    print(f"ETHA_SEED={seed}: {dict(outcomes)}")
    assert outcomes["set aside"] > 0
    left.close()
    assert stage[1].faults() == []


@pytest.mark.parametrize("said_by", ["lock file", "state"])
def test_the_files_of_another_boot_mean_nothing(left: Left, visitors: Visitors, said_by: str):
    runtime = visitors.runtime
    shutil.copytree(left.directory, runtime)
    if said_by == "lock file":
        text = json.loads((runtime / LOCK).read_text())
        (runtime / LOCK).write_text(json.dumps({**text, "boot": ANOTHER_BOOT}))
    else:
        (runtime / LOCK).unlink()
        writer, reader = StateWriter(str(runtime / FILES[0])), StateReader(str(runtime / FILES[0]))
        writer.write({AGENT_KEY: msgspec.structs.replace(reader.agent(), boot=ANOTHER_BOOT)})
        reader.close()
        writer.close()
    assert visitors.look()[0] == "of another boot"
    agent = visitors.serve()
    visitors.user.do(USE)
    assert [visitors.user.do(f"seen({each!r}, 0)") for each in left.truth] == ["NoPublication"] * 3
    visitors.user.do("mine.close(); client.close()")
    assert visitors.end(agent) == ""
    assert os.listdir(runtime) == []
