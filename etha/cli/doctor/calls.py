"""Whether seccomp lets the pidfd calls through, and what to do where it does not.

A filter answers before the kernel looks at the arguments. So arguments that the kernel must refuse with ``EBADF`` or
``ESRCH`` tell a filter's refusal from every other one. A filter that kills ends this check's child with SIGSYS.

Sources: pidfd_open(2), pidfd_getfd(2), seccomp(2). Docker's default profile (moby,
``profiles/seccomp/default_linux.go``) lets pidfd_open through, and pidfd_getfd only with ``CAP_SYS_PTRACE``.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

from etha.cli.doctor.finding import Finding, Gate
from etha.cli.doctor.runner import Check
from etha.cli.doctor.surroundings import fitting

_NR_PIDFD_OPEN: Final = 434
_NR_PIDFD_GETFD: Final = 438
"""The same on every architecture of Linux but alpha."""

_LIBC: Final = ctypes.CDLL(None, use_errno=True)

OPEN: Final = Gate("gates", "pidfd_open", "called with a pid that no process has")
GETFD: Final = Gate("gates", "pidfd_getfd", "called with no pidfd")

_OPEN_MEANS: Final = "before Linux 6.5, the agent has no other way to see a worker die; etha demo needs it everywhere"
_GETFD_MEANS: Final = (
    "sharing does not need it: descriptors cross the socket. After a restart, the agent cannot fetch them from an"
    " owner that calls nothing; reads of it wait for the owner's next call"
)


def checks() -> list[Check]:
    """Both calls, each in a child of its own."""
    return [
        Check(OPEN, lambda: [_look_at_open()], if_dead=lambda how: _killed(OPEN, how, _OPEN_MEANS, _open_remedy())),
        Check(
            GETFD, lambda: [_look_at_getfd()], if_dead=lambda how: _killed(GETFD, how, _GETFD_MEANS, _getfd_remedy())
        ),
    ]


def pidfd_getfd(pidfd: int, number: int) -> int:
    """A descriptor of another process, duplicated into this one.

    Raises:
        OSError: with the kernel's or the filter's errno.
    """
    return _call(_NR_PIDFD_GETFD, pidfd, number, 0)


def _look_at_open() -> Finding:
    refusal = _refusal(_NR_PIDFD_OPEN, 0x7FFFFFFF, 0)
    if refusal in (errno.ESRCH, errno.EINVAL):
        return OPEN.ok("the kernel answered, no filter did", "the death of a process can be seen at once")
    return OPEN.degraded(_seen(refusal), _OPEN_MEANS, _open_remedy())


def _look_at_getfd() -> Finding:
    refusal = _refusal(_NR_PIDFD_GETFD, -1, -1, 0)
    if refusal == errno.EBADF:
        return GETFD.ok("the kernel answered, no filter did", "the agent may fetch descriptors, where ptrace permits")
    return GETFD.degraded(_seen(refusal), _GETFD_MEANS, _getfd_remedy())


def _open_remedy() -> str:
    return fitting(
        "Allow pidfd_open in the seccomp profile (systemd: SystemCallFilter=pidfd_open).",
        docker="Use a current Docker, whose own profile allows it; else: docker run --security-opt seccomp=unconfined",
        kubernetes="securityContext: {seccompProfile: {type: RuntimeDefault}}, on a node with a current runtime",
    )


def _getfd_remedy() -> str:
    return fitting(
        "Allow pidfd_getfd in the seccomp profile (systemd: SystemCallFilter=pidfd_getfd).",
        docker="docker run --cap-add SYS_PTRACE  # Docker's profile then allows it",
        kubernetes="securityContext: {capabilities: {add: [SYS_PTRACE]}}",
    )


def _killed(gate: Gate, how: str, means: str, remedy: str) -> Finding:
    if "SIGSYS" in how:
        return gate.broken(f"a seccomp filter kills who calls it: the process {how}", means, remedy)
    return gate.broken(f"the process that called it {how}", means, "Report the whole output of etha doctor.")


def _seen(refusal: int) -> str:
    name = errno.errorcode.get(refusal, str(refusal))
    if refusal == errno.ENOSYS:
        return f"{name}: the kernel is older than 5.6, or a seccomp filter hides the call"
    return f"{name}: a seccomp filter refuses it"


def _refusal(number: int, *arguments: int) -> int:
    try:
        os.close(_call(number, *arguments))
    except OSError as error:
        return error.errno or 0
    return 0


def _call(number: int, *arguments: int) -> int:
    result = int(_LIBC.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
