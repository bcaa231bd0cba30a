"""The process at the other end of a socket: who it is, whether it lives, and which of its memory holds a publication.

Identity is the pidfd, which the kernel never hands to another process; pid, start time and label are for people and for
the files of /proc.

Sources: unix(7) (``SO_PEERCRED``), Linux 6.5 ``include/uapi/asm-generic/socket.h`` (``SO_PEERPIDFD``), pidfd_open(2),
prctl(2) and Documentation/admin-guide/LSM/Yama.rst (``PR_SET_PTRACER``).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from pathlib import Path
from typing import Final

from etha.errors import InvalidArgument, OtherNamespace
from etha.tensor_bus.ipc import libc
from etha.tensor_bus.ipc.observation import Observation, observe
from etha.tensor_bus.ipc.process import (
    boot_id,
    pid_namespace,
    proc_text,
    process_command,
    process_label,
    process_state,
    process_uids,
    start_time,
)

__all__ = [
    "Observation",
    "Peer",
    "authorise_tracer",
    "boot_id",
    "observe",
    "pid_namespace",
    "process_command",
    "process_label",
    "process_state",
    "start_time",
    "yama_scope",
]

_SO_PEERPIDFD: Final = 77
_UCRED: Final = struct.Struct("3i")
_PR_SET_PTRACER: Final = 0x59616D61
_PR_SET_PTRACER_ANY: Final = 2**64 - 1
_YAMA_SCOPE: Final = Path("/proc/sys/kernel/yama/ptrace_scope")


class Peer:
    """The process that connected, or listens; owns its pidfd.

    Attributes:
        pid: in our PID namespace.
        uid: effective, when it connected (or began to listen).
        gid: effective, at the same time.
        started: clock ticks since boot; 0 if /proc hides it.
        command: what it runs, a label.
        label: for people: ``"pid 4122 (live_eval.py)"``.
    """

    _pidfd = -1

    def __init__(self, pidfd: int, pid: int, uid: int, gid: int) -> None:
        """Take over an open pidfd; use `of`."""
        self.pid = pid
        self.uid = uid
        self.gid = gid
        self.started = start_time(pid)
        self.command = process_command(pid)
        self.label = f"pid {pid} ({self.command})"
        self._pidfd = pidfd

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """Ask the kernel who is at the other end of a connected ``AF_UNIX`` socket.

        For a pair made by ``socketpair`` that is whoever made it.

        Raises:
            OtherNamespace: the peer has no pid in our PID namespace, so its death could not be seen.
            ProcessLookupError: it is dead already. (A builtin, since only the caller knows what the peer was to it.)
            OSError: not such a socket, or no descriptor is left.
        """
        pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if pid <= 0:
            raise OtherNamespace(
                "The peer lives in another PID namespace: neither side could watch the other die.",
                resource=f"uid {uid}",
                remedy="Share the PID namespace (docker run --pid), or run an agent inside; run: etha doctor",
            )
        pidfd = _peer_pidfd(sock, pid, uid)
        try:
            return cls(pidfd, pid, uid, gid)
        except BaseException:
            os.close(pidfd)
            raise

    @classmethod
    def known(cls, pid: int, started: int) -> Peer:
        """The process that had this pid and start time when it was written down, in this boot and PID namespace.

        Args:
            pid: as recorded.
            started: clock ticks since boot; 0 where /proc hid it: then the pid alone has to do.

        Raises:
            ProcessLookupError: it is dead, and the pid nobody's or another process's.
            OSError: no descriptor is left.
        """
        peer = cls(os.pidfd_open(pid), pid, os.geteuid(), os.getegid())
        # While it lives, its pid cannot become another's: what /proc said before that look, it said of this process.
        if (started and peer.started != started) or not peer.alive():
            peer.close()
            raise ProcessLookupError(errno.ESRCH, f"process {pid} of start time {started} is dead")
        return peer

    def fileno(self) -> int:
        """The pidfd: readable once the process has died.

        Raises:
            ValueError: it was closed.
        """
        if self._pidfd < 0:
            raise ValueError("the pidfd was closed")
        return self._pidfd

    def alive(self) -> bool:
        """Whether the process has not died; a zombie has.

        Raises:
            ValueError: it was closed.
        """
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return not poll.poll(0)

    def state(self) -> str:
        """``"running"``, ``"stopped"``, ``"zombie"`` or ``"dead"``; never that of another process with its pid."""
        state = process_state(self.pid)
        if self.alive():
            return state
        return "zombie" if state == "zombie" and start_time(self.pid) == self.started else "dead"

    def close(self) -> None:
        """Close the pidfd; idempotent."""
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Peer {self.label}>"


def _peer_pidfd(sock: socket.socket, pid: int, uid: int) -> int:
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        limit = libc.system_limit(error, "asking for the peer's pidfd")
        if limit is not None:
            raise limit from error
        # A peer that has been reaped: EINVAL or ESRCH by kernel, ENODATA where the socket has no peer's pid at all.
        if error.errno in (errno.EINVAL, errno.ESRCH, errno.ENODATA):
            raise ProcessLookupError(errno.ESRCH, f"the peer, pid {pid}, is dead") from error
        if error.errno != errno.ENOPROTOOPT:
            raise
        return _pidfd_by_number(sock, pid, uid)
    os.set_inheritable(pidfd, False)
    return pidfd


def _pidfd_by_number(sock: socket.socket, pid: int, uid: int) -> int:
    """Linux before 6.5: open by pid, then make as sure as can be that the pid was not given to another process since.

    While the peer lives, so does its end of the socket, and a number that is taken cannot be given away: a socket
    that has not hung up after the pidfd was opened means that it is the peer's, unless the peer left its end to a child
    and died. That a stranger then has its number and its uid is the case that remains.
    """
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(sock, select.POLLRDHUP)
        if poll.poll(0) or process_state(pid) == "zombie" or uid not in process_uids(pid):
            raise ProcessLookupError(errno.ESRCH, f"the peer, pid {pid}, is dead")
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd


def authorise_tracer(pid: int | None) -> bool:
    """Let one process and its descendants trace this one, where Yama restricts that to ancestors.

    The kernel keeps one such slot per process: the last call wins.

    Args:
        pid: whom; None for any process, 0 for nobody any more.

    Returns:
        Whether the kernel has Yama. Without it there was nothing to do.

    Raises:
        InvalidArgument: a negative pid.
        ProcessLookupError: no such process.
    """
    if pid is not None and pid < 0:
        raise InvalidArgument(f"{pid} is no pid.", resource=str(pid), remedy="Give None to let any process trace.")
    try:
        libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY if pid is None else pid)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        if not pid or yama_scope() is None:  # these need no process that is there
            return False
        raise ProcessLookupError(errno.ESRCH, f"there is no process {pid}") from error
    return True


def yama_scope() -> int | None:
    """Yama's ptrace_scope, 0 (off) to 3 (nobody); None if the kernel has no Yama."""
    try:
        return int(proc_text(str(_YAMA_SCOPE)))
    except FileNotFoundError:
        return None
