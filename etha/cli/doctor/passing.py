"""Whether a process at the other end of a socket can be known, handed a descriptor, and seen to die.

These three carry the bus: identity is the peer's pidfd and uid, memory travels as descriptors, death is the pidfd's.
Tried with a child over a socket in the abstract namespace, so that no file is made.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
from typing import Final

from etha.cli.doctor import throwaway
from etha.cli.doctor.finding import Finding, Gate
from etha.cli.doctor.runner import Check
from etha.errors import EthaError
from etha.tensor_bus import wire
from etha.tensor_bus.ipc.peer import Peer

IDENTITY: Final = Gate(
    "gates", "peer identity", "a child connected; the kernel was asked who it is, and told its death"
)
PASSING: Final = Gate("gates", "SCM_RIGHTS", "a child sent a descriptor over a Unix socket")

_PATIENCE_MS: Final = 2000
_PROC: Final = Gate("gates", "/proc", "comparing /proc/self with this process's pid")


def checks() -> list[Check]:
    """The connection, and the /proc that names who is at its other end."""
    return [Check(PASSING, _look), Check(_PROC, lambda: [_look_at_proc()])]


def _look() -> list[Finding]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as door:
        name = "\0etha-doctor-" + secrets.token_hex(8)
        door.bind(name)
        door.listen()
        child = throwaway.fork(lambda: _send(name))
        sock, _ = door.accept()
        with sock:
            try:
                other = Peer.of(sock)
            except (EthaError, OSError) as error:
                return [_unknown(f"{type(error).__name__}: {error}")]
            known = (other.pid, other.uid, other.alive()) == (child, os.geteuid(), True)
            sock.send(b"?")
            passing = _passing(sock)
    return [_identity(other, child, known), passing]


def _send(name: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(name)
        sock.recv(1)
        reading, writing = os.pipe()
        os.write(writing, b"here")
        wire.send(sock, b"a descriptor", [reading])
        sock.recv(1)  # until the other end is closed: then this process dies


def _passing(sock: socket.socket) -> Finding:
    if not _readable(sock):
        return PASSING.broken("nothing came", "no memory can be handed over", _LSM_REMEDY)
    try:
        data, fds = wire.receive(sock)
    except (EthaError, OSError) as error:
        return PASSING.broken(str(error), "no memory can be handed over", _LSM_REMEDY)
    if not fds or os.read(fds[0], 4) != b"here":
        return PASSING.broken(
            f"{len(data)} bytes came, and {len(fds)} descriptors", "no memory can be handed over", _LSM_REMEDY
        )
    return PASSING.ok("it arrived and could be read", "memory is handed over as descriptors")


_LSM_REMEDY: Final = (
    "Look for what refused it: dmesg | grep -iE 'apparmor|avc' ; in gVisor or another user-space kernel, use runc."
)


def _unknown(seen: str) -> Finding:
    return IDENTITY.broken(
        seen,
        "the agent cannot know who connects, or that it died, so it lets nobody in",
        "Use Linux >= 6.5, or allow pidfd_open in the seccomp profile. A user-space kernel (gVisor) may have neither.",
    )


def _identity(other: Peer, child: int, known: bool) -> Finding:
    if not known:
        return IDENTITY.broken(
            f"the kernel says pid {other.pid} of uid {other.uid}; it was pid {child} of uid {os.geteuid()}",
            "the agent takes workers for others, and lets nobody in",
            "Run agent and workers in one PID and one user namespace (docker run --userns=host).",
        )
    if not _readable(other):
        return _unknown("the pidfd did not tell of its death")
    return IDENTITY.ok("pid, uid and death were told", "only this user's processes come in, and none is taken for dead")


def _readable(source: socket.socket | Peer) -> bool:
    poll = select.poll()
    poll.register(source, select.POLLIN)
    return bool(poll.poll(_PATIENCE_MS))


def _look_at_proc() -> Finding:
    try:
        shown = os.readlink("/proc/self")
    except OSError as error:
        return _PROC.broken(
            f"{error.strerror}", "nothing can be said of any process", "Mount it: mount -t proc proc /proc"
        )
    if shown != str(os.getpid()):
        return _PROC.degraded(
            f"/proc calls this process {shown}, its PID namespace {os.getpid()}",
            "processes are shown under wrong names, and states",
            "Mount the /proc of this PID namespace: mount -t proc proc /proc  (unshare --mount-proc)",
        )
    return _PROC.ok("they agree", "processes can be named")
