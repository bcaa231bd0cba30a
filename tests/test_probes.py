"""`benchmarks/probes`: what holds without a GPU. Each skips by name, keeps its deadline, and leaves no process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBES = Path(__file__).parent.parent / "benchmarks" / "probes"
NAMES = (
    "fence_or_event",
    "exporter_dies",
    "torch_handles",
    "other_user",
    "costs",
    "ping_pong",
    "read_only_fault",
)

NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(PROBES)}
"""Where there is a GPU, the driver hides it."""


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=NO_GPU, timeout=120, check=False)


@pytest.mark.parametrize("name", NAMES)
def test_skips_by_name_where_there_is_no_gpu(name, tmp_path):
    ran = run(PROBES / f"{name}.py", "--out", str(tmp_path))
    assert (ran.returncode, ran.stderr) == (0, "")
    said, record = ran.stdout.splitlines()
    assert said.startswith(f"{name}: skipped: no CUDA d")
    assert json.loads(record)["status"] == "skipped"
    assert json.loads((tmp_path / f"probe-{name}.json").read_text()) == json.loads(record)


def test_all_in_one_go_skip_and_write_nothing(tmp_path):
    ran = run(PROBES / "run_all.py", "--out", str(tmp_path))
    assert (ran.returncode, ran.stderr) == (0, "")
    summary = json.loads(ran.stdout.splitlines()[-1])
    assert summary["statuses"] == dict.fromkeys(NAMES, "skipped")
    assert summary["machine"]["device"] is None
    assert list(tmp_path.iterdir()) == []


STUCK = """
import sys, threading
from rig import FIGURES, children, run

def child(sock):
    threading.Event().wait()

def ask():
    FIGURES["so far"] = 5
    with children("child") as (one,):
        print(one.process.pid, flush=True)
        threading.Event().wait()

run("stuck", "Does it end?", ask, {"child": child}, seconds=1.5)
"""

CRASHES = """
import os
from rig import run

def ask():
    os.abort()

run("crashes", "Does it end?", ask)
"""

WRONG = """
from rig import children, run

def child(sock):
    raise SystemExit(7)

def ask():
    with children("child") as (one,):
        return one.hear(30)

run("wrong", "What did the child say?", ask, {"child": child})
"""


DRIVE = """
import json, sys, run_all
run_all.__file__ = sys.argv[1]
print(json.dumps(run_all.run_one("probe", 30.0)))
"""


def test_a_probe_that_is_stuck_ends_itself_and_its_children(tmp_path):
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    ran = run(script)
    assert ran.returncode == 3
    child, *_, record = ran.stdout.splitlines()
    assert json.loads(record)["status"] == "out of time"
    assert json.loads(record)["figures"] == {"so far": 5}
    assert not Path(f"/proc/{child}").exists()


def test_a_childs_end_is_told(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    ran = run(script)
    assert ran.returncode == 1
    assert json.loads(ran.stdout.splitlines()[-1])["answer"].endswith("child 'child' ended with status 7")


@pytest.mark.parametrize(("source", "status"), [(CRASHES, "failed"), (STUCK, "out of time")])
def test_the_runner_survives_what_a_probe_does(source, status, tmp_path):
    (tmp_path / "probe.py").write_text(source)
    (tmp_path / "drive.py").write_text(DRIVE)
    ran = run(tmp_path / "drive.py", str(tmp_path / "run_all.py"))
    assert ran.returncode == 0
    assert json.loads(ran.stdout.splitlines()[-1])["status"] == status


def test_the_runner_ends_a_probe_that_does_not_end_itself(tmp_path):
    (tmp_path / "probe.py").write_text("import signal, time\nwhile True:\n    time.sleep(60)\n")
    (tmp_path / "drive.py").write_text(DRIVE.replace("30.0", "1.0"))
    ran = run(tmp_path / "drive.py", str(tmp_path / "run_all.py"))
    record = json.loads(ran.stdout.splitlines()[-1])
    assert (record["status"], record["exit_status"]) == ("out of time", -9)
