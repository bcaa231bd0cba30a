"""Fixtures: a runtime directory, agents and workers of one's own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_driver import FakeDriver
from harness import OWNER, PRELUDE, READER, Agent, Worker

from etha.tensor_bus.ipc.cuda import Device


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of one's own, short enough for a socket path."""
    directory = Path(f"/tmp/etha-test-{os.getpid()}-{time.monotonic_ns() % 10**9}")
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("ETHA_RUNTIME_DIR", str(directory))
    monkeypatch.setenv("AGENT_RANK", "0")
    for variable in ("RANK", "LOCAL_RANK", "AGENT_RANK_OFFSET"):
        monkeypatch.delenv(variable, raising=False)
    yield directory
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


@pytest.fixture
def start_agent(runtime: Path, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Start agents; they are ended with the test."""
    agents: list[Agent] = []

    def start(*arguments: str) -> Agent:
        agents.append(Agent(dict(os.environ), tmp_path, *arguments))
        return agents[-1]

    yield start
    for agent in agents:
        agent.stop()


@pytest.fixture
def agent(start_agent: Callable[..., Agent]) -> Agent:
    """The agent of rank 0. A healthy one says nothing on stderr."""
    return start_agent()


@pytest.fixture
def start_worker(runtime: Path, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Start workers, each with a connected ``client``; they are ended with the test, the killed ones too."""
    workers: list[Worker] = []

    def start(*, connect: bool = True, setup: str = "") -> Worker:
        worker = Worker(dict(os.environ), tmp_path)
        workers.append(worker)
        worker.do(PRELUDE)
        if connect:
            worker.do("client, info = bootstrap_client(connection_timeout=20)")
        if setup:
            worker.do(setup)
        return worker

    yield start
    for worker in workers:
        worker.destroy()


@pytest.fixture
def owner(agent: Agent, start_worker: Callable[..., Worker]) -> Worker:
    """A worker that owns the publication ``policy``."""
    return start_worker(setup=OWNER)


@pytest.fixture
def reader(owner: Worker, start_worker: Callable[..., Worker]) -> Worker:
    """A worker that subscribes to ``policy``."""
    return start_worker(setup=READER)


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    """A CUDA driver that is none, in this process."""
    made = FakeDriver()
    yield made
    made.shut()


@pytest.fixture
def device(driver: FakeDriver) -> Device:
    """Its first device."""
    return Device(driver, driver.uuids[0])
