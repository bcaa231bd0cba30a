"""One agent, an owner and a reader: what the rounds of a fault are played on. The agent may die; the scene goes on.

The owner publishes ``policy``. In ``update()`` it fills every element of every tensor with the version to come, so a
lease shows a whole version exactly if all its elements are that number.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from harness import PRELUDE, Agent, Worker
from requiring import require

from etha.tensor_bus.state import PublicationRecord, StateReader, VersionRecord, version_key

SERVING_SECONDS = 2.0
"""Within this, a new agent has served a caller of its predecessor's: the median, as a busy box has its moments."""

PLAYER = """
from etha.errors import EthaError

def made(version):
    return {str(size): torch.full((size,), version, dtype=torch.int64).share_memory_() for size in (8192, 3)}

def write(version):
    for tensor in tensors.values():
        tensor.fill_(version)

def stamps(lease):
    return sorted({int(value) for tensor in lease.values() for value in torch.aminmax(tensor)})

def attempt(call):
    try:
        return call()
    except EthaError as error:
        return type(error).__name__

def look(timeout, least=None, name="policy"):
    def read():
        with globals()[name].read(min_version=least, timeout=timeout) as lease:
            return lease.version, stamps(lease)
    return attempt(read)

def step(timeout):
    def update():
        with policy.update(timeout=timeout):
            write(policy.version + 1)
        return policy.version
    return attempt(update)
"""


class Scene:
    """A runtime directory with its processes.

    Attributes:
        version: the newest of ``policy`` that the owner was told of.
        strays: pids of every process that was ever part of it.
        serving: for each restart, seconds from the start of the new agent's process to its first answer to a caller.
    """

    def __init__(self, directory: Path, agent: type[Agent] = Agent) -> None:
        self.directory = directory
        self.runtime = Path(f"/tmp/etha-faults-{os.getpid()}-{time.monotonic_ns() % 10**9}")
        self.runtime.mkdir(mode=0o700)
        unset = ("RANK", "LOCAL_RANK", "AGENT_RANK_OFFSET")
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in unset},
            "ETHA_RUNTIME_DIR": str(self.runtime),
            "AGENT_RANK": "0",
        }
        self.strays: set[int] = set()
        self.version = 0
        self.serving: list[float] = []
        self._kind = agent
        self.agent = self._start()
        self.workers: list[Worker] = []
        self.state = StateReader(str(self.runtime / "agent_rank0_state.lmdb"))
        self.owner = self.worker("tensors = made(0)\npolicy = client.register_tensors('policy', tensors)")
        self.reader = self.worker("policy = client.subscribe('policy')")

    def worker(self, setup: str = "") -> Worker:
        """A worker with a connected ``client`` and the words of `PLAYER`."""
        worker = Worker(self.environment, self.directory)
        self.workers.append(worker)
        self.strays.add(worker.pid)
        worker.do(PRELUDE + PLAYER)
        worker.do("client, info = bootstrap_client(connection_timeout=20)")
        if setup:
            worker.do(setup)
        return worker

    def dismiss(self, worker: Worker) -> None:
        """SIGKILL it, if it lives, and be done with it."""
        worker.destroy()
        self.workers.remove(worker)

    def follow(self, *, silent: bool = True) -> None:
        """The agent is dead, or dies now; start another on its path."""
        self.end_agent(silent=silent)
        self.agent = self._start()

    def end_agent(self, *, silent: bool = True) -> None:
        """SIGKILL the agent, if it lives. It has said nothing, unless it may have something to say."""
        self.agent.kill()
        self.agent.process.wait()
        self.agent.process.stdout.close()
        said = self.agent.errors.read_text()
        require(said == "" or not silent, f"the agent said: {said}")

    def step(self) -> None:
        """The owner writes a version."""
        self.version += 1
        found = self.owner.do("step(20)")
        require(found == self.version, f"a step to version {self.version} ended with {found}")

    def named(self, name: str) -> list[int]:
        """Generations of the publications of a name that are not over."""
        live = []
        for key, record in self.state.all(PublicationRecord).items():
            generation = int.from_bytes(key[1:], "big")
            version = self.state.version(generation)
            if record.name == name and version is not None and version.phase in ("ready", "torn", "writing"):
                live.append(generation)
        return live

    def recorded(self, name: str = "policy") -> VersionRecord:
        """What the state says of a publication."""
        (generation,) = self.named(name)
        return self.state.all(VersionRecord)[version_key(generation)]

    def close(self) -> None:
        """End everything."""
        self.state.close()
        for worker in self.workers:
            worker.destroy()
        self.agent.kill(signal.SIGCONT)
        self.agent.stop()
        for path in self.runtime.iterdir():
            path.unlink()
        self.runtime.rmdir()

    def _start(self) -> Agent:
        agent = self._kind(self.environment, self.directory)
        self.strays.add(agent.pid)
        return agent


def is_whole(found: object) -> bool:
    """Whether a `look` that was not refused showed one version and nothing else."""
    return isinstance(found, str) or found[1] == [found[0]]
