"""One agent and some workers for a whole test module; and what must be left of them between two tests: nothing.

Starting a process that imports torch costs seconds, so tests that only need "a worker" share one. Each test uses
publications of its own name.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from harness import PATIENCE, PRELUDE, Agent, Worker

from etha.tensor_bus.state import ClaimRecord, PublicationRecord, StateReader

TOOLS = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
from lanes import *
"""


class Box:
    """A runtime directory, its agent, and the workers of one test module."""

    def __init__(self, name: str, directory: Path) -> None:
        self.runtime = Path(f"/tmp/etha-{name}-{os.getpid()}")
        self.runtime.mkdir(mode=0o700)
        self._directory = directory
        unset = ("RANK", "LOCAL_RANK", "AGENT_RANK_OFFSET")
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in unset},
            "ETHA_RUNTIME_DIR": str(self.runtime),
            "AGENT_RANK": "0",
        }
        self.agent = Agent(self.environment, directory)
        self.workers: list[Worker] = []
        self.state = StateReader(str(self.runtime / "agent_rank0_state.lmdb"))

    def worker(self, setup: str = "") -> Worker:
        """A worker with a connected ``client`` and the tools of `lanes`."""
        worker = Worker(self.environment, self._directory)
        self.workers.append(worker)
        worker.do(PRELUDE + TOOLS)
        worker.do("client, info = bootstrap_client(connection_timeout=20)")
        if setup:
            worker.do(setup)
        return worker

    def claims(self, name: str, *, granted: bool | None = None) -> list[ClaimRecord]:
        """Claims on a publication, imports left out."""
        return [
            claim
            for claim in self.state.all(ClaimRecord).values()
            if claim.name == name and claim.kind != "import" and granted in (None, claim.granted)
        ]

    def publications(self) -> set[str]:
        """Names that the agent knows."""
        return {record.name for record in self.state.all(PublicationRecord).values()}

    def open_descriptors(self) -> int:
        """How many the agent has."""
        return len(os.listdir(f"/proc/{self.agent.pid}/fd"))

    def close(self) -> str:
        """End everything; what the agent said on stderr."""
        self.state.close()
        for worker in self.workers:
            worker.destroy()
        self.agent.stop()
        said = self.agent.errors.read_text()
        for path in self.runtime.iterdir():
            path.unlink()
        self.runtime.rmdir()
        return said


def until(condition, timeout: float = PATIENCE) -> None:
    """Wait for what another process does; it is looked at again and again, and the wait ends with a failure."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so within {timeout} s")
        os.sched_yield()
