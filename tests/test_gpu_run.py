"""`benchmarks/gpu.py` and `gpurun`: what holds without a GPU, and with stand-in children for the parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpurun.outcomes import gather
from gpurun.parts import BENCHMARKS, ROOT, parts

ABOUT = {"device": "NVIDIA H100 80GB HBM3", "kernel": "6.1", "torch": "2.11.0"}


def ended(*command: str, environment: dict[str, str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False, **options)


DRIVE = """
import json, sys
from pathlib import Path
from gpurun.parts import Part
from gpurun.program import run_all
about, out, limit, scratch, *rows = json.loads(sys.argv[1])
def gather(said):
    return {"lines": said.split(), "counts": {"failed": 1}}

made = [Part(name, (sys.executable, "-c", code), least, most, gather) for name, code, least, most in rows]
sys.exit(0 if run_all(made, about, Path(out), limit, Path(scratch)) else 1)
"""


@pytest.fixture
def drive(tmp_path):
    """Run stand-ins: (name, program, least, most). In a process of its own, as orphans of it become its own."""

    def driven(*rows, limit=60.0):
        told = json.dumps([ABOUT, str(tmp_path / "out"), limit, str(tmp_path), *rows])
        environment = {**os.environ, "PYTHONPATH": f"{BENCHMARKS}:{ROOT}"}
        ran = ended(sys.executable, "-c", DRIVE, told, environment=environment)
        assert ran.stderr == ""
        (file,) = (tmp_path / "out").iterdir()
        return ran, json.loads(file.read_text()), file.name

    return driven


def test_without_a_gpu_one_line_says_so_and_nothing_is_written(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path / "out"), "PYTHONPATH": ""}
    command = ["make", "-s", "gpu", f"PYTHON={sys.executable}"]
    before = sorted((BENCHMARKS / "results").iterdir())
    ran = ended(*command, environment=environment, cwd=ROOT)
    assert ran.returncode == 2
    first, *rest = ran.stderr.splitlines()
    assert first.startswith("no GPU: ")
    assert len(rest) == 1  # make's own word about the status
    assert ran.stdout == ""
    assert not (tmp_path / "out").exists()
    assert sorted((BENCHMARKS / "results").iterdir()) == before
    alone = ended(sys.executable, str(BENCHMARKS / "gpu.py"), environment=environment)
    assert (alone.returncode, alone.stderr, alone.stdout) == (2, first + "\n", "")


def test_the_parts_are_what_a_gpu_is_asked(tmp_path):
    these = parts(tmp_path, 0.125)
    assert [part.name for part in these[:3]] == ["probes", "tests", "tests, expandable segments"]
    assert all(part.name.startswith("bandwidth, ") for part in these[3:])
    rows = [
        word for part in these for flag, word in zip(part.command, part.command[1:], strict=False) if flag == "--only"
    ]
    assert {row for row in rows if "legacy" in row}
    assert {row for row in rows if "-fd" in row}
    assert not {row for row in rows if "host" in row}
    assert sum(part.least for part in these) < 540
    assert "expandable_segments:True" in these[2].environment["PYTORCH_CUDA_ALLOC_CONF"]


def test_what_parts_said_is_in_one_file_and_one_that_hangs_costs_itself_only(drive):
    ran, found, name = drive(
        ("first", "print('one')", 1, 30),
        ("hangs", "import time\nprint('begun', flush=True)\nwhile True: time.sleep(60)", 1, 4),
        ("crashes", "import os; print('now'); os.abort()", 1, 30),
        ("last", "print('four')", 1, 30),
    )
    assert ran.returncode == 1
    assert name.startswith("gpu-nvidia-h100-80gb-hbm3-")
    assert found["machine"] == ABOUT
    statuses = {name: (part["status"], part["exit_status"]) for name, part in found["parts"].items()}
    assert statuses["first"] == statuses["last"] == ("ended", 0)
    assert statuses["hangs"] == ("out of time", -2)
    assert statuses["crashes"] == ("ended", -6)
    assert found["parts"]["hangs"]["tail"][0] == "begun"
    assert [part["found"]["lines"][0] for part in found["parts"].values()] == ["one", "begun", "now", "four"]
    assert ran.stdout.splitlines()[0] == "first: ended, exit status 0, 0 s 1 failed"


def test_all_well_is_status_0(drive):
    ran, found, _ = drive(("only", "print(1)", 1, 30))
    assert ran.returncode == 0
    assert "tail" not in found["parts"]["only"]


def test_a_part_leaves_to_the_later_ones_what_they_need(drive):
    slow = "import time\nwhile True: time.sleep(60)"
    ran, found, _ = drive(("takes all", slow, 1, 100), ("needs three", "print(1)", 3, 100), limit=8.0)
    assert ran.returncode == 1
    assert found["parts"]["takes all"]["seconds"] < 7
    assert found["parts"]["needs three"]["status"] == "ended"
    _, found, _ = drive(("takes all", slow, 3, 100), ("too late", "print(1)", 0, 100), limit=3.0)
    assert found["parts"]["too late"]["status"].startswith("not run")


def test_nothing_that_a_part_left_behind_lives_on(tmp_path):
    """A grandchild in a session of its own, whose parent has gone: as a probe's would be."""
    pid = tmp_path / "pid"
    program = f"""
import os, sys
from pathlib import Path
from gpurun.child import become_reaper, run
become_reaper()
left = "import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); os.write(1, b'1'); time.sleep(600)"
part = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {{left!r}}], start_new_session=True,"
part += " stdout=subprocess.PIPE); p.stdout.read(1)"
ran = run([sys.executable, "-c", part], 60.0, Path({str(tmp_path / "log")!r}), os.environ, Path("/"))
print(ran.status, ran.exit_status, ran.said)
"""
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    ran = ended(sys.executable, "-c", program, environment=environment)
    assert (ran.stdout.split(), ran.stderr) == (["ended", "0"], "")
    assert not Path(f"/proc/{pid.read_text()}").exists()


TESTS = """
import os, signal, time
import pytest

def test_good(): pass

@pytest.mark.skip(reason="no such thing")
def test_skipped(): pass

@pytest.mark.parametrize("word", ["two words"])
def test_bad(word):
    if word != "one":
        pytest.fail("what was seen")

def test_hangs():
    while "hang" in os.environ.get("WHAT", ""):
        time.sleep(0.1)
"""


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("hangs", [False, True])
def test_outcomes_are_known_also_of_a_run_that_was_stopped(hangs, killed, tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={report}", "test_some.py"]
    environment = {**os.environ, "WHAT": "hang" if hangs else "", "PYTHONUNBUFFERED": "1"}
    said, stopped = "", not hangs
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=-1, stderr=-2, text=True) as process:
        for line in process.stdout:
            said += line
            if not stopped and "test_bad" in line:
                process.send_signal(signal.SIGKILL if killed else signal.SIGINT)
                stopped = True
    assert process.returncode == ((-9 if killed else 2) if hangs else 1)
    found = gather(report, said)
    by_end = {name.rpartition("::")[2]: outcome for name, outcome in found["outcomes"].items()}
    wanted = {"test_good": "passed", "test_skipped": "skipped", "test_bad[two words]": "failed"}
    assert {name: by_end.get(name) for name in wanted} == wanted
    if not (hangs and killed):
        assert "what was seen" in next(iter(found["failures"].values()))
        assert list(found["skipped"].values()) == ["no such thing"]
        assert found["counts"]["failed"] == 1


def test_a_deadline_holds_for_a_child_that_ignores_being_asked(tmp_path):
    program = "import signal, time\nsignal.signal(2, signal.SIG_IGN)\nwhile True: time.sleep(60)"
    drive = f"""
import os, sys
from pathlib import Path
from gpurun.child import become_reaper, run
become_reaper()
ran = run([sys.executable, "-c", {program!r}], 4.0, Path({str(tmp_path / "log")!r}), os.environ, Path("/"))
print(ran.status, ran.exit_status)
"""
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    began = time.monotonic()
    ran = ended(sys.executable, "-c", drive, environment=environment)
    assert ran.stdout.split() == ["out", "of", "time", "-9"]
    assert time.monotonic() - began < 30
