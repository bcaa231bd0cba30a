"""LMDB environments: one per file and process, counted, never used across a fork.

LMDB's locks are POSIX record locks, which belong to the pair of process and file: a second environment on one
file would share and then drop the first one's locks. So every part of etha that needs a file gets it here, by
device and inode, and the last to leave closes it.

All are opened alike: ``sync=False`` (what they describe does not outlive the box either), no ``WRITEMAP`` (a torn write
must not reach the file), LMDB's own locking on, mode 0600.

When the write of LMDB's meta page fails (a broken disk), the environment is of no use any more: every transaction is
refused with ``MDB_PANIC``. What is committed is whole. So after an error the next operation looks, and opens the file
anew if need be, as soon as no other thread is inside.

A forked child finds nothing open, and may open the same files itself. It closes the descriptors that it inherited, and
it never closes the environments. py-lmdb does that even for one that is merely dropped, and it aborts the parent's
idle read transaction, which clears the parent's slot in the shared reader table (seen: the parent's next read fails
with ``MDB_BAD_RSLOT``), and closes descriptors by numbers that are others' by then. So the child makes the objects
immortal, and tells py-lmdb's guard against a second environment (a set that outlives the fork) that its files are
others.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
from types import TracebackType
from typing import Any, Final, Protocol

import lmdb

from etha.errors import ClientClosed, EthaError, InvalidRecord, NoAgent, QueueFull, SystemLimit
from etha.tensor_bus.paths import cannot_open, require_private

MAX_READERS: Final = 2048
"""Reader slots of a new environment: one per thread that reads at the same moment, on the whole box."""

_Key = tuple[int, int]


class Companion(Protocol):
    """Something that lives as long as an environment, such as a lock on who may write it."""

    def close(self) -> None: ...


class Environment:
    """A counted use of one LMDB file; `close` gives it back.

    Attributes:
        env: py-lmdb's environment.
        path: the data file.
        inodes: the status, at opening, of the data file and of LMDB's lock file.
        companion: closed with the environment, and by a forked child.
    """

    def __init__(self, env: lmdb.Environment, path: str, key: _Key, map_size: int) -> None:
        self.env = env
        self.path = path
        self.companion: Companion | None = None
        self.inodes = (os.stat(path), os.stat(path + "-lock"))
        self._key = key
        self._map_size = map_size
        self._uses = 1
        self._operations = 0
        self._suspect = False
        self._pid = os.getpid()

    def __enter__(self) -> Environment:
        """One more use, for as long as an operation lasts: closing must not pull the file from under another thread.

        Raises:
            ClientClosed: the last use has been given back.
            SystemLimit: LMDB could not open it again.
        """
        with _lock:
            if self._uses == 0:
                raise ClientClosed(f"{self.path} is closed.", resource=self.path, remedy="Make another client.")
            if self._suspect and self._operations == 0:
                self._open_again_if_broken()
            self._uses += 1
            self._operations += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            self._operations -= 1
            self._suspect = self._suspect or isinstance(error, lmdb.Error)
        self.close()

    def superseded(self) -> bool:
        """Whether another file stands at the path now. What has merely been removed is still the newest."""
        try:
            return not os.path.samestat(os.stat(self.path), self.inodes[0])
        except FileNotFoundError:
            return False

    def _open_again_if_broken(self) -> None:
        try:
            self.env.begin().abort()
        except lmdb.PanicError:
            readonly = bool(self.env.flags()["readonly"])
            self.env.close()
            self.env = _lmdb_open(self.path, self._map_size, create=False, readonly=readonly)
        except lmdb.Error:
            return  # a table that is full: the operation will meet it too
        self._suspect = False

    def close(self) -> None:
        """Give back one use; the last one closes the file."""
        if self._pid != os.getpid():
            return
        with _lock:
            self._uses -= 1
            if self._uses == 0:
                _open.pop(self._key, None)
                self.env.close()
                if self.companion is not None:
                    self.companion.close()


_lock = threading.Lock()
_open: dict[_Key, Environment] = {}


def open_environment(path: str, *, map_size: int, create: bool = False, readonly: bool = False) -> Environment:
    """The environment of the file at ``path``, opened once in this process.

    Args:
        path: the data file; LMDB's lock file stands beside it.
        map_size: bytes that the file may grow to.
        create: make the file if there is none. Only the agent does.
        readonly: refuse write transactions, unless this process already has the file open for writing.

    Raises:
        NoAgent: there is no such file, and ``create`` is False.
        UnsafePath: the file, or its lock file, is not ours alone.
        SystemLimit: LMDB could not open it.
    """
    with _lock:
        found = require_private(path)
        require_private(path + "-lock")
        if found is None and not create:
            raise NoAgent(f"{path} does not exist.", resource=path, remedy="Start one: etha agent")
        if found is not None:
            known = _open.get((found.st_dev, found.st_ino))
            if known is not None:
                known._uses += 1
                return known
        if found is None:
            _allocate_readers(path + "-lock")
        env = _lmdb_open(path, map_size, create=create, readonly=readonly)
        made = os.stat(path)
        key = (made.st_dev, made.st_ino)
        environment = _open[key] = Environment(env, path, key, map_size)
        return environment


def _lmdb_open(path: str, map_size: int, *, create: bool, readonly: bool) -> lmdb.Environment:
    try:
        return lmdb.open(
            path,
            subdir=False,
            map_size=map_size,
            create=create,
            readonly=readonly,
            sync=False,
            metasync=False,
            mode=0o600,
            max_readers=MAX_READERS,
            max_spare_txns=4,
        )
    except (lmdb.Error, OSError) as error:
        raise SystemLimit(
            f"{path} cannot be opened: {error}.",
            resource=path,
            remedy="If no agent runs, remove the file; else free disk or descriptors; run: etha doctor",
        ) from error


def _allocate_readers(path: str) -> None:
    """Make LMDB's lock file, every page of it.

    LMDB would leave it sparse and write it through a mapping: on a full disk, the process that is the first to use a
    page of it dies of SIGBUS. Closed again before LMDB opens it, so that no lock is lost.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(fd, 0, MAX_READERS * _READER_BYTES + _LOCK_HEADER_BYTES)
        finally:
            os.close(fd)
    except OSError as error:
        raise cannot_open(path, error) from error


_READER_BYTES: Final = 64
_LOCK_HEADER_BYTES: Final = 128
"""Of LMDB 0.9's lock file, on 64-bit Linux. What is wrong about them costs reader slots, or pages that are sparse."""


def fault(path: str, error: lmdb.Error) -> EthaError:
    """What an error of LMDB in the middle of its work means to a caller."""
    if isinstance(error, lmdb.MapFullError | lmdb.DiskError):
        return QueueFull(
            f"{path} is full: {error}.",
            resource=path,
            remedy="Is the disk full? Is a process stopped that reads it? See: etha status",
        )
    if isinstance(error, _DAMAGE):
        return InvalidRecord(
            f"{path} is damaged: {error}.", resource=path, remedy="Restart its agent, which makes a new one."
        )
    return SystemLimit(
        f"{path} cannot be used: {error}.", resource=path, remedy="See that disk, memory and reader slots are free."
    )


_DAMAGE: Final = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError)


def _forget_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    inherited = {(found.st_dev, found.st_ino) for known in _open.values() for found in known.inodes}
    companions = [known.companion for known in _open.values() if known.companion is not None]
    for known in _open.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(known.env))
    _open.clear()
    for companion in companions:
        companion.close()
    if inherited:
        _close_descriptors_of(inherited)
        _reset_guard()


def _reset_guard() -> None:
    guard: Any = importlib.import_module("lmdb._envid")
    pid, keys = os.getpid(), guard.env_keys
    guard.env_keys = lambda path, subdir: tuple((pid, *key) for key in keys(path, subdir))


def _close_descriptors_of(files: set[tuple[int, int]]) -> None:
    for name in os.listdir("/proc/self/fd"):
        try:
            found = os.fstat(int(name))
            if (found.st_dev, found.st_ino) in files:
                os.close(int(name))
        except OSError:
            continue  # the descriptor of the listing itself


os.register_at_fork(after_in_child=_forget_in_child)
