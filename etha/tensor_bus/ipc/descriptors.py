"""File descriptors: one small owner for each, and room for them before they are made.

A descriptor is needed per allocation by the owner (under torch's ``file_descriptor`` strategy it is torch's own)
and by the agent. Running out half-way through a registration is the worst moment, so the limit is asked first.
"""

from __future__ import annotations

import errno
import os
import resource
from typing import Final

from etha.errors import SystemLimit

_SLACK: Final = 32
"""Descriptors left for everyone else in the process: a socket, a log file, an import."""


class SharedFd:
    """The number of an open descriptor, and whether closing it is our affair.

    A *borrowed* one belongs to a torch storage, which closes it when it dies; ``keeper`` keeps that storage alive
    as long as the number may be used. Not safe to close in one thread while another uses the number.
    """

    __slots__ = ("_keeper", "_number", "owned")

    def __init__(self, number: int, *, owned: bool, keeper: object = None) -> None:
        self._number = number
        self._keeper = keeper
        self.owned = owned

    def fileno(self) -> int:
        """The number.

        Raises:
            ValueError: it was closed; Python's own files say the same.
        """
        if self._number < 0:
            raise ValueError("the descriptor was closed")
        return self._number

    def close(self) -> None:
        """Close an owned descriptor, forget a borrowed one; idempotent."""
        number, self._number = self._number, -1
        self._keeper = None
        # Forgotten first: if close() is interrupted, the number may already be somebody else's.
        if self.owned and number >= 0:
            os.close(number)

    def __del__(self) -> None:
        self.close()


def in_use(limit: int) -> int:
    """How many descriptors this process has open; ``limit``, if none is left even for the look."""
    count = os.stat("/proc/self/fd").st_size
    if count > 0:  # Linux 6.2 and newer count them themselves (proc_pid_fd(5))
        return count
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return limit


def reserve_descriptors(opening: int, sending: int = 0) -> None:
    """Make sure that so many descriptors can be opened and be in flight; raise the soft limit if needed.

    Descriptors in flight over a socket count against the sender's limit too (unix(7), ``ETOOMANYREFS``).

    Args:
        opening: descriptors this process is about to open or receive.
        sending: descriptors that may be in flight at once.

    Raises:
        SystemLimit: the hard limit is too low; ``resource`` is ``"RLIMIT_NOFILE"``.
    """
    if opening == 0 and sending == 0:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    needed = max(in_use(soft) + opening, sending) + _SLACK
    if needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise SystemLimit(
            f"{needed} descriptors are needed and {hard} are allowed.",
            resource="RLIMIT_NOFILE",
            remedy="Raise the hard limit (ulimit -Hn, LimitNOFILE=), or share fewer, larger storages; run: etha doctor",
        )
    # An infinite soft limit would be above fs.nr_open, which the kernel refuses: then ask for what is needed.
    target = needed if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
