"""`etha.tensor_bus.environments`: one LMDB environment per file and process, and none across a fork."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import pytest

from etha.errors import NoAgent, SystemLimit, UnsafePath
from etha.tensor_bus.environments import Environment, open_environment
from etha.tensor_bus.ipc.process import open_files

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "data.lmdb")


@pytest.fixture
def environment(path: str):
    environment = open_environment(path, map_size=SIZE, create=True)
    with environment.env.begin(write=True) as transaction:
        transaction.put(b"key", b"value")
    yield environment
    environment.close()


def read(environment: Environment) -> bytes:
    with environment.env.begin() as transaction:
        return transaction.get(b"key")


def open_descriptors(path: str) -> int:
    files = {(found.st_dev, found.st_ino) for found in map(os.stat, (path, path + "-lock"))}
    return sum(identity in files for _, identity in open_files(os.getpid()))


def test_a_file_is_opened_once_by_whatever_name(environment: Environment, path: str):
    os.link(path, path + ".other")
    os.link(path + "-lock", path + ".other-lock")
    opened = open_descriptors(path)
    again = [open_environment(name, map_size=SIZE, readonly=True) for name in (path, path + ".other")]
    assert [use is environment for use in again] == [True, True]
    assert open_descriptors(path) == opened
    for use in again:
        use.close()
    assert read(environment) == b"value"


def test_the_last_use_closes_it(path: str):
    first = open_environment(path, map_size=SIZE, create=True)
    second = open_environment(path, map_size=SIZE)
    first.close()
    assert open_descriptors(path) > 0
    second.close()
    assert open_descriptors(path) == 0
    third = open_environment(path, map_size=SIZE)
    assert third is not first
    third.close()


def test_threads_that_open_at_once_have_one(path: str):
    open_environment(path, map_size=SIZE, create=True).close()
    with ThreadPoolExecutor(16) as threads:
        uses = list(threads.map(lambda _: open_environment(path, map_size=SIZE), range(64)))
    assert len(set(map(id, uses))) == 1
    for use in uses:
        use.close()
    assert open_descriptors(path) == 0


def test_only_who_creates_makes_a_file(path: str, tmp_path: Path):
    with pytest.raises(NoAgent) as caught:
        open_environment(path, map_size=SIZE)
    assert caught.value.resource == path
    assert list(tmp_path.iterdir()) == []


def test_files_are_ours_alone_whatever_the_umask(path: str):
    old = os.umask(0)
    try:
        open_environment(path, map_size=SIZE, create=True).close()
    finally:
        os.umask(old)
    assert [os.stat(name).st_mode & 0o777 for name in (path, path + "-lock")] == [0o600, 0o600]


@pytest.mark.parametrize("planted", ["", "-lock"])
def test_a_planted_file_is_not_opened(path: str, tmp_path: Path, planted: str):
    open_environment(path, map_size=SIZE, create=True).close()
    target = tmp_path / "target"
    os.rename(path + planted, target)
    before = target.read_bytes()
    os.symlink(target, path + planted)
    for create in (False, True):
        with pytest.raises(UnsafePath) as caught:
            open_environment(path, map_size=SIZE, create=create)
        assert caught.value.resource == path + planted
    assert target.read_bytes() == before


def test_what_is_no_lmdb_file_is_a_typed_error(path: str):
    Path(path).write_bytes(b"\xff" * 8192)
    os.chmod(path, 0o600)
    with pytest.raises(SystemLimit) as caught:
        open_environment(path, map_size=SIZE)
    assert caught.value.resource == path


def test_a_reader_cannot_write(path: str):
    open_environment(path, map_size=SIZE, create=True).close()
    reader = open_environment(path, map_size=SIZE, readonly=True)
    with pytest.raises(lmdb.ReadonlyError):
        reader.env.begin(write=True)
    reader.close()


def test_dead_readers_give_up_their_slots(environment: Environment, path: str):
    code = """
import os, sys
from etha.tensor_bus.environments import open_environment
transaction = open_environment(sys.argv[1], map_size=1 << 20, readonly=True).env.begin()
transaction.get(b"key")
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code, path], check=False)
    assert environment.env.reader_check() == 1
    assert environment.env.reader_check() == 0


# -- fork --------------------------------------------------------------------------------------------------------

FORK = """
import gc, os, sys
sys.path.append(TESTS)
from requiring import require
from etha.tensor_bus import environments
from etha.tensor_bus.environments import open_environment
from etha.tensor_bus.ipc.process import open_files

path = sys.argv[1]
environment = open_environment(path, map_size=1 << 20, create=True)

def read(environment):
    with environment.env.begin() as transaction:
        return transaction.get(b"key")

def write(environment, value):
    with environment.env.begin(write=True) as transaction:
        transaction.put(b"key", value)

class Turn:
    closed = 0
    def close(self):
        self.closed += 1

environment.companion = Turn()
write(environment, b"first")
read(environment)  # leaves an idle transaction, and so a slot in the reader table
files = {(found.st_dev, found.st_ino) for found in (os.stat(path), os.stat(path + "-lock"))}
held = sum(identity in files for _, identity in open_files(os.getpid()))
require(held >= 2, held)
pid = os.fork()
if pid == 0:
    require(environments._open == {})
    require(environment.companion.closed == 1)
    require(not any(identity in files for _, identity in open_files(os.getpid())))
    others = [os.open("/dev/null", os.O_RDONLY) for _ in range(held)]  # the numbers that were closed
    environment.close()
    CHILD
    sys.exit(0)
require(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0)
expected = b"second" if "second" in sys.argv[2] else b"first"
require(read(environment) == expected)
write(environment, b"third")
require(read(environment) == b"third")
require(environment.env.reader_check() == 0)
environment.close()
require(environment.companion.closed == 1)
"""

CHILDREN = {
    "does nothing": "pass",
    "drops it": "del environment; gc.collect(); [os.fstat(fd) for fd in others]",
    "opens its own": "own = open_environment(path, map_size=1 << 20); require(own is not environment); "
    "require(read(own) == b'first'); write(own, b'second'); own.close(); [os.fstat(fd) for fd in others]",
    "dies": "own = open_environment(path, map_size=1 << 20); read(own); os._exit(0)",
    "forks again": "pid = os.fork(); pid or os._exit(0); require(os.waitpid(pid, 0)[1] == 0)",
}


@pytest.mark.parametrize("child", CHILDREN.values(), ids=CHILDREN)
def test_a_forked_child_leaves_its_parents_environment_alone(path: str, child: str):
    """Closing it there would clear the parent's reader slots: its next read failed with ``MDB_BAD_RSLOT``."""
    code = FORK.replace("CHILD", child).replace("TESTS", repr(str(Path(__file__).parent)))
    if child == CHILDREN["dies"]:
        code = code.replace("reader_check() == 0", "reader_check() == 1")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, path, child], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_child_of_a_process_with_no_environment_is_left_alone():
    gc.collect()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
