"""An agent as a child of this process, for notebooks and scripts: started, waited for, and ended without a trace.

The child is ``etha agent`` in a session of its own: a Ctrl-C at the terminal reaches this process, which then ends the
agent after its clients. It takes the first rank of the path convention that has no file, so it is found as any other,
and two at once do not meet. It ends with this process, however that ends (``--parent``). Its stderr is a file without a
name, so that what it says can never fill a pipe that nobody reads. No thread is started, and no environment variable
changed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import IO, TYPE_CHECKING, Final

from etha.errors import AgentFailed, EthaError
from etha.tensor_bus import clock
from etha.tensor_bus.client import TensorBusClient
from etha.tensor_bus.finding import device_name
from etha.tensor_bus.lockfile import read_lock
from etha.tensor_bus.paths import AgentPaths, agent_paths, runtime_directory

if TYPE_CHECKING:
    import subprocess

    import torch

logger = logging.getLogger(__name__)

_GRACE_SECONDS: Final = 5.0
"""From SIGTERM to SIGKILL."""

_TAIL_LENGTH: Final = 4096
"""Of what the agent said, in an error."""

_SAID_BYTES: Final = 1 << 20


class LocalAgent:
    """A running agent that this process started; see `local_agent`.

    Attributes:
        rank: the rank that it serves: ``AGENT_RANK`` for other processes.
        pid: its pid.
        device: what it serves.
        paths: its files.
    """

    def __init__(
        self, rank: int, device: str, paths: AgentPaths, process: subprocess.Popen[bytes], said: IO[bytes]
    ) -> None:
        """Take over a child that serves; use `local_agent`."""
        self.rank = rank
        self.pid = process.pid
        self.device = device
        self.paths = paths
        self._process = process
        self._file = said
        self._last_words = ""

    def client(self, connection_timeout: float = 30.0) -> TensorBusClient:
        """A new client of this agent. Close it before the agent's end: ``with agent.client() as client``.

        Args:
            connection_timeout: seconds.

        Raises:
            NoAgent, AgentStopped: as `TensorBusClient`.
        """
        return TensorBusClient(self.rank, self.paths.command, self.paths.state, connection_timeout)

    @property
    def said(self) -> str:
        """What it has logged so far, its first MiB; a healthy agent says nothing."""
        if self._file.closed:
            return self._last_words
        return os.pread(self._file.fileno(), _SAID_BYTES, 0).decode(errors="replace")

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def _end(self) -> None:
        if not self.alive:
            logger.warning("%r ended before its block did: %s", self, self.said or "it said nothing")
        try:
            _end(self._process, self.paths, _GRACE_SECONDS)
        finally:
            self._last_words = self.said
            self._file.close()

    def __repr__(self) -> str:
        return f"<LocalAgent of rank {self.rank}, pid {self.pid}>"


@contextmanager
def local_agent(device: str | torch.device = "cpu", *, timeout: float = 30.0) -> Iterator[LocalAgent]:
    """Run an agent for as long as the block lasts.

    Leaving the block ends it (SIGTERM, after 5 s SIGKILL) and removes its files, also if a client is still open: that
    client's next call raises `AgentGone` at its deadline. A child that was forked inside of the block ends nothing by
    leaving it. For several cells of a notebook: ``stack = contextlib.ExitStack()``, ``agent =
    stack.enter_context(local_agent())`` and, in the last one, ``stack.close()``.

    Args:
        device: what it is to serve: ``"cpu"`` or a `torch.device`.
        timeout: seconds for it to start.

    Raises:
        AgentFailed: it did not start, or not in time; the text ends with what it said.
        InvalidArgument: no device, or a timeout out of range.
    """
    agent = _start(device_name(device), clock.deadline_after(timeout), timeout)
    creator = os.getpid()
    try:
        yield agent
    finally:
        if os.getpid() == creator:
            agent._end()


# `subprocess` and `tempfile` are loaded where they are used: a process that only imports etha need not pay for them.


def _start(device: str, deadline: float, timeout: float) -> LocalAgent:
    import tempfile

    for rank in count():
        paths = agent_paths(rank)
        if any(map(os.path.lexists, (*paths.removable, paths.lock))):
            continue
        said = tempfile.TemporaryFile(prefix="etha-agent-")  # noqa: SIM115 - the LocalAgent closes it
        try:
            agent = _try(rank, device, paths, said, deadline, timeout)
        except BaseException:
            said.close()
            raise
        if agent is not None:
            return agent
        said.close()
    raise AgentFailed("there is no free rank.", resource=runtime_directory())


def _try(
    rank: int, device: str, paths: AgentPaths, said: IO[bytes], deadline: float, timeout: float
) -> LocalAgent | None:
    """The agent of a rank, or None if another took the rank meanwhile."""
    import subprocess

    command = [sys.executable, "-m", "etha", "agent", "--rank", str(rank), "--device", device]
    try:
        process = subprocess.Popen(
            [*command, "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
    except OSError as error:
        raise AgentFailed(
            f"{sys.executable} cannot be run: {error.strerror}.",
            resource=sys.executable,
            remedy="See that sys.executable is a Python that has etha.",
        ) from error
    agent = LocalAgent(rank, device, paths, process, said)
    try:
        if _says_that_it_serves(process, paths, deadline):
            return agent
        ended = not agent.alive
        if ended and _holder(paths) not in (None, process.pid):
            _end(process, paths, 0.0)
            return None
        how = f"ended with status {process.returncode}" if ended else f"did not serve within {timeout:g} s"
        raise AgentFailed(
            f"the agent of rank {rank} {how}. It said: {agent.said.strip()[-_TAIL_LENGTH:] or 'nothing'}",
            resource=paths.command,
            holder=f"pid {process.pid}",
            remedy=f"Try it at a terminal: {' '.join(command[2:])}",
        )
    except BaseException:
        _end(process, paths, 0.0)
        raise


def _says_that_it_serves(process: subprocess.Popen[bytes], paths: AgentPaths, deadline: float) -> bool:
    """Whether it has written its line, and holds its lock, before its end and the deadline.

    Something else of that Python may write to stdout too (a ``sitecustomize``), and earlier: hence the lock.
    """
    import subprocess

    if process.stdout is None:
        return False
    with process.stdout as pipe:
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while poll.poll(clock.remaining(deadline) * 1000) and os.read(pipe.fileno(), 1 << 16):
            if _holder(paths) == process.pid:
                return True
    with suppress(subprocess.TimeoutExpired):  # where its end of file came, so will its end
        process.wait(clock.remaining(deadline))
    return False


def _holder(paths: AgentPaths) -> int | None:
    """The pid of the living agent that holds the path, 0 while it has not said it, or None."""
    lock = read_lock(paths.lock)
    if lock is None or not lock.held:
        return None
    return 0 if lock.text is None else lock.text.pid


def _end(process: subprocess.Popen[bytes], paths: AgentPaths, grace: float) -> None:
    """SIGTERM, a time of grace, SIGKILL; then nothing of it is left."""
    import subprocess

    try:
        process.terminate()
        process.send_signal(signal.SIGCONT)  # one that is stopped would not hear the first
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    finally:  # an impatient Ctrl-C, too
        if process.poll() is None:
            process.kill()
            process.wait()
        _remove(paths, process.pid)


def _remove(paths: AgentPaths, pid: int) -> None:
    """Delete the files of a dead agent of ours, which leaves them where a worker is still registered.

    Under the lock, and only while it names that agent: another may have come to the path.
    """
    try:
        fd = os.open(paths.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock = read_lock(paths.lock)
        ours = lock is not None and lock.text is not None and lock.text.pid == pid
        if ours and os.path.samestat(os.fstat(fd), os.lstat(paths.lock)):
            for path in (*paths.removable, paths.lock):
                with suppress(FileNotFoundError):
                    os.unlink(path)
    except (BlockingIOError, FileNotFoundError, EthaError):
        return  # it is another's by now
    finally:
        os.close(fd)
