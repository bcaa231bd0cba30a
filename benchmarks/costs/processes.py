"""Processes of a measurement: forked helpers that are spoken to in packets, an agent, and their runtime directory.

A helper is forked, not started anew: importing torch costs seconds. It ends with its parent, whatever ends that.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from etha import TensorBusClient

PATIENCE: Final = 120.0
"""Seconds after which a helper that does not answer has failed."""

_PR_SET_PDEATHSIG: Final = 1
_MAX_PACKET: Final = 1 << 20
_libc = ctypes.CDLL(None)


class Talk:
    """One end of a conversation in JSON packets."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def say(self, value: Any) -> None:
        """Send a value."""
        self.sock.send(msgspec.json.encode(value))

    def hear(self, timeout: float | None = None) -> Any:
        """The next value.

        Raises:
            EOFError: the other end is gone.
            TimeoutError: nothing came.
        """
        if timeout is not None and not select.select([self.sock], [], [], timeout)[0]:
            raise TimeoutError(f"a helper said nothing for {timeout} s")
        data = self.sock.recv(_MAX_PACKET)
        if not data:
            raise EOFError("a helper has ended")
        return msgspec.json.decode(data)

    def waiting(self) -> bool:
        """Whether a value, or the end, has come."""
        return bool(select.select([self.sock], [], [], 0)[0])


class Helper:
    """A forked process that runs ``work(talk, *arguments)``. A context manager: it is killed at its end."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _run(work, Talk(theirs), arguments)
        theirs.close()
        self.talk = Talk(ours)
        self.pidfd = os.pidfd_open(self.pid)
        self._ended = False

    def ask(self, value: Any = None) -> Any:
        """Say something, and hear the answer."""
        self.talk.say(value)
        return self.hear()

    def hear(self) -> Any:
        """What it says next."""
        return self.talk.hear(PATIENCE)

    def kill(self) -> None:
        """SIGKILL; does not wait."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """End it, and wait for that."""
        if not self._ended:
            self._ended = True
            self.talk.sock.close()
            self.kill()
            os.waitpid(self.pid, 0)
            os.close(self.pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _run(work: Callable[..., None], talk: Talk, arguments: tuple[Any, ...]) -> None:
    status = 1
    try:
        die_with_parent()
        gc.freeze()
        work(talk, *arguments)
        status = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0  # the parent has heard enough
    except BaseException:  # noqa: BLE001 - a forked child must never run on into what its parent does next
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def die_with_parent() -> None:
    """This process is killed when its parent ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Box:
    """A runtime directory and the agent that serves it; a context manager.

    Helpers that are forked inside find it by the environment. It is the place of temporary files too, and goes with all
    that they left there: `multiprocessing` clears up only in a process that ends by itself.
    """

    def __init__(self, device: str = "cpu") -> None:
        """What the agent is to serve."""
        self._device = device

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="etha-bench-"))
        os.environ["ETHA_RUNTIME_DIR"] = str(self.directory)
        self._before, tempfile.tempdir = tempfile.tempdir, str(self.directory)
        try:
            self.agent = self.start_agent()
        except BaseException:
            self._clear()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.agent.kill()
        self.agent.wait()
        self._clear()

    def _clear(self) -> None:
        tempfile.tempdir = self._before
        shutil.rmtree(self.directory)

    def start_agent(self) -> subprocess.Popen[str]:
        """Start ``etha agent``, and return once it serves. `Box.agent` is whoever is assigned to it.

        Raises:
            RuntimeError: it does not.
        """
        agent = subprocess.Popen(
            [sys.executable, "-m", "etha", "agent", "--rank", "0", "--device", self._device],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )
        with agent.stdout as out:  # type: ignore[union-attr]
            line = out.readline()
        if "serves" not in line:
            agent.kill()
            agent.wait()
            raise RuntimeError("the agent did not start; see what it says above")
        return agent


def client() -> TensorBusClient:
    """A client of the box's agent."""
    return TensorBusClient(0, connection_timeout=PATIENCE)
