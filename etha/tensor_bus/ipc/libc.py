"""The five system calls that Python's library does not offer, or not with the control needed here.

`mmap.mmap` will not do: it unmaps when it is collected, keeps a duplicate of the descriptor and hides the address.
Every call goes through ctypes with ``use_errno``, so the error is that of this thread's call.

Sources: mmap(2), madvise(2), prctl(2), pidfd_getfd(2).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Final

from etha.errors import SystemLimit

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_LIBC.syscall.restype = ctypes.c_long
_LIBC.syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_uint)
_LIBC.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)

_SYS_PIDFD_GETFD: Final = 438
"""On every architecture but alpha; no C library wraps it before glibc 2.36."""

_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_LIMITS: Final = {
    errno.ENOMEM: ("mappings or address space", "Raise vm.max_map_count, or the limit on address space."),
    errno.EAGAIN: ("locked memory", "Raise RLIMIT_MEMLOCK."),
    errno.ENFILE: ("open files of the system", "Raise fs.file-max."),
    errno.EMFILE: ("RLIMIT_NOFILE", "Raise the limit on open descriptors (ulimit -n)."),
}


def system_limit(error: OSError, doing: str) -> SystemLimit | None:
    """The typed form of an error that says something ran out, or None for any other error.

    Args:
        error: what the system call raised.
        doing: what was attempted, as a gerund phrase (``"mapping 4096 bytes"``).
    """
    known = _LIMITS.get(error.errno or 0)
    if known is None:
        return None
    return SystemLimit(f"{doing}: {error.strerror}.", resource=known[0], remedy=known[1])


def map_shared(fd: int, size: int, *, writable: bool) -> int:
    """Map the first ``size`` bytes of ``fd``, shared, and absent from every forked child.

    Args:
        fd: an open file; the mapping does not need it afterwards.
        size: bytes, > 0.
        writable: False makes a write through the mapping end the process with SIGSEGV.

    Returns:
        The address. It stays mapped until `unmap`.

    Raises:
        SystemLimit: no mapping or no address space is left.
        OSError: anything else the kernel says (a descriptor without the right, a file that cannot be mapped).
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    address = _LIBC.mmap(None, size, protection, mmap.MAP_SHARED, fd, 0)
    if address is None or address == _MAP_FAILED:
        _fail(f"mapping {size} bytes")
    if _LIBC.madvise(address, size, mmap.MADV_DONTFORK) != 0:
        try:
            _fail("keeping a mapping out of forked children")
        finally:
            _LIBC.munmap(address, size)
    return int(address)


def unmap(address: int, size: int) -> None:
    """Undo `map_shared`. The caller answers for it that nothing points there any more.

    Raises:
        SystemLimit: the kernel could not split a mapping; nothing was unmapped.
        OSError: the range is no mapping's.
    """
    if _LIBC.munmap(address, size) != 0:
        _fail(f"unmapping {size} bytes")


def prctl(option: int, argument: int) -> int:
    """Call prctl(2) with one argument and return what it returns (>= 0).

    Raises:
        OSError: with the kernel's errno; EINVAL also when the kernel lacks the option.
    """
    result = int(_LIBC.prctl(option, argument, 0, 0, 0))
    if result < 0:
        raise _error(f"prctl({option})")
    return result


def pidfd_getfd(pidfd: int, number: int) -> int:
    """A copy of another process's descriptor; close-on-exec.

    Raises:
        OSError: ``EPERM`` where ptrace is not permitted, ``EBADF`` where the process has no such descriptor, ``ENOSYS``
            before Linux 5.6 or where seccomp says so.
    """
    copy = int(_LIBC.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0))
    if copy < 0:
        raise _error(f"pidfd_getfd({number})")
    return copy


def _error(doing: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{os.strerror(number)} ({doing})")


def _fail(doing: str) -> None:
    error = _error(doing)
    limit = system_limit(error, doing)
    if limit is not None:
        raise limit from error
    raise error
