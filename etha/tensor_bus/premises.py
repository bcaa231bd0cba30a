"""The files of an agent, as it finds and as it leaves them: what it may take over, what delete, and whose they are.

What a dead agent of this boot left for its workers is taken over, after a child has read all of it (`examination`). If
that finds damage, the files are set aside, under their names and ``.damaged``, and the agent starts from nothing. So
is one file of which the other has gone, if a worker that lives may miss it: alone it is of no use, for a worker that
has the lost one open writes or reads what nobody else sees. What is left of another boot is deleted unopened.

A path comes from a command line, so anything may stand there. Deleted is only what etha or LMDB made, by its kind and
its first bytes, and only if no live agent holds it: besides the lock of its command path, each agent holds ``flock`` on
both of its LMDB data files, so that two agents whose command paths differ cannot have one state. (LMDB itself locks its
``-lock`` files, and by record locks, which know nothing of ``flock``.) Where a lock file says that an agent was here,
and the names are those of the convention, files whose first bytes are damaged are set aside like others.

Used by the agent alone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import struct
from contextlib import ExitStack
from typing import Final

from etha.errors import AgentRunning, EthaError, InvalidArgument, UnsafePath
from etha.tensor_bus.examination import examine
from etha.tensor_bus.ipc.process import boot_id
from etha.tensor_bus.lockfile import LockText, another_schema
from etha.tensor_bus.paths import AgentPaths, cannot_open, require_private, require_trusted_directory
from etha.tensor_bus.records import SCHEMA
from etha.tensor_bus.state import StateReader

logger = logging.getLogger(__name__)

_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_LMDB_MAGIC: Final = struct.pack("=I", 0xBEEFC0DE)
"""``MDB_MAGIC`` of lmdb's mdb.c: behind the 16 bytes of the first page's header, and first in the lock file."""

_PAGE_HEADER: Final = 16
_DAMAGED: Final = ".damaged"
_COMMAND, _STATE = "_command.lmdb", "_state.lmdb"


class Premises:
    """One agent's hold on its files, beside its `AgentLock`."""

    def __init__(self, paths: AgentPaths) -> None:
        """Nothing is touched yet.

        Raises:
            InvalidArgument: two of the files would be one.
            UnsafePath: a file or directory that others could have planted.
        """
        self._paths = paths
        self._held: dict[str, int] = {}
        everything = [*paths.removable, paths.lock]
        if len(set(map(os.path.realpath, everything))) < len(everything):
            raise InvalidArgument(
                f"{paths.command} and {paths.state} cannot be the files of one agent: two of them would be one.",
                resource=paths.state,
                remedy="Give --command-queue and --state paths that differ by more than an ending.",
            )
        for path in paths:
            require_trusted_directory(path)
        for path in paths.removable:
            require_private(path)

    def take_over(self, previous: LockText | None) -> bool:
        """Keep what an earlier agent left for workers that may live; delete what means nothing any more.

        Args:
            previous: what the lock file said before; None if it said nothing.

        Returns:
            Whether its LMDB files are there to be opened. The state and the queue are held then.

        Raises:
            AgentRunning: another agent holds the state; ``holder`` names it.
            VersionMismatch: it spoke another record schema. Nothing was touched.
            UnsafePath: a file that is none of an agent's. Nothing was deleted.
        """
        here = [path for path in (self._paths.command, self._paths.state) if require_private(path) is not None]
        if not here or (previous is not None and previous.boot != boot_id()):
            self.clear()
            return False
        strange = [path for path in self._paths.removable if require_private(path) and not self._is_ours(path)]
        if strange:
            if not self._was_an_agents(previous, strange):
                raise _not_ours(strange[0])
            with ExitStack() as held:
                for path in here:
                    held.callback(os.close, _take(path))
                self._set_aside(f"{', '.join(strange)} does not begin as LMDB's files do", strange)
                self.clear()
            return False
        with ExitStack() as undo:
            undo.callback(self.close)
            for path in here:
                self.hold(path)
            finding = examine(self._paths)
            if finding.damage is None and finding.boot == boot_id():
                if finding.schema != SCHEMA:
                    raise another_schema(self._paths.command, finding.schema)
                if finding.clients and len(here) > 1:
                    if os.path.lexists(self._paths.socket):
                        os.unlink(self._paths.socket)
                    undo.pop_all()
                    return True
        if finding.damage is not None:
            self._set_aside(finding.damage, [])
        self.clear()
        return False

    def _was_an_agents(self, previous: LockText | None, strange: list[str]) -> bool:
        """Whether what bears an LMDB file's name was one, though its first bytes do not say so any more.

        An agent's lock file says that one was here, and nobody else gives files the names of the convention.
        """
        ours = [*_lmdb_files(self._paths.command), *_lmdb_files(self._paths.state)]
        state = self._paths.command.removesuffix(_COMMAND) + _STATE
        return previous is not None and self._paths.state == state and set(strange) <= set(ours)

    def _set_aside(self, damage: str, strange: list[str]) -> None:
        for path in dict.fromkeys((self._paths.command, self._paths.state, *strange)):
            if os.path.lexists(path):
                os.rename(path, path + _DAMAGED)
                logger.error("%s cannot be used (%s); it is now %s", path, damage, path + _DAMAGED)

    def clear(self) -> None:
        """Delete what an agent that is dead or of another boot left; LMDB does not open it.

        Raises:
            AgentRunning: another agent holds the state; ``holder`` names it.
            UnsafePath: a file that is none of an agent's. Nothing was deleted.
        """
        found = [path for path in self._paths.removable if require_private(path) is not None]
        with ExitStack() as held:
            for path in (self._paths.command, self._paths.state):
                if path in found:
                    held.callback(os.close, _take(path))
            for path in found:
                if not self._is_ours(path):
                    raise _not_ours(path)
            for path in found:
                logger.debug("removing %s", path)
                os.unlink(path)

    def hold(self, path: str) -> None:
        """An LMDB file is there: hold it for as long as this agent lives. A second time does nothing.

        Raises:
            AgentRunning: another agent was faster.
        """
        if path in self._held:
            return
        self._held[path] = _take(path)

    def leave(self, *, remove: bool) -> None:
        """Give everything up; ``remove`` deletes the files first, else only the socket goes."""
        if os.path.lexists(self._paths.socket):
            os.unlink(self._paths.socket)
        for path, fd in self._held.items():
            if remove and os.path.exists(path) and os.path.samestat(os.fstat(fd), os.lstat(path)):
                os.unlink(path)
        self.close()
        if remove:
            self.clear()

    def close(self) -> None:
        """Give up the hold, and touch no file."""
        while self._held:
            os.close(self._held.popitem()[1])

    def _is_ours(self, path: str) -> bool:
        found = os.lstat(path)
        if path == self._paths.socket:
            return stat.S_ISSOCK(found.st_mode)
        if path == self._paths.writer:
            return stat.S_ISREG(found.st_mode) and found.st_size == 0
        if path.endswith("-lock"):
            return _starts(path, 0) in (_LMDB_MAGIC, bytes(4), b"")
        return _starts(path, _PAGE_HEADER) == _LMDB_MAGIC or found.st_size == 0


def _lmdb_files(path: str) -> tuple[str, str]:
    return path, path + "-lock"


def _not_ours(path: str) -> UnsafePath:
    return UnsafePath(
        f"{path} was not made by etha; it is untouched.",
        resource=path,
        remedy="Give another path, or remove it if nobody needs it; run: etha doctor",
    )


def _starts(path: str, offset: int) -> bytes:
    """Four bytes of a file; too few where it is too short."""
    fd = _open(path)
    try:
        return os.pread(fd, len(_LMDB_MAGIC), offset)
    finally:
        os.close(fd)


def _take(path: str) -> int:
    """A descriptor that holds ``flock`` on the file at the path."""
    while True:
        fd = _open(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(path)):
                return fd
        except BlockingIOError as error:
            os.close(fd)
            holder = _holder(path)
            raise AgentRunning(
                f"{path} belongs to {holder or 'another agent'}, which lives.",
                resource=path,
                holder=holder,
                remedy="Stop it first, or give this agent another --state.",
            ) from error
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _open(path: str) -> int:
    try:
        return os.open(path, _FLAGS)
    except OSError as error:
        raise cannot_open(path, error) from error


def _holder(path: str) -> str | None:
    try:
        reader = StateReader(path)
    except EthaError:
        return None
    try:
        record = reader.agent()
    except EthaError:
        return None
    finally:
        reader.close()
    return None if record is None else f"pid {record.pid}"
