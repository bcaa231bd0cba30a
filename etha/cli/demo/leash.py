"""Runs a command that the kernel ends when the demo is gone, however it went (SIGKILL included).

``python -I leash.py PARENT_PID COMMAND...``. A program of its own, not ``preexec_fn``, which may
hang in a process that has threads. It is run by path, so that it imports nothing of etha.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

PR_SET_PDEATHSIG: Final = 1
"""prctl(2); kept across execve, so that it holds for the command."""


def main() -> None:
    """Becomes the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise SystemExit("the demo ended before this process had started")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
