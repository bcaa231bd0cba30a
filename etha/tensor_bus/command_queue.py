"""The command LMDB: workers put, the agent reads. Key: client id (16 bytes), then sequence (8, big-endian).

The agent never writes here, so no worker can make it wait: each worker deletes its own served commands with its next
put, and a helper of the agent deletes those of dead workers.

Before LMDB's write lock a worker takes the *turn*, a POSIX record lock on a file of its own, tried until a deadline.
LMDB's mutex has no deadline, and a worker may be stopped while it holds it; its neighbours then get `AgentTimeout`
that names it. Why a record lock and not ``flock``: it belongs to the process, so a forked child does not keep it, and
``F_GETLK`` names its holder. It is dropped when *any* descriptor of the file is closed in the process, so each
process opens the file once, here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

import lmdb

from etha.errors import AgentTimeout, QueueFull
from etha.tensor_bus import clock
from etha.tensor_bus.environments import Environment, fault, open_environment
from etha.tensor_bus.ipc import process
from etha.tensor_bus.paths import AgentPaths, cannot_open, require_private

T = TypeVar("T")

MAP_SIZE: Final = 1 << 28
"""Bytes that the file may grow to. Commands fill half of it: to delete from a full tree takes as many pages again."""
CLIENT_ID_BYTES: Final = 16
_SEQUENCE: Final = struct.Struct(">Q")
_KEY_BYTES: Final = CLIENT_ID_BYTES + _SEQUENCE.size
_FLOCK: Final = struct.Struct("hhqqi4x")
"""``struct flock`` of fcntl(2) on 64-bit Linux: type, whence, start, length, pid."""


def command_key(client: bytes, sequence: int) -> bytes:
    """The key of a command; keys of one client sort by sequence."""
    return client + _SEQUENCE.pack(sequence)


def take(lock: threading.Lock, deadline: float, taken: list[bool]) -> None:
    """Acquire a lock until a deadline; whether it was had is put on record in ``taken``.

    In one call, between whose ends no signal is looked at: after ``taken = lock.acquire(...)`` an interrupt may come
    when the lock is had and nobody knows it yet.
    """
    taken.extend(map(lock.acquire, (True,), (clock.remaining(deadline),)))


class WriterTurn:
    """Whose turn it is to write the queue: across threads by a lock, across processes by the kernel."""

    def __init__(self, path: str) -> None:
        require_private(path)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise cannot_open(path, error) from error
        self.path = path
        self._thread_lock = threading.Lock()

    def during(self, work: Callable[[], T], deadline: float) -> T:
        """Do something while it is this thread's turn.

        No context manager: an interrupt between its ``__enter__`` and the body would keep the turn until the
        exception is forgotten, and its ``__exit__`` can be interrupted before its first step.

        Raises:
            AgentTimeout: another process or thread held the turn until ``deadline``; ``holder`` names it.
        """
        taken: list[bool] = []
        try:
            take(self._thread_lock, deadline, taken)
            if not taken[0]:
                raise self._timeout(os.getpid())
            self._lock_against_processes(deadline)
            return work()
        finally:
            if taken and taken[0]:
                try:
                    fcntl.lockf(self._fd, fcntl.LOCK_UN)
                finally:
                    self._thread_lock.release()

    def close(self) -> None:
        """Close the file, and with it give up the turn."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _lock_against_processes(self, deadline: float) -> None:
        pause = 20e-6
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            if clock.now() >= deadline:
                raise self._timeout(self._holder())
            time.sleep(pause)
            pause = min(pause * 2, 2e-3)

    def _holder(self) -> int:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        pid = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, asked))[4]
        return int(pid)

    def _timeout(self, pid: int) -> AgentTimeout:
        holder = process.process_label(pid) if pid > 0 else None
        state = process.process_state(pid) if pid > 0 else "gone"
        return AgentTimeout(
            f"{holder or 'another process'} ({state}) held the command queue until the deadline.",
            resource=self.path,
            holder=holder,
            remedy="Let it go on (kill -CONT), or end it.",
        )


class CommandQueue:
    """One process's access to a command queue. Safe across threads."""

    def __init__(self, paths: AgentPaths, *, create: bool = False) -> None:
        """Open the queue; ``create`` is the agent's.

        Raises:
            NoAgent, UnsafePath, SystemLimit: see `open_environment`.
        """
        self.path = paths.command
        self._environment: Environment = open_environment(paths.command, map_size=MAP_SIZE, create=create)
        try:
            with _turn_lock:
                turn = self._environment.companion
                if not isinstance(turn, WriterTurn):
                    turn = self._environment.companion = WriterTurn(paths.writer)
        except BaseException:
            self._environment.close()
            raise
        self._turn = turn
        self._room = MAP_SIZE // 2

    def put(
        self,
        client: bytes,
        sequence: int,
        record: bytes,
        deadline: float,
        served: Iterable[int] = (),
    ) -> None:
        """Commit a command, and delete what is no longer needed, in one transaction.

        Args:
            client: client id, 16 bytes.
            sequence: larger than every one that this client has put before.
            record: the encoded command.
            deadline: ``CLOCK_BOOTTIME`` seconds until which to wait for the turn, and for room.
            served: sequences of this client to delete: served, or made void by this one.

        Raises:
            AgentTimeout: the turn was not had in time.
            QueueFull: the file has reached its size, and stayed so until the deadline.
        """

        def work(transaction: lmdb.Transaction) -> None:
            room = self._used() + len(record) <= self._room
            for old in served:
                transaction.delete(command_key(client, old))
            if room:
                transaction.put(command_key(client, sequence), record)
            else:
                full.append(self._full())

        pause = 1e-3
        while True:
            full: list[QueueFull] = []
            try:
                self._write(work, deadline)
            except QueueFull as error:
                full.append(error)
            if not full:
                return
            if clock.now() >= deadline:
                raise full[0]
            time.sleep(min(pause, clock.remaining(deadline)))
            pause = min(pause * 2, 0.02)

    def holds(self, client: bytes, sequence: int) -> bool:
        """Whether the command stands in the queue."""
        key = command_key(client, sequence)
        return self._read(lambda cursor: cursor.set_key(key))

    def delete(self, client: bytes, sequences: Iterable[int], deadline: float) -> None:
        """Delete commands of a client; those that are not there are no error."""

        def work(transaction: lmdb.Transaction) -> None:
            for sequence in sequences:
                transaction.delete(command_key(client, sequence))

        self._write(work, deadline)

    def delete_client(self, client: bytes, deadline: float) -> int:
        """Delete every command of a client that is gone; returns how many there were."""

        def work(transaction: lmdb.Transaction) -> int:
            deleted = 0
            with transaction.cursor() as cursor:
                found = cursor.set_range(client)
                while found and cursor.key()[:CLIENT_ID_BYTES] == client:
                    found = cursor.delete()
                    deleted += 1
            return deleted

        return self._write(work, deadline)

    def last_transaction(self) -> int:
        """A number that grows with every commit; equal numbers mean that nothing has changed."""
        with self._environment:
            return self._env.info()["last_txnid"]

    def commands_of(self, client: bytes, after: int) -> list[tuple[int, bytes]]:
        """(sequence, record) of a client's commands with a sequence above ``after``, in order, copied out."""
        return self.news_of(client, after)[1]

    def news_of(self, client: bytes, after: int) -> tuple[int, list[tuple[int, bytes]]]:
        """The transaction that was read, as `last_transaction` counts, and `commands_of` as it shows them.

        `last_transaction` may be one ahead: a commit writes the meta page, from which that comes, and then the number
        that readers begin with (LMDB's mdb.c: ``mdb_env_write_meta``, ``mdb_txn_renew0``). In between its process may
        have to wait for a processor.
        """

        def work(cursor: lmdb.Cursor) -> list[tuple[int, bytes]]:
            commands = []
            found = cursor.set_range(command_key(client, after) + b"\0")
            while found and cursor.key()[:CLIENT_ID_BYTES] == client:
                key, record = cursor.item()
                if len(key) == _KEY_BYTES:
                    commands.append((_SEQUENCE.unpack(key[CLIENT_ID_BYTES:])[0], bytes(record)))
                found = cursor.next()
            return commands

        return self._look(work)

    def clients(self) -> set[bytes]:
        """Every client id of which a command stands in the queue."""

        def work(cursor: lmdb.Cursor) -> set[bytes]:
            clients = set()
            found = cursor.first()
            while found:
                client = bytes(cursor.key()[:CLIENT_ID_BYTES])
                clients.add(client)
                found = cursor.set_range(client + b"\xff" * _SEQUENCE.size)
                while found and cursor.key()[:CLIENT_ID_BYTES] == client:
                    found = cursor.next()
            return clients

        return self._read(work)

    def reader_check(self) -> int:
        """Free the reader slots of dead processes; returns how many there were."""
        with self._environment:
            return int(self._env.reader_check())

    def close(self) -> None:
        """Give back this use of the file."""
        self._environment.close()

    @property
    def _env(self) -> lmdb.Environment:
        return self._environment.env  # of the moment: it may have been opened again

    def _write(self, work: Callable[[lmdb.Transaction], T], deadline: float) -> T:
        def transact() -> T:
            with self._env.begin(write=True) as transaction:
                return work(transaction)

        try:
            with self._environment:
                return self._turn.during(transact, deadline)
        except lmdb.Error as error:
            raise fault(self.path, error) from error

    def _read(self, work: Callable[[lmdb.Cursor], T]) -> T:
        return self._look(work)[1]

    def _look(self, work: Callable[[lmdb.Cursor], T]) -> tuple[int, T]:
        try:
            with self._environment, self._env.begin() as transaction, transaction.cursor() as cursor:
                return transaction.id(), work(cursor)
        except lmdb.Error as error:
            raise fault(self.path, error) from error

    def _used(self) -> int:
        """Bytes of what is committed."""
        stat = self._env.stat()
        return int(stat["psize"] * (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]))

    def _full(self) -> QueueFull:
        return QueueFull(
            f"{self.path} is full of commands that are not served.",
            resource=self.path,
            remedy="Is its agent stopped? Commands are deleted once it has served them.",
        )


_turn_lock = threading.Lock()
