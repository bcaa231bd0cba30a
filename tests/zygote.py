"""A process that has imported torch and etha once, and forks a worker whenever a test asks: milliseconds, not seconds.

The worker is a grandchild of the zygote and becomes the test's own child (``PR_SET_CHILD_SUBREAPER``), so the test
waits for it and sees its exit status as it would of any child. No client is ever made in the zygote.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

_PR_SET_CHILD_SUBREAPER = 36
_MAX_REQUEST = 1 << 16


class Forked:
    """A worker process, with what the tests use of `subprocess.Popen`'s face."""

    def __init__(self, pid: int, stdin: int, stdout: int) -> None:
        self.pid = pid
        self.stdin = os.fdopen(stdin, "wb")
        self.stdout = os.fdopen(stdout, "rb", buffering=0)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                if not select.select([pidfd], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout)
            finally:
                os.close(pidfd)
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Zygote:
    """The test's side: one zygote per test run, started on first use."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        atexit.register(self.close)

    def fork(self, environment: dict[str, str], stderr: int) -> Forked:
        """A new worker with this environment, its stdin and stdout piped."""
        stdin, stdin_write = os.pipe2(os.O_CLOEXEC)
        stdout_read, stdout = os.pipe2(os.O_CLOEXEC)
        try:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [stdin, stdout, stderr]))
            self._sock.sendmsg([json.dumps(environment).encode()], [rights])
        finally:
            os.close(stdin)
            os.close(stdout)
        pid = int(self._sock.recv(64))
        return Forked(pid, stdin_write, stdout_read)

    def close(self) -> None:
        """End it; the workers are their tests' matter."""
        self._sock.close()
        self._process.wait()


@functools.cache
def zygote() -> Zygote:
    """The zygote of this test run."""
    return Zygote()


def serve(sock: socket.socket, work: Callable[[], object]) -> None:
    """The zygote's side: fork a worker for each request, until the test run ends."""
    while True:
        data, ancillary, _, _ = sock.recvmsg(_MAX_REQUEST, socket.CMSG_SPACE(3 * 4))
        if not data:
            return
        fds = array.array("i")
        fds.frombytes(ancillary[0][2])
        reading, writing = os.pipe()
        middle = os.fork()
        if middle == 0:
            worker = os.fork()
            if worker == 0:
                sock.close()
                os.close(reading)
                os.close(writing)
                _become_worker(json.loads(data), fds, work)
            os.write(writing, str(worker).encode())
            os._exit(0)
        os.close(writing)
        for fd in fds:
            os.close(fd)
        os.waitpid(middle, 0)
        sock.send(os.read(reading, 64))
        os.close(reading)


def _become_worker(environment: dict[str, str], fds: Sequence[int], work: Callable[[], object]) -> NoReturn:
    os.environ.clear()
    os.environ.update(environment)
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    work()
    sys.exit(0)


if __name__ == "__main__":
    import torch
    from harness import WORKER

    import etha  # noqa: F401

    torch.set_num_threads(1)
    serve(socket.socket(fileno=int(sys.argv[1])), lambda: exec(compile(WORKER, "<harness>", "exec"), {}))
