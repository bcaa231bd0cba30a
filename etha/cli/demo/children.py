"""The demo's processes: started on a leash, listened to together, and ended without a trace."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, NamedTuple

from etha.cli.demo import leash

_GRACE_S: Final = 5.0
"""From SIGTERM to SIGKILL."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoFailed(Exception):
    """The demo could not run to its end; the text is for the user."""


class ChildEnded(Exception):
    """A child ended before its time; `Family.obituary` tells more, once the family has ended."""


class Interrupted(Exception):
    """The user asked the demo to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class Line(NamedTuple):
    """A line that a child wrote, or its end."""

    child: Child
    text: bytes | None
    """None: the child has ended, and everything that it wrote has been told."""


class Child:
    """One process, in a session of its own: a Ctrl-C at the terminal reaches the demo alone."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.told_to_end = False
        self._log = log
        self._unfinished = b""
        stdin, self._stdin = os.pipe()
        self.stdout, stdout = os.pipe()
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-I", leash.__file__, str(os.getpid()), sys.executable, *command],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=dict(environment),
                start_new_session=True,
            )
        os.close(stdin)
        os.close(stdout)
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; the negative number of the signal that ended it."""
        return self._process.poll()

    def say_go_on(self) -> None:
        """One word to a child that waits, or will; a child that has just died is noticed by its pidfd."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._stdin, b"go on\n")

    def receive(self) -> tuple[list[bytes], bool]:
        """Whole lines out of what can be read without waiting, and whether the end of file is reached.

        Never blocks: a helper that a dead child left behind may hold the pipe open.
        """
        os.set_blocking(self.stdout, False)
        ended = False
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.stdout, 1 << 16):
                self._unfinished += chunk
            ended = True
        *lines, self._unfinished = self._unfinished.split(b"\n")
        return lines, ended

    def stderr_tail(self, lines: int = 40) -> str:
        """The last lines that it wrote on stderr."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def ask_to_end(self) -> None:
        """SIGTERM, unless it has ended already."""
        if self.exit_code is None:
            self.told_to_end = True
            self._process.terminate()

    def end(self, deadline: float) -> None:
        """Waits until ``deadline`` (`time.monotonic`), then kills it and all of its session."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.told_to_end = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """Closes the descriptors; the process must have ended."""
        for descriptor in (self.pidfd, self._stdin, self.stdout):
            os.close(descriptor)


class Family:
    """All children, and the signals that end them; a context manager that leaves no process behind.

    Signals are only noted, and raised where the parent listens: an exception between the fork and
    the note of the child's pid would leave a process that nobody ends.
    """

    def __init__(self, environment: Mapping[str, str], directory: Path) -> None:
        self._environment = environment
        self._directory = directory
        self._selector = selectors.DefaultSelector()
        self._signalled: list[int] = []
        self._wake_reader, self._wake_writer = socket.socketpair()
        self.members: list[Child] = []

    def __enter__(self) -> Family:
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._old_wakeup = signal.set_wakeup_fd(self._wake_writer.fileno())
        # A demo under nohup goes on when the terminal is closed.
        noted = [s for s in _SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self._old_handlers = {signum: signal.signal(signum, self._note) for signum in noted}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end_all()
        finally:
            for signum, handler in self._old_handlers.items():
                signal.signal(signum, handler)
            signal.set_wakeup_fd(self._old_wakeup)
            self._selector.close()
            self._wake_reader.close()
            self._wake_writer.close()

    def start(self, name: str, *arguments: str) -> Child:
        """Starts ``python ARGUMENTS...``."""
        child = Child(name, arguments, self._environment, self._directory / f"{name}.stderr")
        self.members.append(child)
        self._selector.register(child.stdout, selectors.EVENT_READ, child)
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        return child

    def listen(self, timeout: float) -> list[Line]:
        """What the children have to say, as soon as one of them does.

        Raises:
            Interrupted: The user wants an end.
            DemoFailed: Nobody said anything for ``timeout`` seconds.
        """
        ready = self._selector.select(timeout)
        if self._signalled:
            raise Interrupted(self._signalled[0])
        lines: list[Line] = []
        for child in dict.fromkeys(key.data for key, _ in ready if key.data is not None):
            lines.extend(self._hear(child))
        if not ready:
            raise DemoFailed(f"none of the processes said anything for {timeout:.0f} s")
        return lines

    def end(self, child: Child) -> None:
        """SIGTERM, a time of grace, SIGKILL."""
        child.ask_to_end()
        child.end(time.monotonic() + _GRACE_S)

    def obituary(self) -> str:
        """Who ended without being told to, how, and what each wrote on stderr."""
        texts = []
        for member in self.members:
            code, words = member.exit_code, member.stderr_tail()
            if code is not None and not member.told_to_end:
                how = f"by signal {-code}" if code < 0 else f"with {code}"
                texts.append(f"the {member.name} (pid {member.pid}) ended {how} before its time.\n{words}".rstrip())
            elif words:
                texts.append(f"the {member.name} (pid {member.pid}) said:\n{words}")
        return "\n".join(texts)

    def _hear(self, child: Child) -> Iterator[Line]:
        ended = child.exit_code is not None  # Asked before the pipe is read: then nothing follows.
        lines, end_of_file = child.receive()
        yield from (Line(child, text) for text in lines)
        if (ended or end_of_file) and child.stdout in self._selector.get_map():
            self._selector.unregister(child.stdout)
        if ended:
            self._selector.unregister(child.pidfd)
            yield Line(child, None)

    def _end_all(self) -> None:
        """The workers first and together, the agent that serves them (started first) last."""
        for worker in self.members[1:]:
            worker.ask_to_end()
        deadline = time.monotonic() + _GRACE_S
        for worker in self.members[1:]:
            worker.end(deadline)
        for agent in self.members[:1]:
            self.end(agent)
        for member in self.members:
            member.close()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signalled.append(signum)
