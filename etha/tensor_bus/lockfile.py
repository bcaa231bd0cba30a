"""Who serves a path: a plain-text file, held by ``flock`` for the agent's life.

The kernel drops the lock when its holder dies, however it dies, so "is an agent alive here" is a question to the
kernel and never to a clock. The text is read before any LMDB file is opened: it names pid, boot, PID namespace,
epoch, schema and device, so a reader knows whom it would talk to. A file of another boot is void whatever it says.

`AgentLock` belongs to the agent. `read_lock` is for everyone: it takes nothing and changes nothing.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from etha.errors import AgentRunning, InvalidRecord, UnsafePath, VersionMismatch
from etha.tensor_bus import clock
from etha.tensor_bus.ipc import process
from etha.tensor_bus.paths import cannot_open, require_private
from etha.tensor_bus.records import SCHEMA

_MAX_TEXT: Final = 4096
_FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NO_TEXT: Final = (msgspec.DecodeError, ValueError, RecursionError)
"""What msgspec raises for bytes that are no `LockText`; `ValueError` for text that is no UTF-8."""


class LockText(msgspec.Struct, frozen=True):
    """What the lock file says, one JSON object on one line.

    Attributes:
        pid: the agent's, in the PID namespace named.
        boot: the kernel's boot id.
        namespace: inode of the agent's PID namespace.
        epoch: 64-bit number of this agent's life; it grows from agent to agent.
        schema: the record schema that it speaks.
        rank: the agent's rank.
        device: what it serves: ``"cpu"``, or ``"cuda:"`` and the UUID of a GPU.
    """

    pid: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
    boot: str
    namespace: int
    epoch: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
    schema: int
    rank: int
    device: str


@dataclass(frozen=True)
class LockState:
    """What stands at a lock path.

    Attributes:
        text: what the file says; None while its holder has not written it yet, and for a file of another user.
        held: True while the process that wrote it lives.
        uid: the file's owner.
    """

    text: LockText | None
    held: bool
    uid: int


def read_lock(path: str) -> LockState | None:
    """What stands at ``path``, or None when nothing does. Waits for no one.

    Raises:
        UnsafePath: a link, or no plain file.
        InvalidRecord: the text is not what an agent writes.
    """
    try:
        fd = os.open(path, os.O_RDONLY | _FLAGS)
    except FileNotFoundError:
        return None
    except PermissionError:
        return LockState(None, True, os.lstat(path).st_uid)
    except OSError as error:
        raise cannot_open(path, error) from error
    try:
        found = os.fstat(fd)
        uid = found.st_uid
        if not stat.S_ISREG(found.st_mode):
            raise UnsafePath(
                f"{path} is no plain file.", resource=path, holder=f"uid {uid}", remedy="Remove it; run: etha doctor"
            )
        raw = os.read(fd, _MAX_TEXT) if uid == os.geteuid() else b""
        held = not _try_flock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)
    if not raw:
        return LockState(None, held, uid)
    try:
        return LockState(msgspec.json.decode(raw, type=LockText), held, uid)
    except _NO_TEXT as error:
        raise InvalidRecord(
            f"{path} does not hold what an agent writes: {error}.",
            resource=path,
            remedy="Remove it if no agent of yours runs there.",
        ) from error


class AgentLock:
    """The agent's hold on its path. Release removes the file; death only drops the lock."""

    def __init__(self, path: str, rank: int, device: str) -> None:
        """Take the lock, or say who has it.

        Raises:
            AgentRunning: another agent serves here; ``holder`` is its pid.
            VersionMismatch: an agent of another schema has left its workers here. Nothing was touched.
            UnsafePath: the path is not ours alone.
            SystemLimit: no room on the disk.
        """
        self.path = path
        self._fd, self.previous = _acquire(path)
        self.text = LockText(
            pid=os.getpid(),
            boot=process.boot_id(),
            namespace=process.pid_namespace(),
            epoch=max(time.clock_gettime_ns(time.CLOCK_BOOTTIME), self.previous.epoch + 1 if self.previous else 1),
            schema=SCHEMA,
            rank=rank,
            device=device,
        )
        # Emptied first: a reader sees the old text, none, or the new one, never a mixture.
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, msgspec.json.encode(self.text) + b"\n", 0)
        except OSError as error:
            self.release(remove=True)
            raise cannot_open(path, error) from error

    def still_ours(self) -> bool:
        """False once the file at the path is no longer the one that is held."""
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def release(self, *, remove: bool) -> None:
        """Give the path up; ``remove`` takes the file away first, while it is still held."""
        if self._fd < 0:
            return
        if remove and self.still_ours():
            os.unlink(self.path)
        fd, self._fd = self._fd, -1
        os.close(fd)


def another_schema(path: str, schema: int) -> VersionMismatch:
    """What an agent of another schema left at this path cannot be read."""
    return VersionMismatch(
        f"{path} was left by an agent of record schema {schema}; this etha speaks {SCHEMA}.",
        resource=path,
        remedy=f"Run that version; or end its workers, and remove {path}* and its state then; run: etha doctor",
    )


def _try_flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_SHARED_PROBE_SECONDS: Final = 0.5
"""How long a starting agent tries again: a reader's probe holds the lock for microseconds."""


def _acquire(path: str) -> tuple[int, LockText | None]:
    deadline = clock.now() + _SHARED_PROBE_SECONDS
    while True:
        require_private(path)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
        except OSError as error:
            raise cannot_open(path, error) from error
        try:
            _require_private(fd, path)
        except UnsafePath:
            os.close(fd)
            raise
        held = _try_flock(fd, fcntl.LOCK_EX)
        if held and _is_at(fd, path):
            previous = _previous(fd)
            if previous is not None and previous.schema != SCHEMA and previous.boot == process.boot_id():
                os.close(fd)
                raise another_schema(path.removesuffix(".agent"), previous.schema)
            os.ftruncate(fd, 0)  # at once: while it is held, the old text would be taken for the new holder's
            return fd, previous
        text = None if held else _previous(fd)
        os.close(fd)
        if not held and clock.now() > deadline:
            pid = text.pid if text else None
            raise AgentRunning(
                f"pid {pid if pid is not None else 'unknown'} already serves {path.removesuffix('.agent')}.",
                resource=path,
                holder=None if pid is None else f"pid {pid}",
                remedy="Stop it first, or give this agent another --rank or --command-queue.",
            )
        if not held:
            time.sleep(0.01)


def _require_private(fd: int, path: str) -> None:
    """As `paths.require_private`, of what was opened: something else may have come to the path since."""
    found = os.fstat(fd)
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or shared:
        raise UnsafePath(
            f"{path} is no plain file of yours alone.",
            resource=path,
            holder=f"uid {found.st_uid}",
            remedy="Remove it; run: etha doctor",
        )


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _previous(fd: int) -> LockText | None:
    try:
        return msgspec.json.decode(os.pread(fd, _MAX_TEXT, 0), type=LockText)
    except _NO_TEXT:
        return None
