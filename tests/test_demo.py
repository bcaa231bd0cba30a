"""`etha demo`: its parts, and the real thing in its own processes."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from etha.cli.demo import children, command, memory, stamp, task
from etha.cli.demo.backend import describe_backend
from etha.cli.demo.children import Child, Family, Interrupted
from etha.cli.demo.copied import CopyMeter
from etha.cli.demo.events import Placement, Read, Trained, decode, encode
from etha.cli.demo.report import Curves, failures, latency
from etha.cli.demo.screen import Progress, Screen, size

ROOT = Path(__file__).parents[1]
DEADLINE_S = 120.0


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A short path: a socket's has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="etha-t-") as name:
        yield Path(name)


def demo_command(*options: str) -> list[str]:
    return [sys.executable, "-m", "etha", "demo", *options]


def environment(runtime: Path) -> dict[str, str]:
    return {**os.environ, "ETHA_RUNTIME_DIR": str(runtime)}


def processes_of(runtime: Path) -> list[int]:
    """Every process, zombies aside, that was started with this runtime directory or one below it."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"ETHA_RUNTIME_DIR={runtime}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def shared_files_of(pids: list[int]) -> list[str]:
    """What torch would have left in /dev/shm for these processes."""
    return [name for name in os.listdir("/dev/shm") for pid in pids if name.startswith(f"torch_{pid}_")]


# The real thing.


def test_demo_shows_what_it_must(runtime: Path) -> None:
    picture = runtime / "demo.png"
    done = subprocess.run(
        demo_command("--steps", "150", "--json", "--plot", str(picture)),
        cwd=ROOT,
        env=environment(runtime),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert report["failures"] == []
    assert report["accuracy"] >= 0.97
    assert (report["torn"], report["bytes_copied"]) == (0, 0)
    assert report["versions_published"] == 150
    assert report["versions_read"] == report["reads"] > 1
    assert 1_190_000 < report["bytes_shared"] < 1_200_000
    assert report["trainer_inodes"] == report["evaluator_inodes"]
    assert 0 not in report["trainer_inodes"]
    assert report["publish"]["count"] == report["update_enter"]["count"] == 150
    assert 0 < report["publish"]["median_us"] <= report["publish"]["p99_us"]
    assert 0 < report["read"]["median_us"] <= report["read"]["p99_us"]
    assert done.stderr.startswith("agent rank 0 · host backend (")
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    assert list(runtime.iterdir()) == []
    assert processes_of(runtime) == []
    pids = [report[f"{name}_pid"] for name in ("agent", "trainer", "evaluator")]
    assert shared_files_of(pids) == []


def test_sabotage_is_seen(runtime: Path) -> None:
    done = subprocess.run(
        demo_command("--steps", "60", "--json", "--sabotage"),
        cwd=ROOT,
        env=environment(runtime),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    report = json.loads(done.stdout)
    assert report["torn"] > 0
    assert report["reads"] > report["torn"]
    assert report["read"] is None
    assert report["trainer_inodes"] == report["evaluator_inodes"]
    assert done.returncode == 0, done.stderr
    assert "SABOTAGE, as ordered" in done.stderr
    assert list(runtime.iterdir()) == []
    assert processes_of(runtime) == []


def test_too_few_steps_fail(runtime: Path) -> None:
    done = subprocess.run(
        demo_command("--steps", "2"),
        cwd=ROOT,
        env=environment(runtime),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 1
    assert "FAILED: accuracy" in done.stdout
    assert list(runtime.iterdir()) == []


@pytest.fixture
def running(runtime: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo that has long to go, past its first reads; its first line is checked on the way."""
    demo = subprocess.Popen(
        demo_command("--steps", "100000"),
        cwd=ROOT,
        env=environment(runtime),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert demo.stdout is not None
        assert demo.stdout.readline().startswith("agent rank 0 · host backend (")
        if not any(line.startswith("trainer ") for line in demo.stdout):
            pytest.fail(f"the demo ended before its first read: {demo.communicate()[1]}")
        yield demo
    finally:
        demo.kill()
        demo.communicate()


def children_of(demo: subprocess.Popen[str]) -> list[int]:
    """The agent, the trainer, the evaluator."""
    return [int(pid) for pid in Path(f"/proc/{demo.pid}/task/{demo.pid}/children").read_text().split()]


def has_ended(pidfd: int, timeout_s: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.stress)])
def test_interrupt_leaves_nothing(running: subprocess.Popen[str], runtime: Path, signum: signal.Signals) -> None:
    pids = children_of(running)
    assert len(pids) == 3
    assert "libtorch" not in Path(f"/proc/{running.pid}/maps").read_text()
    running.send_signal(signum)
    _, complaint = running.communicate(timeout=DEADLINE_S)
    assert running.returncode == 128 + signum
    assert signum.name in complaint
    assert "Traceback" not in complaint
    assert processes_of(runtime) == []
    assert shared_files_of(pids) == []
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize(
    "victim",
    [pytest.param(0, marks=pytest.mark.stress), 1, pytest.param(2, marks=pytest.mark.stress)],
    ids=["agent", "trainer", "evaluator"],
)
def test_death_of_a_child_is_told(running: subprocess.Popen[str], runtime: Path, victim: int) -> None:
    pids = sorted(children_of(running))
    os.kill(pids[victim], signal.SIGKILL)
    _, complaint = running.communicate(timeout=DEADLINE_S)
    assert running.returncode == 1
    assert f"(pid {pids[victim]}) ended by signal 9 before its time" in complaint
    assert processes_of(runtime) == []
    assert shared_files_of(pids) == []
    assert list(runtime.iterdir()) == []


def test_death_of_the_demo_takes_its_children_along(running: subprocess.Popen[str]) -> None:
    pidfds = [os.pidfd_open(pid) for pid in children_of(running)]
    try:
        running.kill()
        assert all(has_ended(pidfd, DEADLINE_S) for pidfd in pidfds)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


# The command line.


@pytest.fixture
def cli() -> typer.Typer:
    app = typer.Typer()
    app.command()(command.demo)
    return app


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "gpu"])
def test_other_devices_are_refused(cli: typer.Typer, device: str) -> None:
    result = CliRunner().invoke(cli, ["--device", device])
    assert result.exit_code == 2
    assert "--device cpu" in result.output


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_missing_extra_is_named(cli: typer.Typer, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == missing else object())
    result = CliRunner().invoke(cli, ["--plot", "demo.png"])
    assert result.exit_code == 1
    assert "pip install '.[demo]'" in result.output
    assert "pip install etha" not in result.output


def test_plot_into_no_directory_is_refused(cli: typer.Typer, runtime: Path) -> None:
    result = CliRunner().invoke(cli, ["--plot", str(runtime / "absent" / "demo.png")])
    assert result.exit_code == 2


def test_backend_names_its_reason() -> None:
    assert re.fullmatch(r"host backend \(.+\)", describe_backend())


# The task and the stamps.


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.stress) for s in (1, 2))])
def test_training_reaches_the_goal(seed: int) -> None:
    from etha.cli.demo.trainer import Training

    training = Training(150, seed)
    for _ in range(150):
        training.backward()
        training.step()
    assert task.accuracy(task.empty_network(), training.weights, task.load()) >= 0.97
    assert all(weight.is_shared() for weight in training.weights.values())


@pytest.fixture
def sealed() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tensors = {name: torch.randn(33, 3, generator=torch.Generator().manual_seed(7)) for name in ("b", "a")}
    seal = stamp.blank(tensors)
    stamp.seal(seal, tensors, 5)
    return seal, tensors


def test_stamp_holds(sealed: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    seal, tensors = sealed
    verdict = stamp.check(seal, dict(reversed(tensors.items())), 5)
    assert (verdict.torn, verdict.version) == (False, 5)
    assert verdict.sealed_ns > 0


def test_stamp_shows_one_changed_bit(sealed: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    seal, tensors = sealed
    tensors["a"].view(torch.int32)[32, 2] ^= 1
    assert stamp.check(seal, tensors, 5).torn


def test_stamp_shows_another_version(sealed: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    seal, tensors = sealed
    assert stamp.check(seal, tensors, 6).torn
    seal[-2] = 6  # The bytes and checksums of version 5 under the number 6.
    assert stamp.check(seal, tensors, 6).torn


# Memory.


def test_backing_is_the_file_under_an_address(runtime: Path) -> None:
    path = runtime / "file"
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE, offset=mmap.PAGESIZE) as mapped:
        view = torch.frombuffer(mapped, dtype=torch.uint8, offset=9)
        backing = memory.Layout(os.getpid()).backing_of(placed("w", view))
        del view
        assert backing == (path.stat().st_dev, path.stat().st_ino, mmap.PAGESIZE + 9)


def test_memory_that_is_not_shared_has_no_backing() -> None:
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        view = torch.frombuffer(mapped, dtype=torch.uint8)
        assert memory.Layout(os.getpid()).backing_of(placed("w", view)) is None
        del view


def test_process_that_is_gone_has_mapped_nothing() -> None:
    tensor = torch.zeros(64).share_memory_()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        assert memory.Layout(process.pid).backing_of(placed("w", tensor)) is None


def test_field_bytes() -> None:
    text = "MemTotal:       24684380 kB\nShmem:              8856 kB\nShmemHugePages:        1 kB\n"
    assert memory.field_bytes(text, "Shmem") == 8856 * 1024
    assert memory.field_bytes(text, "Pss_Shmem") == 0
    assert memory.box_shared_bytes() > 0


def test_process_shared_bytes_counts_touched_pages() -> None:
    before = memory.process_shared_bytes(os.getpid())
    shared = torch.ones(1 << 22, dtype=torch.uint8).share_memory_()
    assert memory.process_shared_bytes(os.getpid()) - before >= 0.99 * shared.nbytes


def test_tmpfs_bytes(runtime: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        (Path(name) / "file").write_bytes(bytes(mmap.PAGESIZE))
        assert memory.tmpfs_bytes(Path(name)) == mmap.PAGESIZE


def placed(name: str, tensor: torch.Tensor) -> Placement:
    return Placement(name, tensor.data_ptr(), tensor.nbytes)


def test_same_memory_is_no_copy(runtime: Path) -> None:
    meter = CopyMeter(runtime)
    tensor = torch.zeros(4096).share_memory_()
    meter.owner_registered(os.getpid(), [placed("w", tensor)])
    meter.reader_mapped(os.getpid(), [placed("w", tensor)])
    assert meter.published == tensor.nbytes
    assert meter.copied() == 0
    assert meter.owner_inodes == meter.reader_inodes
    assert 0 not in meter.owner_inodes


def test_other_memory_is_a_copy(runtime: Path) -> None:
    meter = CopyMeter(runtime)
    tensor, other = torch.zeros(4096).share_memory_(), torch.zeros(64).share_memory_()
    meter.owner_registered(os.getpid(), [placed("w", tensor), placed("b", other)])
    meter.reader_mapped(os.getpid(), [placed("w", tensor), placed("b", other.clone())])
    assert meter.copied() == other.nbytes
    meter.reader_mapped(os.getpid(), [placed("w", tensor), placed("b", other)])
    assert meter.copied() == other.nbytes, "what was once elsewhere stays counted"


@pytest.mark.parametrize(
    ("box", "ours", "copied"),
    [
        ([100, 100, 100], [9, 9, 9], 0),
        ([100, 100_100, 100_100], [9, 90_009, 100_009], 90_000),  # of all samples the smallest
        ([100, 100_100, 100], [9, 100_009, 9], 0),  # came and went
        ([100, 100_100, 100_100], [9, 9, 9], 0),  # another program's
        ([100, 16_484, 16_484], [9, 16_393, 16_393], 0),  # rounding
        ([100, 100_100, 100_100], [0, 0, 0], 100_000),  # a kernel without Pss_Shmem
    ],
)
def test_growth_is_a_copy_if_it_is_ours_and_stays(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, box: list[int], ours: list[int], copied: int
) -> None:
    of_box, of_ours = iter(box), iter(ours)
    monkeypatch.setattr(memory, "box_shared_bytes", lambda: next(of_box))
    monkeypatch.setattr(memory, "process_shared_bytes", lambda pid: next(of_ours))
    monkeypatch.setattr(memory, "tmpfs_bytes", lambda directory: 0)
    meter = CopyMeter(runtime)
    meter.start([1])
    meter.sample([1])
    meter.sample([1])
    assert meter.copied() == copied


# Children.


def python(family: Family, name: str, code: str) -> Child:
    return family.start(name, "-c", code)


def hear_all(family: Family, child: Child) -> list[bytes]:
    """Everything that it says until its end."""
    heard = []
    while True:
        for line in family.listen(DEADLINE_S):
            if line.child is child and line.text is None:
                return heard
            if line.child is child and line.text is not None:
                heard.append(line.text)


def test_children_are_heard_to_their_end(runtime: Path) -> None:
    code = "import sys; print(sys.stdin.readline().strip()); print('x' * 200_000); sys.stderr.write('why'); sys.exit(3)"
    with Family(os.environ, runtime) as family:
        child = python(family, "talker", code)
        child.say_go_on()
        assert hear_all(family, child) == [b"go on", b"x" * 200_000]
        assert child.exit_code == 3
        assert child.stderr_tail() == "why"


def test_child_that_ignores_sigterm_is_killed(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_GRACE_S", 0.1)
    code = "import signal; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    with Family(os.environ, runtime) as family:
        child = python(family, "deaf", code)
        assert [line.text for line in family.listen(DEADLINE_S)] == [b"deaf"]
    assert child.exit_code == -signal.SIGKILL


def test_signal_ends_the_listening_and_handlers_come_back(runtime: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with Family(os.environ, runtime) as family:
        child = python(family, "idle", "import signal; signal.pause()")
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted) as caught:
            family.listen(DEADLINE_S)
    assert caught.value.exit_code == 130
    assert child.exit_code is not None
    assert signal.getsignal(signal.SIGINT) is before


# Events, report, screen, plot.


def test_events_travel() -> None:
    for event in (Read(7, 0.5, 1, 9), Trained(2, (1.0, 2.0), (3.0, 4.0))):
        line = encode(event)
        assert line.endswith(b"\n")
        assert decode(line) == event


def test_latency_is_by_nearest_rank() -> None:
    assert latency(()) is None
    found = latency(tuple(float(n) for n in range(200, 0, -1)))
    assert found is not None
    assert (found.count, found.median_us, found.p99_us) == (200, 100.0, 198.0)


@pytest.mark.parametrize(
    ("sabotage", "accuracy", "torn", "copied", "ended_badly", "count"),
    [
        (False, 0.97, 0, 0, (), 0),
        (False, 0.969, 1, 1, ("agent", "trainer"), 5),
        (True, 0.1, 1, 0, (), 0),
        (True, 0.99, 0, 0, (), 1),
        (True, 0.99, 1, 0, ("agent",), 1),
    ],
)
def test_failures(
    sabotage: bool, accuracy: float, torn: int, copied: int, ended_badly: tuple[str, ...], count: int
) -> None:
    found = failures(sabotage=sabotage, accuracy=accuracy, torn=torn, bytes_copied=copied, ended_badly=ended_badly)
    assert len(found) == count


def test_live_line() -> None:
    progress = Progress(
        trainer_pid=4121,
        bytes_shared=1_193_184,
        trainer_inodes=(77, 78, 79),
        evaluator_pid=4122,
        evaluator_inodes=(77,),
        version=214,
        accuracy=0.9712,
        torn=0,
        bytes_copied=0,
    )
    text = (
        "trainer 4121 owns 1.2 MB, inode 77 (+2) · evaluator 4122 reads inode 77"
        " · v 214 · accuracy 0.971 · torn 0 · copied 0 B"
    )
    assert str(progress) == text
    console = Console(record=True, force_terminal=False, width=40)
    with Screen(console) as screen:
        screen.show(progress)
    assert console.export_text() == text + "\n"


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1_193_184, "1.2 MB"), (5 * 10**12, "5000.0 GB")]
)
def test_size(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize("read_us", [(), (30.0, 10.0, 20.0)], ids=["sabotage", "leases"])
def test_plot(runtime: Path, read_us: tuple[float, ...]) -> None:
    from etha.cli.demo.plot import draw

    picture = runtime / "demo.png"
    draw(picture, Curves(((0, 0.1), (1, 0.98)), (100.0, 90.0), read_us), "a title")
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") >= 1000
