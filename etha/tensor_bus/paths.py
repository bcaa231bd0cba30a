"""Where an agent's files are, and whether they can be trusted.

An agent of rank N owns, all beside one another::

    agent_rank{N}_command.lmdb          the command queue, with LMDB's "-lock" file
    agent_rank{N}_state.lmdb            the state, with LMDB's "-lock" file
    agent_rank{N}_command.lmdb.sock     the connection
    agent_rank{N}_command.lmdb.agent    who serves here, held by flock (`lockfile`)
    agent_rank{N}_command.lmdb.writer   whose turn it is to write the queue (`command_queue`)

They stand in ``/tmp``, or in ``ETHA_RUNTIME_DIR``, or where a naming function says. Other users can write to
``/tmp``, so nothing is opened before `require_private` has seen that it is ours.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from etha.errors import EthaError, InvalidArgument, SystemLimit, UnsafePath

PathNaming = Callable[[int], tuple[str, str]]
"""Rank to (command queue path, state path)."""

_SUN_PATH_MAX: Final = 107
"""Bytes of a Unix socket's path without its final NUL; unix(7)."""

_CONVENTION: Final = re.compile(r"agent_rank(\d+)_state\.lmdb")
_LOCKS: Final = re.compile(r"agent_rank(\d+)_command\.lmdb\.agent")


class AgentPaths(NamedTuple):
    """The files of one agent."""

    command: str
    state: str

    @property
    def socket(self) -> str:
        return self.command + ".sock"

    @property
    def lock(self) -> str:
        return self.command + ".agent"

    @property
    def writer(self) -> str:
        return self.command + ".writer"

    @property
    def removable(self) -> tuple[str, ...]:
        """All but the lock file, which goes last, by its holder."""
        return (
            self.socket,
            self.command,
            self.command + "-lock",
            self.state,
            self.state + "-lock",
            self.writer,
        )


def runtime_directory() -> str:
    """``ETHA_RUNTIME_DIR``, or ``/tmp``. Read at the call."""
    return os.environ.get("ETHA_RUNTIME_DIR") or "/tmp"


def default_paths(rank: int) -> tuple[str, str]:
    """The path convention: command queue and state of the agent of ``rank``."""
    directory = runtime_directory()
    return (
        os.path.join(directory, f"agent_rank{rank}_command.lmdb"),
        os.path.join(directory, f"agent_rank{rank}_state.lmdb"),
    )


def agent_paths(rank: int, command: str | None = None, state: str | None = None) -> AgentPaths:
    """The paths of the agent of ``rank``, where not given by the caller.

    Raises:
        InvalidArgument: the socket's path would be longer than the kernel takes (107 bytes), or a path is no
        printable text.
    """
    default_command, default_state = default_paths(rank)
    paths = AgentPaths(os.path.abspath(command or default_command), os.path.abspath(state or default_state))
    if len(os.fsencode(paths.socket)) > _SUN_PATH_MAX:
        raise InvalidArgument(
            f"the socket path {paths.socket} is longer than {_SUN_PATH_MAX} bytes.",
            resource=paths.socket,
            remedy="Set ETHA_RUNTIME_DIR, or the command queue path, to a shorter one.",
        )
    for path in paths:
        if not path.isprintable():
            raise InvalidArgument(
                f"{path!r} holds what is no printable text.",
                resource=path,
                remedy="Set ETHA_RUNTIME_DIR, or the path, to another.",
            )
    return paths


def agents_by_convention() -> list[tuple[int, str]]:
    """(rank, state path) of every state file that the path convention finds, by rank."""
    found: list[tuple[int, str]] = []
    directory = Path(runtime_directory())
    if not directory.is_dir():
        return found
    for entry in directory.iterdir():
        match = _CONVENTION.fullmatch(entry.name)
        if match:
            found.append((int(match[1]), str(entry)))
    return sorted(found)


def locks_by_convention() -> list[int]:
    """The ranks, ascending, of every lock file that the path convention finds: of the living, and of some dead."""
    directory = runtime_directory()
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for match in map(_LOCKS.fullmatch, names) if match)


def require_private(path: str) -> os.stat_result | None:
    """Check that ``path`` is a file or socket of ours that others cannot write, or absent.

    Returns:
        Its status, or None when there is nothing at the path.

    Raises:
        UnsafePath: a link, a foreign owner, or writable by group or others.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    reason = _distrust(found)
    if reason is not None:
        raise UnsafePath(
            f"{path} {reason}; it was not opened.",
            resource=path,
            holder=f"uid {found.st_uid}",
            remedy="Remove it, or set ETHA_RUNTIME_DIR to a directory of your own.",
        )
    return found


def require_trusted_directory(path: str) -> None:
    """Check the directory of ``path``: ours or root's, and if others may write there, sticky. A link to it, too.

    Raises:
        UnsafePath: it is missing, no directory, or others could replace our files in it.
    """
    directory = os.path.dirname(path)
    try:
        link, found = os.lstat(directory), os.stat(directory)
    except OSError as error:
        raise UnsafePath(
            f"{directory} cannot be used: {error.strerror}.",
            resource=directory,
            remedy="Create it, or set ETHA_RUNTIME_DIR to a directory of your own.",
        ) from error
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if (
        not stat.S_ISDIR(found.st_mode)
        or not {link.st_uid, found.st_uid} <= {0, os.geteuid()}
        or (shared and not found.st_mode & stat.S_ISVTX)
    ):
        raise UnsafePath(
            f"{directory} is no directory that only you (or a sticky bit) can change.",
            resource=directory,
            holder=f"uid {link.st_uid}",
            remedy="Set ETHA_RUNTIME_DIR to a directory of your own with mode 0700.",
        )


def cannot_open(path: str, error: OSError) -> EthaError:
    """The typed form of a failure to open, or to make, one of these files."""
    if error.errno in _RAN_OUT:
        return SystemLimit(
            f"{path} cannot be made: {error.strerror}.",
            resource=path,
            remedy="See that disk and descriptors are free (df, ulimit -n).",
        )
    return UnsafePath(f"{path} cannot be opened: {error.strerror}.", resource=path, remedy="See whose it is: ls -l")


_RAN_OUT: Final = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EROFS)


def _distrust(found: os.stat_result) -> str | None:
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISSOCK(found.st_mode)):
        return "is neither a file nor a socket"
    if found.st_uid != os.geteuid():
        return f"belongs to uid {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by group or others"
    return None
