"""How an agent starts, and how it ends: whose path it is, what it will not touch, what it leaves behind."""

from __future__ import annotations

import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import PATIENCE, Agent

from etha.errors import AgentGone, AgentRunning, NoPublication, StaleHandle, UnsafePath
from etha.tensor_bus.agent import TensorBusAgent
from etha.tensor_bus.client import TensorBusClient
from etha.tensor_bus.lockfile import read_lock
from etha.tensor_bus.paths import AgentPaths, agent_paths

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
SLACK = 1.0
"""Seconds that a loaded box may take to end a process."""

COMMAND = [sys.executable, "-m", "etha", "agent"]


@pytest.fixture
def paths(runtime: Path) -> AgentPaths:
    return agent_paths(0)


@pytest.fixture(autouse=True)
def descriptor_limit() -> Iterator[None]:
    """An agent raises it; here some are made in the test's own process."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def contents(directory: Path) -> dict[str, tuple[int, ...]]:
    """What stands there, and whether anything of it was touched."""
    found = {path.name: path.lstat() for path in directory.iterdir()}
    return {name: (f.st_ino, f.st_mode, f.st_uid, f.st_size, f.st_mtime_ns) for name, f in found.items()}


def refuse(*arguments: str) -> str:
    """Start an agent that must not start; what it says."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("etha agent: ")
    return done.stderr


# -- one path, one agent -----------------------------------------------------------------------------------------------


def test_eight_at_once_and_one_serves(runtime: Path, paths: AgentPaths):
    starting = [subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    said = [process.stdout.readline() for process in starting]
    serving = [process for process, line in zip(starting, said, strict=True) if line]
    assert len(serving) == 1
    assert f"pid {serving[0].pid}" in "".join(said)
    losers = [process for process in starting if process is not serving[0]]
    assert {process.wait(PATIENCE) for process in losers} == {1}
    for process in losers:
        assert f"AgentRunning: pid {serving[0].pid} already serves {paths.command}" in process.stderr.read()
    with TensorBusClient(0, connection_timeout=20) as client:
        assert client.agent_pid == serving[0].pid
    before = contents(runtime)
    assert f"pid {serving[0].pid} " in refuse()
    after = contents(runtime)
    assert {name: found[0] for name, found in after.items()} == {name: found[0] for name, found in before.items()}
    serving[0].terminate()
    assert serving[0].wait(PATIENCE) == 0
    for process in starting:
        process.communicate()
    assert list(runtime.iterdir()) == []


@pytest.mark.stress
@pytest.mark.parametrize("hundred", range(10))
def test_a_thousand_races(runtime: Path, hundred: int):
    """Forked from here, where everything is imported, in every other round over the files of a killed agent."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    source = random.Random(seed)
    for _ in range(100):
        gate, go = os.pipe()
        answers, answer = os.pipe()
        racers = []
        for _ in range(8):
            delay = source.choice((0, 0, source.random() * 0.01))
            pid = os.fork()
            if pid == 0:
                _race(gate, answer, delay)
            racers.append(pid)
        os.write(go, b"!" * 8)
        outcomes = [os.read(answers, 1) for _ in racers]
        assert outcomes.count(b"S") == 1, outcomes
        assert outcomes.count(b"R") == 7, outcomes
        winner = read_lock(agent_paths(0).lock).text.pid
        end = source.choice((signal.SIGTERM, signal.SIGKILL))
        os.kill(winner, end)
        statuses = {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in racers}
        assert statuses.pop(winner) == (0 if end is signal.SIGTERM else -end)
        assert set(statuses.values()) == {1}
        for fd in (gate, go, answers, answer):
            os.close(fd)


def _race(gate: int, answer: int, delay: float) -> None:
    try:
        os.read(gate, 1)
        time.sleep(delay)
        agent = TensorBusAgent(0)
        signal.signal(signal.SIGTERM, lambda *_: agent.stop())
        agent.run(lambda: os.write(answer, b"S"))
        os._exit(0)
    except AgentRunning:
        os.write(answer, b"R")
        os._exit(1)
    except BaseException:
        os.write(answer, b"X")
        os._exit(2)


# -- what it will not touch --------------------------------------------------------------------------------------------

SUFFIXES = [
    "_command.lmdb",
    "_command.lmdb-lock",
    "_command.lmdb.sock",
    "_command.lmdb.agent",
    "_command.lmdb.writer",
    "_state.lmdb",
    "_state.lmdb-lock",
]


@pytest.mark.parametrize("kind", ["link", "dangling", pytest.param("foreign", marks=as_root), "group", "others"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_planted_file_is_refused_and_untouched(runtime: Path, tmp_path: Path, suffix: str, kind: str):
    target, planted = tmp_path / "target", runtime / f"agent_rank0{suffix}"
    target.write_text("precious")
    if kind in ("link", "dangling"):
        planted.symlink_to(target if kind == "link" else tmp_path / "nowhere")
    else:
        planted.write_text("precious")
        planted.chmod({"foreign": 0o600, "group": 0o660, "others": 0o602}[kind])
        if kind == "foreign":
            os.chown(planted, NOBODY, NOBODY)
    before, beside = contents(runtime), contents(tmp_path)
    with pytest.raises(UnsafePath) as caught:
        TensorBusAgent(0)
    assert caught.value.resource == str(planted)
    assert contents(runtime) == before
    assert contents(tmp_path) == beside
    assert target.read_text() == "precious"


def test_the_files_of_the_dead_go_together_or_not_at_all(runtime: Path):
    """One planted file among them, and nothing is removed."""
    for suffix in SUFFIXES:
        (runtime / f"agent_rank0{suffix}").touch(0o600)
    (runtime / "agent_rank0_command.lmdb.writer").chmod(0o666)
    before = contents(runtime)
    with pytest.raises(UnsafePath):
        TensorBusAgent(0)
    assert contents(runtime) == before


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_that_others_can_change_is_refused(runtime: Path, mode: int):
    runtime.chmod(mode)
    text = refuse()
    assert f"UnsafePath: {runtime} " in text
    assert "0700" in text
    assert list(runtime.iterdir()) == []


def test_the_state_may_stand_elsewhere_but_not_anywhere(runtime: Path, tmp_path: Path):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    assert f"UnsafePath: {open_to_all} " in refuse("--state", str(open_to_all / "state.lmdb"))
    assert list(open_to_all.iterdir()) == list(runtime.iterdir()) == []


def test_a_socket_path_that_is_too_long(runtime: Path):
    deep = runtime / ("d" * 100)
    assert "InvalidArgument: the socket path " in refuse("--command-queue", str(deep))
    assert list(runtime.iterdir()) == []


# -- how it ends -------------------------------------------------------------------------------------------------------


def test_nothing_is_left_when_no_worker_is_registered(agent: Agent, runtime: Path):
    TensorBusClient(0, connection_timeout=20).close()
    assert len(list(runtime.iterdir())) == 7
    assert agent.stop() == 0
    assert list(runtime.iterdir()) == []
    assert agent.errors.read_text() == ""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_workers_files_stay_and_the_successor_goes_on_with_them(
    agent: Agent, start_agent: Callable[..., Agent], runtime: Path, paths: AgentPaths, end: signal.Signals
):
    client = TensorBusClient(0, connection_timeout=20)
    before = contents(runtime)
    agent.kill(end)
    assert agent.process.wait(PATIENCE) == (-9 if end is signal.SIGKILL else 0)
    gone = set() if end is signal.SIGKILL else {os.path.basename(paths.socket)}
    assert set(before) - set(contents(runtime)) == gone
    state = read_lock(paths.lock)
    assert (state.held, state.text.pid) == (False, agent.pid)
    with pytest.raises(AgentGone):
        client.subscribe("policy", timeout=0.2)
    successor = start_agent()
    assert set(contents(runtime)) == set(before)
    assert read_lock(paths.lock).text.epoch > state.text.epoch
    with pytest.raises(NoPublication):
        client.subscribe("policy", timeout=0.2)
    assert client.agent_pid == successor.pid
    client.close()
    with TensorBusClient(0, connection_timeout=20) as another:
        assert another.agent_pid == successor.pid
    assert successor.stop() == 0
    assert list(runtime.iterdir()) == []


def test_a_removed_directory_is_noticed_and_said(agent: Agent, start_agent: Callable[..., Agent], runtime: Path):
    client = TensorBusClient(0, connection_timeout=20)
    pidfd = os.pidfd_open(agent.pid)
    removed = time.monotonic()
    shutil.rmtree(runtime)
    runtime.mkdir(mode=0o700)
    assert select.select([pidfd], [], [], PATIENCE)[0]
    noticed = time.monotonic() - removed
    os.close(pidfd)
    successor = start_agent()
    assert agent.process.wait(PATIENCE) == 0
    assert "was removed under this agent; it stops" in agent.errors.read_text()
    assert noticed < 0.5 + SLACK
    assert read_lock(agent_paths(0).lock).text.pid == successor.pid
    with pytest.raises(StaleHandle):  # it has what its predecessor knew no more
        client.subscribe("policy", timeout=5)
    client.close()
    with TensorBusClient(0, connection_timeout=20) as another:
        assert another.agent_pid == successor.pid
    assert successor.process.poll() is None
