"""`etha.tensor_bus.agent`: the loop goes on whatever one worker does, and ends cleanly."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import etha.tensor_bus.service
from etha.errors import AgentGone, EthaError, InvalidRecord, QueueFull
from etha.tensor_bus.agent import TensorBusAgent
from etha.tensor_bus.client import TensorBusClient


@contextmanager
def running() -> Iterator[TensorBusAgent]:
    """An agent in a thread of this process, so that a test can break it."""
    agent = TensorBusAgent()
    ready = threading.Event()
    thread = threading.Thread(target=agent.run, args=(ready.set,))
    thread.start()
    try:
        assert ready.wait(60)
        yield agent
    finally:
        agent.stop()
        thread.join(60)
    assert not thread.is_alive()


def test_to_stop_it_again_is_no_error(runtime: Path):
    agent = TensorBusAgent()
    agent.stop()
    agent.run()
    agent.stop()
    assert os.listdir(runtime) == []


def test_a_signal_that_comes_while_it_closes_leaves_no_file(runtime: Path, monkeypatch):
    agent = TensorBusAgent()
    close, lock = agent._board.close, agent._lock.release

    class Board:
        def __getattr__(self, name: str):
            return getattr(board, name)

        def close(self) -> None:
            agent.stop()
            close()

    def release(*, remove: bool) -> None:
        agent.stop()
        lock(remove=remove)

    board = agent._board
    agent._board = Board()
    monkeypatch.setattr(agent._lock, "release", release)
    agent.stop()
    agent.run()
    assert os.listdir(runtime) == []


def test_repeated_signals_end_it_once_and_cleanly(start_agent, runtime: Path):
    agent = start_agent()
    for _ in range(20):
        for number in (signal.SIGTERM, signal.SIGINT):
            agent.kill(number)
    assert agent.process.wait(60) in (0, -signal.SIGTERM, -signal.SIGINT)
    assert agent.errors.read_text() == ""
    assert os.listdir(runtime) == []


def test_a_mistake_about_one_worker_is_that_workers_alone(runtime: Path, monkeypatch, caplog):
    with running() as agent:
        broken, other = TensorBusClient(), TensorBusClient()
        packet = etha.tensor_bus.service.Service.packet
        victim = next(iter(agent._service.sessions()))

        def stumble(self, session, packet_, fds, now):
            if session is victim:
                raise RuntimeError("a mistake")
            packet(self, session, packet_, fds, now)

        monkeypatch.setattr(etha.tensor_bus.service.Service, "packet", stumble)
        with caplog.at_level(logging.ERROR), pytest.raises((AgentGone, EthaError)):
            broken.subscribe("nothing", timeout=1.0)
        assert "a mistake" in caplog.text
        assert agent._service.counters["mistakes"] >= 1
        with pytest.raises(EthaError, match="nothing named"):
            other.subscribe("nothing", timeout=0.0)
        monkeypatch.undo()
        broken.close()
        other.close()


def test_an_agent_that_cannot_record_anything_still_ends_and_removes_its_files(runtime: Path, monkeypatch, caplog):
    def full(*_):
        raise QueueFull("the disk is full.")

    agent = TensorBusAgent()
    monkeypatch.setattr(agent._writer, "write", full)
    agent.stop()
    agent.run()
    assert "nothing can be recorded" in caplog.text
    assert os.listdir(runtime) == []


def test_whatever_ends_it_its_files_go(runtime: Path, monkeypatch):
    def damaged(*_):
        raise InvalidRecord("the state is damaged.")

    agent = TensorBusAgent()
    monkeypatch.setattr(agent._writer, "write", damaged)
    with pytest.raises(InvalidRecord):
        agent.run()
    assert os.listdir(runtime) == []
