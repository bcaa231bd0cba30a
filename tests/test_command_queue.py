"""`etha.tensor_bus.command_queue`: what is committed is there, in order, whoever stops, dies or writes nonsense."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest

from etha.errors import AgentTimeout, NoAgent, QueueFull, SystemLimit, UnsafePath
from etha.tensor_bus import clock, command_queue
from etha.tensor_bus.command_queue import CommandQueue, command_key
from etha.tensor_bus.paths import AgentPaths, agent_paths

ONE, TWO = b"\x01" * 16, b"\x02" * 16
FIRST, LAST = b"\0" * 16, b"\xff" * 16


def soon(seconds: float = 30.0) -> float:
    return clock.now() + seconds


@pytest.fixture
def paths(runtime: Path) -> AgentPaths:
    return agent_paths(0)


@pytest.fixture
def queue(paths: AgentPaths):
    queue = CommandQueue(paths, create=True)
    yield queue
    queue.close()


def forge(queue: CommandQueue, key: bytes, record: bytes = b"forged") -> None:
    """Write what no worker of ours writes."""
    with queue._env.begin(write=True) as transaction:
        transaction.put(key, record)


OTHER = """
import os, sys
from etha.tensor_bus import clock
from etha.tensor_bus.command_queue import CommandQueue
from etha.tensor_bus.paths import AgentPaths
queue = CommandQueue(AgentPaths(*sys.argv[1:3]))
client = sys.argv[3].encode().ljust(16, b"x")
def put(*sequences):
    for sequence in sequences:
        queue.put(client, sequence, str(sequence).encode(), clock.now() + 30)
def stand_still(*_):
    os.write(1, b"!")
    sys.stdin.read(1)
"""


def other(paths: AgentPaths, code: str, client: str = "other") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", OTHER + code, *paths, client], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


@pytest.fixture
def stopped(queue: CommandQueue, paths: AgentPaths):
    """A worker that was stopped inside its write transaction, the turn in hand."""
    code = (
        "queue._turn.during(lambda: queue._env.begin(write=True).put(client, b'') and stand_still(), clock.now() + 9)"
    )
    with other(paths, code) as process:
        assert process.stdout.read(1) == b"!"
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        yield process
        process.kill()


# -- what a queue does ---------------------------------------------------------------------------------------------


def test_commands_come_in_order_and_only_the_clients(queue: CommandQueue):
    for sequence in (1, 2, 255, 256, 2**32, 2**63 - 1):
        queue.put(ONE, sequence, b"one %d" % sequence, soon())
        queue.put(TWO, sequence, b"two %d" % sequence, soon())
    assert [sequence for sequence, _ in queue.commands_of(ONE, 0)] == [1, 2, 255, 256, 2**32, 2**63 - 1]
    assert queue.commands_of(TWO, 255) == [(n, b"two %d" % n) for n in (256, 2**32, 2**63 - 1)]
    assert queue.commands_of(ONE, 2**63 - 1) == []
    assert queue.commands_of(FIRST, 0) == queue.commands_of(LAST, 0) == []
    assert queue.clients() == {ONE, TWO}
    assert queue.holds(ONE, 255)
    assert not queue.holds(ONE, 3)


def test_a_put_deletes_in_its_own_transaction(queue: CommandQueue):
    for sequence in (1, 2, 3):
        queue.put(ONE, sequence, b"", soon())
    before = queue.last_transaction()
    queue.put(ONE, 4, b"", soon(), served=(1, 3, 77))
    assert [sequence for sequence, _ in queue.commands_of(ONE, 0)] == [2, 4]
    assert queue.last_transaction() == before + 1
    assert queue.last_transaction() == before + 1


def test_deleting(queue: CommandQueue):
    for client in (FIRST, ONE, TWO, LAST):
        for sequence in (1, 2):
            queue.put(client, sequence, b"", soon())
    queue.delete(ONE, (1, 9), soon())
    assert [sequence for sequence, _ in queue.commands_of(ONE, 0)] == [2]
    assert [queue.delete_client(client, soon()) for client in (ONE, LAST, FIRST, FIRST)] == [1, 2, 2, 0]
    assert queue.clients() == {TWO}
    assert len(queue.commands_of(TWO, 0)) == 2


def test_only_the_agent_makes_a_queue(paths: AgentPaths, runtime: Path):
    with pytest.raises(NoAgent):
        CommandQueue(paths)
    assert list(runtime.iterdir()) == []


def test_a_planted_turn_is_not_taken(paths: AgentPaths, runtime: Path):
    (runtime / "target").write_text("precious")
    os.symlink("target", paths.writer)
    with pytest.raises(UnsafePath) as caught:
        CommandQueue(paths, create=True)
    assert caught.value.resource == paths.writer
    assert (runtime / "target").read_text() == "precious"


def test_eight_processes_lose_nothing(queue: CommandQueue, paths: AgentPaths):
    writers = [other(paths, "put(*range(1, 201))", f"writer {number}") for number in range(8)]
    assert [writer.wait() for writer in writers] == [0] * 8
    for writer in writers:
        writer.stdin.close()
        writer.stdout.close()
    assert len(queue.clients()) == 8
    for client in queue.clients():
        assert queue.commands_of(client, 0) == [(n, str(n).encode()) for n in range(1, 201)]


# -- forged keys -----------------------------------------------------------------------------------------------------

FORGED = [b"x", ONE, ONE + b"\0", ONE + b"\0" * 7, ONE + b"\0" * 9, ONE + b"\xff" * 30, LAST + b"\xff" * 495]


@pytest.mark.parametrize("key", FORGED, ids=lambda key: f"{key[:1].hex()}, {len(key)} bytes")
def test_a_key_that_is_none_is_passed_over(queue: CommandQueue, key: bytes):
    queue.put(ONE, 1, b"first", soon())
    queue.put(ONE, 2**40, b"second", soon())
    forge(queue, key)
    assert queue.commands_of(ONE, 0) == [(1, b"first"), (2**40, b"second")]
    assert queue.commands_of(ONE, 1) == [(2**40, b"second")]
    assert queue.clients() == {ONE, key[:16]}
    assert queue.delete_client(key[:16], soon()) == (3 if key[:16] == ONE else 1)
    assert queue.clients() == ({ONE} - {key[:16]})


def test_the_largest_sequence_is_the_last(queue: CommandQueue):
    forge(queue, command_key(LAST, 2**64 - 1))
    assert queue.commands_of(LAST, 2**64 - 2) == [(2**64 - 1, b"forged")]
    assert queue.commands_of(LAST, 2**64 - 1) == []


# -- full ------------------------------------------------------------------------------------------------------------


def test_a_full_queue_says_so_and_goes_on_when_there_is_room(paths: AgentPaths, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command_queue, "MAP_SIZE", 64 << 12)
    queue = CommandQueue(paths, create=True)

    def put_until_full() -> None:
        for put in itertools.count(1):
            queue.put(ONE, put, bytes(1000), soon(0))

    with pytest.raises(QueueFull) as caught:
        put_until_full()
    assert caught.value.resource == paths.command
    last = len(queue.commands_of(ONE, 0))
    assert 60 < last < 100
    assert [sequence for sequence, _ in queue.commands_of(ONE, 0)] == list(range(1, last + 1))
    for _ in range(3):
        began = clock.now()
        with pytest.raises(QueueFull):
            queue.put(TWO, 1, bytes(1000), soon(0.1))
        assert 0.1 <= clock.now() - began < 1.1
    queue.put(ONE, last + 1, bytes(1000), soon(), served=range(1, last + 1))
    assert [sequence for sequence, _ in queue.commands_of(ONE, 0)] == [last + 1]
    assert os.stat(paths.command).st_size <= 64 << 12
    queue.close()


def test_a_full_table_of_readers_is_a_typed_error(paths: AgentPaths, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("etha.tensor_bus.environments.MAX_READERS", 2)
    queue = CommandQueue(paths, create=True)
    readers = [queue._env.begin() for _ in range(2)]
    for read in (lambda: queue.commands_of(ONE, 0), queue.clients, lambda: queue.holds(ONE, 1)):
        with pytest.raises(SystemLimit) as caught:
            read()
        assert caught.value.resource == paths.command
    readers.pop().abort()
    assert queue.commands_of(ONE, 0) == []
    readers.pop().abort()
    queue.close()


# -- turns -----------------------------------------------------------------------------------------------------------


def test_a_stopped_neighbour_costs_a_timeout_that_names_it(queue: CommandQueue, stopped: subprocess.Popen):
    queue_before = queue.last_transaction()
    began = clock.now()
    with pytest.raises(AgentTimeout) as caught:
        queue.put(ONE, 1, b"", soon(0.3))
    assert 0.3 <= clock.now() - began < 1.3
    assert caught.value.holder.startswith(f"pid {stopped.pid} (python")
    assert "stopped" in caught.value.message
    assert queue.commands_of(ONE, 0) == []
    assert queue.clients() == set()
    assert queue.last_transaction() == queue_before
    assert queue.reader_check() == 0
    stopped.send_signal(signal.SIGKILL)
    queue.put(ONE, 1, b"", soon())
    assert [sequence for sequence, _ in queue.commands_of(ONE, 0)] == [1]


def test_a_thread_that_holds_the_turn_is_named(queue: CommandQueue):
    with pytest.raises(AgentTimeout) as caught:
        queue._turn.during(lambda: queue.put(ONE, 1, b"", soon(0.05)), soon())
    assert caught.value.holder.startswith(f"pid {os.getpid()} ")
    queue.put(ONE, 1, b"", soon())


def test_a_second_queue_of_the_process_shares_the_turn(queue: CommandQueue, paths: AgentPaths):
    """A record lock is dropped with *any* descriptor of its file."""
    second = CommandQueue(paths)
    assert second._turn is queue._turn

    def others_are_kept_out() -> bool:
        second.close()
        pid = os.fork()
        if pid == 0:
            os._exit(0)  # it has closed what it inherited, the turn's file among it
        os.waitpid(pid, 0)
        code = "queue._turn._lock_against_processes(clock.now() + 0.1)"
        with other(paths, code) as process:
            return process.wait() == 1

    assert queue._turn.during(others_are_kept_out, soon())


def test_the_turn_of_a_forked_child_is_its_own(queue: CommandQueue, paths: AgentPaths):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        own = CommandQueue(paths)
        own._turn.during(lambda: (os.write(write, b"!"), signal.pause()), soon())
    assert os.read(read, 1) == b"!"
    with pytest.raises(AgentTimeout) as caught:
        queue.put(ONE, 1, b"", soon(0.1))
    assert caught.value.holder.startswith(f"pid {pid} ")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    queue.put(ONE, 1, b"", soon())
    os.close(read)
    os.close(write)


def test_lmdb_errors_do_not_leak(queue: CommandQueue):
    with pytest.raises(SystemLimit):
        queue._write(lambda _: (_ for _ in ()).throw(lmdb.BadTxnError("mdb_put")), soon())
