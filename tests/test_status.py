"""``etha status`` and ``etha agent``, as a user runs them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

from rich.console import Console

from etha.cli.status import _publications
from etha.cli.survey import AgentView, PublicationView


def etha(*arguments: str, status: int | None = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "etha", *arguments], capture_output=True, text=True, check=False)
    if status is not None:
        assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def agents(status: int = 0) -> list[dict]:
    return json.loads(etha("status", "--json", status=status))["agents"]


def test_no_agent(runtime):
    assert "no agent" in etha("status", status=1)
    assert agents(1) == []


def test_it_shows_who_publishes_reads_and_waits(agent, owner, reader):
    reader.do("lease = policy.read()")
    owner.say("with policy.update(timeout=60): pass")
    reader.do("select.select([policy.fileno()], [], [], 30)")
    (found,) = agents()
    assert (found["condition"], found["pid"], found["rank"], found["device"]) == ("serving", agent.pid, 0, "cpu")
    assert {worker["pid"] for worker in found["workers"]} == {owner.pid, reader.pid}
    (publication,) = found["publications"]
    assert publication["name"] == "policy"
    assert (publication["tensors"], publication["nbytes"], publication["kind"]) == (1, 4096, "host")
    assert f"pid {owner.pid}" in publication["owner"]
    assert publication["memory"].startswith("1 mappings, 1 descriptors")
    (lease,) = found["leases"]
    assert (lease["kind"], lease["version"]) == ("lease", 0)
    (wait,) = found["waits"]
    assert f"pid {owner.pid}" in wait["who"]
    assert f"pid {reader.pid}" in wait["waits_for"][0]
    text = etha("status")
    for part in ("policy", f"pid {owner.pid}", "who waits", "update", "4.1 kB"):
        assert part in text
    reader.do("lease.release()")
    owner.hear()


def test_it_answers_while_the_agent_is_stopped_or_dead_and_says_which(agent, owner):
    agent.kill(signal.SIGSTOP)
    assert os.waitpid(agent.pid, os.WUNTRACED)[0] == agent.pid
    (found,) = agents(1)
    assert found["condition"] == "stopped"
    assert found["publications"][0]["name"] == "policy"
    agent.kill(signal.SIGCONT)
    agent.kill()
    agent.process.wait()
    (found,) = agents(1)
    assert found["condition"] == "dead"
    assert found["publications"][0]["name"] == "policy"


def test_what_ptrace_forbids_costs_the_report_and_not_the_service(agent, start_worker):
    owner = start_worker(setup="w = torch.ones(8).share_memory_()")
    owner.do("import ctypes; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)")
    owner.do("p = client.register_tensors('w', {'w': w})")
    owner.do("with p.update(): pass")
    (found,) = agents()
    assert found["publications"][0]["memory"]


def test_a_second_agent_is_refused_and_told_the_first_ones_pid(agent):
    text = etha("agent", status=1)
    assert f"pid {agent.pid} already serves" in text


def test_an_unknown_device_is_refused(runtime):
    assert "CUDA" in etha("agent", "--device", "cuda:4000", status=1)
    assert "InvalidArgument" in etha("agent", "--device", "tpu", status=1)
    assert os.listdir(runtime) == []


def test_the_rank_comes_from_the_launcher(start_agent, monkeypatch, runtime):
    monkeypatch.setenv("RANK", "3")
    serving = start_agent()
    assert "agent rank 3 serves cpu" in serving.line
    assert (runtime / "agent_rank3_state.lmdb").exists()


def test_a_bad_rank_is_named(runtime, monkeypatch):
    monkeypatch.setenv("RANK", "three")
    assert "RANK='three'" in etha("agent", status=1)


def test_an_agent_at_paths_of_its_own_is_found_by_its_state(start_agent, runtime):
    command, state = runtime / "c", runtime / "s"
    start_agent("--command-queue", str(command), "--state", str(state))
    assert agents(1) == []
    (found,) = json.loads(etha("status", "--json", "--state", str(state)))["agents"]
    assert found["condition"] == "serving"


def test_a_damaged_state_is_said(runtime):
    (runtime / "agent_rank0_state.lmdb").write_bytes(b"no database at all" * 1000)
    (runtime / "agent_rank0_state.lmdb").chmod(0o600)
    (found,) = agents(1)
    assert found["condition"] == "unreadable"


def test_a_runtime_directory_that_is_not_there_has_no_agent(runtime, monkeypatch):
    monkeypatch.setenv("ETHA_RUNTIME_DIR", str(runtime / "missing"))
    text = etha("status", status=1)
    assert "no agent" in text
    assert "Traceback" not in text


def test_a_publication_takes_two_lines_of_a_terminal(monkeypatch):
    view = PublicationView(
        "policy",
        1,
        3,
        "ready",
        500,
        4096,
        "host",
        "pid 4194304 (train.py)",
        2,
        "1 mappings, 1 descriptors in the owner",
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(_publications(AgentView(0, "s", "serving", publications=(view,))))
    lines = console.export_text().splitlines()
    assert len(lines) == 3
    assert "policy" in lines[1]
    assert "train.py" in lines[2]
