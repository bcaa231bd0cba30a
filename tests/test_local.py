"""`etha.tensor_bus.local`: an agent for as long as a block lasts, and nothing of it afterwards."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import etha
from etha.errors import AgentFailed, AgentGone, InvalidArgument
from etha.tensor_bus import local
from etha.tensor_bus.lockfile import read_lock
from etha.tensor_bus.paths import agent_paths


def gone(pidfd: int, timeout: float = 30.0) -> bool:
    return bool(select.select([pidfd], [], [], timeout)[0])


def test_an_agent_for_a_block_and_nothing_afterwards(runtime: Path):
    environment, descriptors = dict(os.environ), os.listdir("/proc/self/fd")
    threads = threading.active_count()
    with etha.local_agent(torch.device("cpu")) as agent:
        pidfd = os.pidfd_open(agent.pid)
        assert (agent.rank, agent.device, agent.alive) == (0, "cpu", True)
        assert read_lock(agent.paths.lock).text.pid == agent.pid
        with agent.client() as owner, agent.client() as reader:
            assert owner.agent_pid == agent.pid
            tensor = torch.arange(4.0).share_memory_()
            policy = owner.register_tensors("policy", {"w": tensor})
            with reader.subscribe("policy").read() as weights:
                assert weights["w"].tolist() == [0, 1, 2, 3]
                assert threading.active_count() == threads
            weights = None
            gc.collect()
        assert policy.closed
        policy = tensor = None
        assert agent.said == ""
    assert gone(pidfd, 0)
    os.close(pidfd)
    assert list(runtime.iterdir()) == []
    assert dict(os.environ) == environment
    assert os.listdir("/proc/self/fd") == descriptors


def test_two_at_once_are_seen_by_status_and_found_by_device(runtime: Path):
    with etha.local_agent() as first, etha.local_agent() as second:
        assert (first.rank, second.rank) == (0, 1)
        done = subprocess.run([sys.executable, "-m", "etha", "status"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        for agent in (first, second):
            assert f"agent rank {agent.rank} · pid {agent.pid} · cpu · serving" in done.stdout
        with etha.TensorBusClient.for_device("cpu") as client:
            assert client.agent_pid == first.pid


def test_a_rank_of_which_anything_stands_there_is_not_taken(runtime: Path):
    planted = runtime / "agent_rank0_state.lmdb"
    planted.write_text("precious")
    with etha.local_agent() as agent:
        assert agent.rank == 1
    assert list(runtime.iterdir()) == [planted]
    assert planted.read_text() == "precious"


def test_who_is_faster_gets_the_rank_and_the_other_the_next(runtime: Path, monkeypatch: pytest.MonkeyPatch):
    start = local._try

    def overtaken(rank: int, *rest: object):
        monkeypatch.setattr(local, "_try", start)
        faster = stack.enter_context(etha.local_agent())
        assert faster.rank == rank == 0
        return start(rank, *rest)

    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(local, "_try", overtaken)
        slower = stack.enter_context(etha.local_agent())
        assert slower.rank == 1
        assert read_lock(agent_paths(0).lock).held
    assert list(runtime.iterdir()) == []


def test_a_client_that_is_still_open_loses_its_agent_and_leaves_no_file(runtime: Path):
    with etha.local_agent() as agent:
        client = agent.client()
    assert list(runtime.iterdir()) == []
    with pytest.raises(AgentGone):
        client.subscribe("policy", timeout=5)
    client.close()


def test_an_exception_in_the_block_ends_it_too(runtime: Path):
    agents: list[etha.LocalAgent] = []
    with pytest.raises(ZeroDivisionError), etha.local_agent() as agent:
        agents.append(agent) or 1 / 0
    assert not agents[0].alive
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_stopped_or_killed_agent_leaves_nothing(
    runtime: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING), etha.local_agent() as agent:
        pidfd = os.pidfd_open(agent.pid)
        os.kill(agent.pid, number)
        if number is signal.SIGKILL:
            assert gone(pidfd)
            assert not agent.alive
        else:
            os.waitid(os.P_PIDFD, pidfd, os.WSTOPPED)
    assert gone(pidfd, 0)
    os.close(pidfd)
    assert list(runtime.iterdir()) == []
    assert len(caplog.messages) == (number is signal.SIGKILL)


def test_one_that_will_not_end_is_killed(runtime: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local, "_GRACE_SECONDS", 0.2)
    monkeypatch.setattr(subprocess.Popen, "terminate", lambda self: None)
    with etha.local_agent() as agent:
        pidfd = os.pidfd_open(agent.pid)
    assert gone(pidfd, 0)
    os.close(pidfd)
    assert agent._process.returncode == -signal.SIGKILL
    assert list(runtime.iterdir()) == []


# -- this process ends -------------------------------------------------------------------------------------------------

PROGRAM = """
import logging, os, sys, etha
logging.basicConfig()
with etha.local_agent() as agent:
    print(agent.pid, flush=True)
    {body}
"""


def program(body: str) -> tuple[subprocess.Popen[str], int, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    pid = int(process.stdout.readline())
    return process, pid, os.pidfd_open(pid)


def test_it_dies_with_its_parent(runtime: Path):
    process, _, pidfd = program("sys.stdin.read()")
    process.kill()
    process.communicate(timeout=60)
    assert gone(pidfd)
    os.close(pidfd)
    assert list(runtime.iterdir()) == []


def test_it_outlives_the_thread_that_started_it(runtime: Path):
    """Which ``PR_SET_PDEATHSIG`` would not."""
    stack = contextlib.ExitStack()
    agents: list[etha.LocalAgent] = []
    thread = threading.Thread(target=lambda: agents.append(stack.enter_context(etha.local_agent())))
    thread.start()
    thread.join(60)
    pidfd = os.pidfd_open(agents[0].pid)
    assert not gone(pidfd, 0.2)
    with agents[0].client() as client:
        assert client.agent_pid == agents[0].pid
    stack.close()
    assert gone(pidfd, 0)
    os.close(pidfd)


def test_a_forked_child_that_leaves_the_block_ends_nothing(runtime: Path):
    process, pid, pidfd = program(
        "child = os.fork()\n    if child: os.waitpid(child, 0); print('waited', flush=True); sys.stdin.read()"
    )
    assert process.stdout.readline() == "waited\n"
    assert not gone(pidfd, 0)
    assert read_lock(agent_paths(0).lock).text.pid == pid
    assert process.communicate("", timeout=60) == ("", "")
    assert process.returncode == 0
    assert gone(pidfd, 0)
    os.close(pidfd)
    assert list(runtime.iterdir()) == []


def test_a_ctrl_c_reaches_the_program_and_not_its_agent(runtime: Path):
    with etha.local_agent() as agent:
        assert os.getpgid(agent.pid) != os.getpgid(0)
        assert os.getsid(agent.pid) == agent.pid


@pytest.mark.parametrize("pid", ["1", "4194304"])
def test_a_parent_that_is_none_is_refused(runtime: Path, pid: str):
    command = [sys.executable, "-m", "etha", "agent", "--parent", pid]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "InvalidArgument" in done.stderr
    assert list(runtime.iterdir()) == []


def test_what_it_said_can_be_read_afterwards(runtime: Path):
    with etha.local_agent() as agent:
        os.unlink(agent.paths.lock)
        pidfd = os.pidfd_open(agent.pid)
        assert gone(pidfd)
        os.close(pidfd)
        said = agent.said
    assert agent.said == said
    assert "was removed under this agent" in said


# -- what cannot start -------------------------------------------------------------------------------------------------


def test_what_it_said_is_in_the_error(runtime: Path):
    with pytest.raises(AgentFailed) as caught, etha.local_agent("cuda:4000"):
        pass
    assert "etha agent: " in caught.value.message
    assert "CUDA" in caught.value.message
    assert caught.value.resource == agent_paths(0).command
    assert caught.value.holder.startswith("pid ")
    assert list(runtime.iterdir()) == []


def test_a_directory_that_others_can_change_is_told(runtime: Path):
    runtime.chmod(0o777)
    with pytest.raises(AgentFailed, match="UnsafePath"), etha.local_agent():
        pass
    runtime.chmod(0o700)


def test_a_python_that_cannot_be_run(runtime: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", str(runtime / "python"))
    with pytest.raises(AgentFailed) as caught, etha.local_agent():
        pass
    assert caught.value.resource == str(runtime / "python")


def test_what_else_is_written_to_stdout_is_not_taken_for_its_line(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    chatty = tmp_path / "python"
    chatty.write_text(f'#!/bin/sh\necho hello\nexec {sys.executable} "$@"\n')
    chatty.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(chatty))
    with etha.local_agent() as agent:
        assert read_lock(agent.paths.lock).text.pid == agent.pid


def test_the_time_to_start_is_kept(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    idle = tmp_path / "python"
    idle.write_text("#!/bin/sh\ntrap '' TERM\necho waiting >&2\nexec sleep 600\n")
    idle.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(idle))
    began = time.monotonic()
    with pytest.raises(AgentFailed, match="waiting"), etha.local_agent(timeout=1.0):
        pass
    assert time.monotonic() - began < 4


def test_what_is_no_device_or_no_timeout_starts_nothing(runtime: Path):
    for call in (lambda: etha.local_agent("gpu!"), lambda: etha.local_agent(timeout=-1)):
        with pytest.raises(InvalidArgument), call():
            pass
    assert list(runtime.iterdir()) == []
