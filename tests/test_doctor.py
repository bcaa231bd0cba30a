"""``etha doctor``: each gate that can be shut on a development machine, shut for real; and a healthy machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from box import until
from gates import (
    AS_NOBODY,
    DUMPABLE,
    GATES,
    KILL_PROCESS,
    NO_TORCH_HERE,
    NOBODY,
    NOT_DUMPABLE,
    OUTSIDE_OF_DOCKER,
    PATIENCE,
    PIDFD_GETFD,
    PIDFD_OPEN,
    WHOLE,
    Behind,
    Report,
    as_root,
    filtered,
    may_raise_limits,
    needs_mounts,
    needs_pid_namespace,
    needs_prlimit,
    needs_setpriv,
    pasted_by_nobody,
    private_mounts,
    shell,
    with_gpus,
    without_shm,
)
from harness import Raised

from etha.tensor_bus.ipc.process import boot_id

OPEN = Behind()
GPU_IS_HERE = any(Path("/dev").glob("nvidia*"))
STATUS = {"ok": 0, "degraded": 1, "broken": 2}


@pytest.fixture
def everybodys(runtime: Path) -> Path:
    """The runtime directory, as /tmp is: for all, and sticky."""
    runtime.chmod(0o1777)
    return runtime


@pytest.fixture
def own_places() -> Iterator[None]:
    """The directories that a remedy has its user make; gone afterwards, if they were not there before."""
    places = [Path(f"/tmp/etha-{uid}") for uid in {os.geteuid(), NOBODY}]
    made_by_others = [place for place in places if place.exists()]
    yield
    for place in places:
        if place not in made_by_others and place.exists():
            place.rmdir()


def shut(report: Report, name: str, verdict: str) -> str:
    """The gate is what is named first, in the finding and in the headline; its remedy."""
    assert (report.first["name"], report.first["verdict"]) == (name, verdict), report.said["headline"]
    assert report.status == STATUS[verdict]
    assert report.said["verdict"] == verdict
    assert report.said["headline"].startswith(f"{verdict}: {name}: ")
    assert report.first["tried"]
    assert report.first["seen"]
    assert report.first["means"]
    assert report.first["remedy"]
    return report.first["remedy"]


def well(report: Report) -> None:
    assert report.problems == [], report.said["headline"]
    assert report.status == 0


def processes_of(directory: Path) -> list[str]:
    """Who was started with this runtime directory, and lives."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"ETHA_RUNTIME_DIR={directory}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found


# -- a healthy machine -------------------------------------------------------------------------------------------------


def test_a_healthy_machine_is_well_within_ten_seconds_and_nothing_is_left(runtime: Path, tmp_path: Path):
    before = {*os.listdir("/dev/shm"), *os.listdir("/tmp")}
    variables = {"TMPDIR": str(tmp_path), "HF_TOKEN": "hf_do_not_tell"}
    report = Behind(first=NO_TORCH_HERE, environment=variables).doctor(program=WHOLE)
    well(report)
    assert "hf_do_not_tell" not in json.dumps(report.said)
    assert report.said["seconds"] <= 10
    assert {f"sharing by {kind}" for kind in ("file_descriptor", "file_system")} <= {f["name"] for f in report.findings}
    assert list(runtime.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
    assert processes_of(runtime) == []
    after = {*os.listdir("/dev/shm"), *os.listdir("/tmp")}
    assert {name for name in after - before if name.startswith("etha-doctor-")} == set()


def test_a_running_agent_is_used_and_not_disturbed(agent, owner, runtime: Path):
    report = OPEN.doctor()
    well(report)
    assert f"pid {agent.pid}, alive" in report.named("agent of rank 0")["seen"]
    assert "1 publications" in report.named("state of rank 0")["seen"]
    owner.do("with policy.update(): pass")
    assert agent.errors.read_text() == ""


def test_the_screen_says_in_its_first_line_what_is_wrong_and_tells_no_secret(runtime: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_tell")
    monkeypatch.setenv("AGENT_RANK", "7")
    done = subprocess.run(
        [sys.executable, "-m", "etha", "doctor"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "! degraded: agent of rank 7: nothing serves rank 7"
    assert [line.split()[0] for line in lines[3:7]] == ["tried", "seen", "means", "remedy"]
    assert "etha agent --rank 7" in lines[6]
    assert f"ETHA_RUNTIME_DIR='{runtime}'" in lines
    assert "hf_do_not_tell" not in done.stdout


# -- gates of the kernel -----------------------------------------------------------------------------------------------


@as_root
def test_dumpable_off(everybodys: Path):
    remedy = shut(Behind(first=AS_NOBODY + NOT_DUMPABLE).doctor(), "dumpable", "degraded")
    assert "prctl(PR_SET_DUMPABLE, 1)" in remedy
    well(Behind(first=AS_NOBODY + NOT_DUMPABLE + DUMPABLE).doctor())


@as_root
def test_dumpable_off_opens_to_a_capability(runtime: Path):
    well(Behind(first=NOT_DUMPABLE).doctor())


def test_a_filter_that_refuses_pidfd_getfd(runtime: Path):
    remedy = shut(Behind(first=filtered(PIDFD_GETFD)).doctor(program=WHOLE), "pidfd_getfd", "degraded")
    assert "SYS_PTRACE" in remedy or "SystemCallFilter=pidfd_getfd" in remedy
    well(OPEN.doctor())


def test_a_filter_that_kills_who_calls_pidfd_getfd(runtime: Path):
    report = Behind(first=filtered(PIDFD_GETFD, KILL_PROCESS)).doctor()
    shut(report, "pidfd_getfd", "broken")
    assert "SIGSYS" in report.first["seen"]
    assert report.problems == ["pidfd_getfd"]


def test_a_filter_that_refuses_pidfd_open(runtime: Path):
    shut(Behind(first=filtered(PIDFD_OPEN)).doctor(), "pidfd_open", "degraded")


@needs_mounts
def test_a_small_dev_shm(runtime: Path):
    small = "mount -t tmpfs -o size=64m,mode=1777 small /dev/shm"
    remedy = shut(Behind(private_mounts(small), OUTSIDE_OF_DOCKER).doctor(program=WHOLE), "/dev/shm", "degraded")
    well(Behind(private_mounts(small, remedy)).doctor())


@needs_mounts
def test_a_full_dev_shm(runtime: Path):
    full = "mount -t tmpfs -o size=64k,mode=1777 full /dev/shm"
    remedy = shut(Behind(private_mounts(full), OUTSIDE_OF_DOCKER).doctor(), "/dev/shm", "broken")
    well(Behind(private_mounts(full, remedy)).doctor())


@needs_mounts
def test_no_dev_shm(runtime: Path, tmp_path: Path):
    report = Behind(private_mounts(without_shm(tmp_path)), OUTSIDE_OF_DOCKER).doctor(program=WHOLE)
    remedy = shut(report, "/dev/shm", "broken")
    for kind in ("file_descriptor", "file_system"):
        assert '"put a tensor into shared memory"' in report.named(f"sharing by {kind}")["seen"]
    well(Behind(private_mounts(without_shm(tmp_path), remedy)).doctor())


@as_root
@needs_prlimit
@pytest.mark.parametrize(("limit", "verdict"), [(256, "degraded"), (40, "broken")])
def test_a_low_limit_on_descriptors(runtime: Path, limit: int, verdict: str):
    low = f"prlimit --pid $$ --nofile={limit}:{limit}"
    remedy = shut(Behind(shell(low), OUTSIDE_OF_DOCKER).doctor(), "RLIMIT_NOFILE", verdict)
    well(Behind(shell(low, remedy) if may_raise_limits() else ()).doctor())


@as_root
@needs_prlimit
@needs_setpriv
def test_a_low_limit_on_locked_memory(runtime: Path):
    low = ("setpriv", "--bounding-set=-ipc_lock", *shell("prlimit --pid $$ --memlock=4096:4096"))
    remedy = shut(Behind(low, OUTSIDE_OF_DOCKER).doctor(), "RLIMIT_MEMLOCK", "degraded")
    well(Behind((*low, *shell(remedy)) if may_raise_limits() else ()).doctor())


# -- paths -------------------------------------------------------------------------------------------------------------


def test_a_symlink_at_the_path(runtime: Path, tmp_path: Path):
    target = tmp_path / "target"
    target.write_text("untouched")
    (runtime / "agent_rank0_command.lmdb").symlink_to(target)
    (runtime / "agent_rank0_state.lmdb").touch(0o600)
    remedy = shut(OPEN.doctor(program=WHOLE), "files of rank 0", "broken")
    assert target.read_text() == "untouched"
    (runtime / "agent_rank0_state.lmdb").unlink()
    well(Behind(shell(remedy)).doctor())
    assert target.read_text() == "untouched"


def test_a_file_that_etha_did_not_make(runtime: Path):
    path = runtime / "agent_rank0_state.lmdb"
    path.write_text("somebody's notes" * 10)
    path.chmod(0o600)
    remedy = shut(OPEN.doctor(), "files of rank 0", "broken")
    well(Behind(shell(remedy)).doctor())
    assert sorted(os.listdir(runtime)) == ["agent_rank0_state.lmdb.away"]


@as_root
def test_a_foreign_file_at_the_path(runtime: Path):
    path = runtime / "agent_rank0_state.lmdb"
    path.touch(0o600)
    os.chown(path, NOBODY, NOBODY)
    remedy = shut(OPEN.doctor(), "other user", "broken")
    well(Behind(shell(remedy)).doctor())


@needs_setpriv
def test_the_second_user_of_a_box_gets_the_line_to_paste(everybodys: Path, start_agent, own_places):
    start_agent()
    remedy = shut(Behind(first=AS_NOBODY).doctor(), "other user", "broken")
    line, _, after = remedy.partition(" && etha agent --rank 0")
    assert after == ""
    well(Behind(first=AS_NOBODY, environment=pasted_by_nobody(line)).doctor())


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_that_others_can_change(runtime: Path, mode: int):
    runtime.chmod(mode)
    line = shut(OPEN.doctor(), "runtime directory", "broken")
    assert "mkdir -p -m 700" in line


def test_too_long_a_socket_path(runtime: Path, own_places):
    long = runtime / ("d" * (108 - len(str(runtime))))
    long.mkdir(mode=0o700)
    try:
        behind = Behind(environment={"ETHA_RUNTIME_DIR": str(long)})
        line = shut(behind.doctor(program=WHOLE), "runtime directory", "broken")
        well(Behind(shell(line), environment=behind.environment).doctor())
    finally:
        long.rmdir()


# -- agents ------------------------------------------------------------------------------------------------------------


@needs_pid_namespace
def test_a_pid_namespace_of_ones_own(agent, own_places):
    inside = ("unshare", "--pid", "--fork", "--mount-proc")
    report = Behind(inside, OUTSIDE_OF_DOCKER).doctor(program=WHOLE)
    line, _, _ = shut(report, "PID namespace", "broken").partition(" && etha agent --rank 0")
    assert line.startswith("mkdir -p -m 700 ")
    well(Behind((*inside, *shell(line))).doctor())


@needs_pid_namespace
def test_the_proc_of_another_pid_namespace(runtime: Path):
    shut(Behind(("unshare", "--pid", "--fork")).doctor(), "/proc", "degraded")


def test_a_dead_agents_files(agent, start_agent):
    agent.kill()
    agent.process.wait()
    remedy = shut(OPEN.doctor(program=WHOLE), "dead agent", "broken")
    assert "etha agent --rank 0" in remedy
    start_agent("--rank", "0")
    well(OPEN.doctor())


def test_a_dead_agent_whose_workers_live(agent, owner, reader, start_agent):
    """Which of them wait for a successor is told, and with the successor they go on."""
    reader.kill()
    reader.process.wait()
    agent.kill()
    agent.process.wait()
    report = OPEN.doctor(program=WHOLE)
    assert "survive" in report.first["means"]
    command = shut(report, "dead agent", "broken").partition(": ")[2]
    left = report.named("state of rank 0")
    assert left["verdict"] == "ok"
    assert f"pid {owner.pid}" in left["seen"]
    assert f"pid {reader.pid}" not in left["seen"]
    assert command == "etha agent --rank 0"
    start_agent(*command.split()[2:])
    owner.do("with policy.update(): pass")
    well(OPEN.doctor())


def test_what_a_dead_agent_of_another_schema_left(runtime: Path, start_agent):
    other = "import etha.tensor_bus.lockfile as l; l.SCHEMA += 1; from etha.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", other, "agent"], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.kill()
    remedy = shut(OPEN.doctor(), "schema", "broken")
    command = remedy[remedy.index("rm ") :]
    assert command == f"rm {runtime}/agent_rank0_command.lmdb* {runtime}/agent_rank0_state.lmdb*"
    subprocess.run(["sh", "-c", command], check=True)
    start_agent()
    well(OPEN.doctor())


def test_what_an_agent_of_another_boot_left(agent, runtime: Path, start_agent):
    agent.kill()
    agent.process.wait()
    lock = runtime / "agent_rank0_command.lmdb.agent"
    lock.write_text(lock.read_text().replace(boot_id(), "another"))
    report = OPEN.doctor()
    assert "boot" in report.first["means"]
    shut(report, "dead agent", "broken")
    assert [each["name"] for each in report.findings if each["name"].startswith("state of")] == []
    start_agent()
    well(OPEN.doctor())


def test_a_stopped_agent(agent):
    os.kill(agent.pid, signal.SIGSTOP)
    assert os.waitpid(agent.pid, os.WUNTRACED)[0] == agent.pid
    remedy = shut(OPEN.doctor(), "stopped agent", "broken")
    command = remedy.partition(": ")[2]
    assert command == f"kill -CONT {agent.pid}"
    well(Behind(shell(command)).doctor())


def test_an_agent_of_another_schema(runtime: Path, start_agent):
    other = "import etha.tensor_bus.records as r; r.SCHEMA += 1; from etha.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", other, "agent"], stdout=subprocess.PIPE, text=True) as process:
        try:
            process.stdout.readline()
            remedy = shut(OPEN.doctor(), "schema", "broken")
            assert "same etha on both sides" in remedy
        finally:
            process.terminate()
    start_agent()
    well(OPEN.doctor())


def test_a_damaged_state_kills_a_child_and_no_doctor(agent, owner, runtime: Path, start_agent):
    agent.kill()
    agent.process.wait()
    state = runtime / "agent_rank0_state.lmdb"
    os.truncate(state, 8192)
    report = OPEN.doctor()
    shut(report, "dead agent", "broken")
    assert "StaleHandle" in report.first["means"]
    assert report.named("state of rank 0")["verdict"] == "degraded"
    start_agent()
    with pytest.raises(Raised, match=r"^StaleHandle:"):
        owner.do("with policy.update(): pass")
    well(OPEN.doctor())


def test_a_rank_that_is_none(runtime: Path):
    remedy = shut(Behind(environment={"AGENT_RANK": "three"}).doctor(), "AGENT_RANK", "broken")
    assert remedy.startswith("unset AGENT_RANK")
    remedy = shut(Behind(environment={"LOCAL_RANK": "0", "AGENT_RANK_OFFSET": "-8"}).doctor(), "AGENT_RANK", "broken")
    assert remedy.startswith("unset AGENT_RANK_OFFSET")
    well(OPEN.doctor())


def test_a_rank_that_nobody_serves(runtime: Path, start_agent):
    well(OPEN.doctor())
    shut(OPEN.doctor("--rank", "3"), "agent of rank 3", "degraded")
    shut(Behind(environment={"AGENT_RANK": "3"}).doctor(), "agent of rank 3", "degraded")
    start_agent("--rank", "3")
    well(OPEN.doctor("--rank", "3"))


@as_root
def test_a_worker_that_made_itself_unreadable(everybodys: Path):
    script = f"""
import os, signal, sys, torch
torch.set_num_threads(1)
torch.ones(8).share_memory_()
{AS_NOBODY}
from etha import TensorBusClient
from etha.tensor_bus.state import MemoryRecord, StateReader
agent = os.fork()
if not agent:
    serving = TensorBusAgent(0)
    signal.signal(signal.SIGTERM, lambda *_: serving.stop())
    serving.run(lambda: None)
    os._exit(0)
{NOT_DUMPABLE}
with TensorBusClient(0) as client:
    policy = client.register_tensors("policy", dict(w=torch.ones(8).share_memory_()))
    state = StateReader(client.state_path)
    while not state.all(MemoryRecord):
        os.sched_yield()
    state.close()
    if not os.fork():
        {DUMPABLE}
        try:
            exec(sys.argv.pop())
        except SystemExit:
            sys.stdout.flush()
        finally:
            os._exit(0)
    os.wait()
    policy.close()
os.kill(agent, signal.SIGTERM)
os.wait()
"""
    command = [sys.executable, "-W", "error", "-c", script, GATES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    report = Report(json.loads(done.stdout), 1)
    assert "prctl(PR_SET_DUMPABLE, 1)" in shut(report, "dumpable", "degraded")
    assert report.first["section"] == "agents"


# -- GPUs --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(GPU_IS_HERE, reason="there is a GPU")
def test_no_gpu(runtime: Path):
    report = OPEN.doctor()
    well(report)
    for part in ("nvidia-smi", "libcuda.so.1", "/dev/nvidia*", "missing"):
        assert part in report.named("GPU")["seen"]
    assert "No fault" in report.named("GPU")["seen"]
    remedy = shut(OPEN.doctor("--device", "cuda"), "GPU", "broken")
    assert "etha doctor --device cpu" in remedy
    well(OPEN.doctor("--device", "cpu"))


@needs_mounts
def test_a_hidden_gpu(runtime: Path, tmp_path: Path):
    wrap, variables = with_gpus(tmp_path)
    remedy = shut(
        Behind(wrap, "", {**variables, "CUDA_VISIBLE_DEVICES": ""}).doctor(), "CUDA_VISIBLE_DEVICES", "degraded"
    )
    shown = Behind((*wrap, *shell(remedy)), "", {**variables, "CUDA_VISIBLE_DEVICES": ""}).doctor()
    well(shown)
    assert "GPU-8f3a1c52-0000-4000-8000-000000000000" in shown.named("GPU")["seen"]
    assert "fake driver only" in shown.named("GPU")["seen"]
    well(Behind(wrap, "", {**variables, "CUDA_VISIBLE_DEVICES": "GPU-1d2e"}).doctor("--device", "cuda"))


@needs_mounts
@pytest.mark.parametrize("missing", ["/dev/nvidia-uvm", "/dev/nvidia*"])
def test_half_a_driver(runtime: Path, tmp_path: Path, missing: str):
    wrap, variables = with_gpus(tmp_path)
    half = Behind((*wrap, *shell(f"rm {missing}")), "", variables)
    report = half.doctor()
    shut(report, "GPU", "degraded")
    assert missing in report.first["seen"]
    well(half.doctor("--device", "cpu"))


@needs_mounts
def test_an_nvidia_smi_that_fails(runtime: Path, tmp_path: Path):
    wrap, variables = with_gpus(tmp_path)
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18"
    )
    report = Behind(wrap, "", variables).doctor("--device", "cuda")
    shut(report, "GPU", "broken")
    assert "Driver/library version mismatch" in report.first["seen"]


# -- the two processes -------------------------------------------------------------------------------------------------


def test_the_step_that_fails_is_named(runtime: Path, tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', Path.cwd())}"
    report = Behind(environment={"PYTHONPATH": path}).doctor(program=WHOLE)
    shut(report, "sharing by file_descriptor", "broken")
    assert '"import torch": ImportError: libgomp.so.1' in report.first["seen"]
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_doctor_that_is_ended_leaves_nothing(runtime: Path, number: int):
    command = [sys.executable, "-m", "etha", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        until(lambda: any(name.startswith("etha-doctor-") for name in os.listdir(runtime)))
        os.kill(process.pid, number)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    until(lambda: processes_of(runtime) == [])
    assert list(runtime.iterdir()) == []
