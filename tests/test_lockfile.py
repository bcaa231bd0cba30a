"""`etha.tensor_bus.lockfile`: who serves a path, by the kernel's word."""

from __future__ import annotations

import fcntl
import os
import random
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from etha.errors import AgentRunning, InvalidRecord, UnsafePath
from etha.tensor_bus import clock
from etha.tensor_bus.ipc import process
from etha.tensor_bus.lockfile import AgentLock, LockText, read_lock
from etha.tensor_bus.records import SCHEMA

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")

HOLDER = """
import sys
from etha.tensor_bus.lockfile import AgentLock
lock = AgentLock(sys.argv[1], 3, "cpu")
print(lock.text.epoch, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "q.agent")


@pytest.fixture
def holder(path: str):
    """Another process that holds the lock."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.epoch = int(child.stdout.readline())
        yield child
        child.kill()


def test_a_lock_says_who_holds_it(path: str):
    lock = AgentLock(path, 3, "cpu")
    try:
        state = read_lock(path)
        assert state is not None
        assert state.held
        assert state.uid == os.geteuid()
        assert state.text == lock.text
        assert (lock.text.pid, lock.text.rank, lock.text.device) == (os.getpid(), 3, "cpu")
        assert (lock.text.boot, lock.text.namespace) == (process.boot_id(), process.pid_namespace())
        assert lock.text.schema == SCHEMA
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert not os.get_inheritable(lock._fd)
    finally:
        lock.release(remove=True)
    assert read_lock(path) is None
    lock.release(remove=True)


def test_a_second_is_told_who_holds_it(path: str, holder):
    with pytest.raises(AgentRunning) as caught:
        AgentLock(path, 3, "cpu")
    assert caught.value.holder == f"pid {holder.pid}"
    assert caught.value.resource == path
    assert read_lock(path).text.pid == holder.pid


def test_death_drops_the_lock_and_a_stop_does_not(path: str, holder):
    holder.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, holder.pid, os.WSTOPPED)
    assert read_lock(path).held
    holder.kill()
    holder.wait()
    state = read_lock(path)
    assert not state.held
    assert state.text.pid == holder.pid
    lock = AgentLock(path, 3, "cpu")
    assert lock.previous.pid == holder.pid
    assert lock.text.epoch > holder.epoch
    lock.release(remove=True)


def test_a_program_that_the_holder_started_does_not_keep_the_lock(path: str):
    """``flock`` belongs to the open file, so whoever inherits it would hold it."""
    code = HOLDER.replace("print(", "import subprocess\nsubprocess.Popen(['cat'], close_fds=False)\nprint(")
    arguments = [sys.executable, "-W", "ignore", "-c", code, path]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert read_lock(path).held
        holder.kill()
        holder.wait()
        assert not select.select([holder.stdout], [], [], 0)[0], "the program that it started has ended"
        assert not read_lock(path).held


def test_the_epoch_grows_even_against_the_clock(path: str):
    first = AgentLock(path, 0, "cpu")
    later = LockText(**{**msgspec.structs.asdict(first.text), "epoch": 2**61})
    Path(path).write_bytes(msgspec.json.encode(later))
    first.release(remove=False)
    second = AgentLock(path, 0, "cpu")
    assert second.text.epoch == 2**61 + 1
    second.release(remove=True)


def test_a_reader_takes_nothing_and_holds_up_no_one(path: str):
    """Readers probe with a shared lock; an agent that starts meets them and tries again."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    assert not read_lock(path).held
    release = threading.Timer(0.1, os.close, (fd,))
    release.start()
    AgentLock(path, 0, "cpu").release(remove=True)
    release.join()


def test_a_lock_whose_file_was_replaced_is_no_longer_ours(path: str, tmp_path: Path):
    lock = AgentLock(path, 0, "cpu")
    assert lock.still_ours()
    os.rename(path, path + ".old")
    assert not lock.still_ours()
    other = AgentLock(path, 0, "cpu")
    assert not lock.still_ours()
    lock.release(remove=True)
    assert read_lock(path).text == other.text
    other.release(remove=True)
    assert read_lock(path) is None


# -- what is no lock file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_no_plain_file_is_not_read(path: str, tmp_path: Path, kind: str):
    (tmp_path / "target").write_text("precious")
    {"link": lambda: os.symlink("target", path), "fifo": lambda: os.mkfifo(path), "directory": lambda: os.mkdir(path)}[
        kind
    ]()
    for take in (read_lock, lambda path: AgentLock(path, 0, "cpu")):
        with pytest.raises(UnsafePath) as caught:
            take(path)
        assert caught.value.resource == path
    assert (tmp_path / "target").read_text() == "precious"


@as_root
def test_a_foreign_file_is_not_parsed(path: str):
    Path(path).write_bytes(b"{" * 100)
    os.chown(path, NOBODY, NOBODY)
    state = read_lock(path)
    assert (state.text, state.uid) == (None, NOBODY)
    with pytest.raises(UnsafePath) as caught:
        AgentLock(path, 0, "cpu")
    assert caught.value.holder == f"uid {NOBODY}"
    assert Path(path).read_bytes() == b"{" * 100


def test_an_empty_file_is_an_agent_that_starts(path: str):
    Path(path).touch(0o600)
    state = read_lock(path)
    assert (state.text, state.held) == (None, False)


def damaged(text: bytes, source: random.Random) -> bytes:
    data = bytearray(text)
    for _ in range(source.choice((1, 1, 3))):
        place = source.randrange(len(data) + 1)
        kind = source.randrange(5)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << source.randrange(8)
        elif kind == 1:
            del data[place : place + source.randrange(20)]
        elif kind == 2:
            data[place:place] = source.choice((b"9" * 400, b"-", b"1e999", b"[" * 3000, b'"', b"\xff", b'{"x":'))
        elif kind == 3:
            data[place:place] = data[source.randrange(len(data) + 1) :]
        else:
            data = bytearray(data.replace(b":1,", source.choice((b":-1,", b":18446744073709551615,", b":null,"))))
    return bytes(data)


def test_a_damaged_text_is_refused_and_the_next_agent_starts(path: str):
    seed = random.SystemRandom().getrandbits(64)
    print(f"seed {seed}")
    source = random.Random(seed)
    text = msgspec.json.encode(LockText(1, process.boot_id(), 1, 1, SCHEMA, 1, "cpu"))
    refused = 0
    texts = [damaged(text, source) for _ in range(1_000)]
    texts += [b'{"x":' + b"[" * 4000, text.replace(b'"epoch":1,', b'"epoch":18446744073709551615,')]
    texts += [text.replace(b'"pid":1,', b'"pid":' + b"9" * number + b",") for number in (12, 300)]
    for number, data in enumerate(texts):
        Path(path).write_bytes(data)
        try:
            state = read_lock(path)
            assert not state.held
            if state.text is not None:
                assert process.process_state(state.text.pid) in ("running", "stopped", "zombie", "dead")
        except InvalidRecord as error:
            refused += error.resource == path
        if number % 20 == 0 or number >= 1_000:
            lock = AgentLock(path, 0, "cpu")
            assert read_lock(path).text == lock.text
            lock.release(remove=False)
    assert 500 < refused < len(texts)


def test_a_text_is_never_seen_half_written(path: str):
    """A short text that follows a long one is read whole, or as not yet written."""
    device = "cpu" * 1000
    Path(path).write_bytes(msgspec.json.encode(LockText(1, process.boot_id(), 1, 1, SCHEMA, 1, device)))
    done = threading.Event()

    def read() -> set[int | None]:
        seen = set()
        while not done.is_set():
            text = read_lock(path).text
            seen.add(text and len(text.device))
        return seen

    with ThreadPoolExecutor(1) as reader:
        seen = reader.submit(read)
        deadline = clock.now() + 1.0
        while clock.now() < deadline:
            for name in (device, "cpu"):
                AgentLock(path, 0, name).release(remove=False)
        done.set()
    assert {3, 3000} <= seen.result() <= {3, 3000, None}


def test_no_text_of_the_holder_before_is_seen_while_the_next_one_writes_its_own(path: str, monkeypatch):
    AgentLock(path, 3, "cpu").release(remove=False)
    seen = []
    monkeypatch.setattr(process, "boot_id", lambda: seen.append(Path(path).read_text()) or "boot")
    AgentLock(path, 3, "cpu").release(remove=True)
    assert seen == [""]


def test_what_came_to_the_path_after_it_was_looked_at_is_looked_at_again(path: str, monkeypatch):
    Path(path).touch()
    os.chmod(path, 0o622)
    monkeypatch.setattr("etha.tensor_bus.lockfile.require_private", lambda _: None)
    with pytest.raises(UnsafePath) as caught:
        AgentLock(path, 3, "cpu")
    assert caught.value.remedy
