"""The files of an agent: whose they are, what they lie on, whether the socket's path is short enough.

The rules are those of `etha.tensor_bus.paths`, which the agent and its workers keep; here each refusal gets the line to
paste. Nothing is opened but to look whether it begins as LMDB's data files do (``MDB_MAGIC`` of lmdb's mdb.c, behind
the 16 bytes of the first page's header): to open it with LMDB would leave a lock file beside it.
"""

from __future__ import annotations

import os
import stat
import struct
import tempfile
from functools import partial
from typing import Final

from etha.cli.doctor.finding import Finding, Gate
from etha.cli.doctor.runner import Check
from etha.cli.doctor.surroundings import file_system, size
from etha.errors import InvalidArgument, UnsafePath
from etha.tensor_bus.paths import (
    AgentPaths,
    agent_paths,
    require_private,
    require_trusted_directory,
    runtime_directory,
)

_MAGIC: Final = struct.pack("=I", 0xBEEFC0DE)
_PAGE_HEADER: Final = 16
_ROOM: Final = 64 << 20
"""What the two files of a busy agent have been seen to take, and more."""

_NETWORKED: Final = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "lustre",
        "gpfs",
        "beegfs",
        "ceph",
        "glusterfs",
        "9p",
        "afs",
        "fuse.sshfs",
        "wekafs",
    }
)
_MEANS: Final = "neither an agent nor a worker of yours opens it, so nothing can be served there"


def checks(ranks: list[int]) -> list[Check]:
    """The directory, and the files of each rank."""
    directory = directory_gate()
    found = [Check(directory, lambda: [_look_at_directory(directory)])]
    return found + [Check(_gate(rank), partial(_look, rank)) for rank in ranks]


def own_directory() -> str:
    """The line that gives this user, the second one of the box, a place of its own."""
    path = f"/tmp/etha-{os.geteuid()}"
    return f"mkdir -p -m 700 {path} && export ETHA_RUNTIME_DIR={path}"


def is_lmdb(path: str) -> bool:
    """Whether it begins as an LMDB data file does, or is empty, as one that was never written to."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return os.fstat(fd).st_size == 0 or os.pread(fd, len(_MAGIC), _PAGE_HEADER) == _MAGIC
    finally:
        os.close(fd)


def directory_gate() -> Gate:
    """Of the runtime directory."""
    where = "ETHA_RUNTIME_DIR" if os.environ.get("ETHA_RUNTIME_DIR") else "the default"
    return Gate("paths", "runtime directory", f"looking at {runtime_directory()} ({where}), and writing to it")


def _gate(rank: int) -> Gate:
    return Gate("paths", f"files of rank {rank}", f"looking at what stands at {runtime_directory()}/agent_rank{rank}_*")


def _look_at_directory(gate: Gate) -> Finding:
    directory = os.path.abspath(runtime_directory())
    try:
        agent_paths(0)
    except InvalidArgument as error:
        return gate.broken(error.message, "no agent can listen there, and no worker reach it", own_directory())
    try:
        require_trusted_directory(os.path.join(directory, "any"))
    except UnsafePath as error:
        return gate.broken(error.message, "no agent starts there", own_directory())
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, 1 << 20)
    except OSError as error:
        return gate.broken(f"{directory}: {error.strerror}", "no agent can make its files there", own_directory())
    kind, found = file_system(directory), os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    seen = f"{directory}: mode {stat.S_IMODE(os.stat(directory).st_mode):04o}, {kind}, {size(free)} free"
    if kind in _NETWORKED:
        return gate.degraded(
            seen, "LMDB and flock between processes are not reliable on a network file system", own_directory()
        )
    if free < _ROOM:
        return gate.degraded(seen, "the agent's files may not grow as they must (QueueFull)", own_directory())
    return gate.ok(seen, "agent and workers meet there; all of them must have the same ETHA_RUNTIME_DIR")


def _look(rank: int) -> list[Finding]:
    return [_judge(rank)]


def _judge(rank: int) -> Finding:
    gate = _gate(rank)
    try:
        paths = agent_paths(rank)
    except InvalidArgument as error:
        return gate.broken(error.message, "no agent can listen there, and no worker reach it", own_directory())
    there: list[str] = []
    for path in (*paths.removable, paths.lock):
        try:
            if require_private(path) is not None:
                there.append(path)
        except UnsafePath as error:
            foreign = os.lstat(path).st_uid != os.geteuid()
            gate = gate._replace(name="other user") if foreign else gate
            return gate.broken(error.message, _MEANS, _remedy(path))
    for path in (paths.command, paths.state):
        if path in there and not (stat.S_ISREG(os.lstat(path).st_mode) and is_lmdb(path)):
            return gate.broken(f"{path} was not made by etha", _MEANS, f"mv {path} {path}.away")
    return gate.ok(_describe(paths, there), "they are this user's alone")


def _remedy(path: str) -> str:
    found = os.lstat(path)
    if found.st_uid != os.geteuid() and os.geteuid() != 0:
        return own_directory()
    if stat.S_ISLNK(found.st_mode):
        return f"rm {path}"
    plain = stat.S_ISREG(found.st_mode) or stat.S_ISSOCK(found.st_mode)
    if plain and found.st_uid == os.geteuid():
        return f"chmod go-w {path}"
    return f"mv {path} {path}.away"


def _describe(paths: AgentPaths, there: list[str]) -> str:
    if not there:
        return f"nothing; the socket's path has {len(os.fsencode(paths.socket))} of 107 bytes"
    modes = sorted({f"{stat.S_IMODE(os.lstat(path).st_mode):04o}" for path in there})
    return f"{len(there)} files of uid {os.geteuid()}, mode {', '.join(modes)}, no link among them"
