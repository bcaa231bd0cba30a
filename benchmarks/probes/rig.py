"""The frame of a probe: child processes that die with it, a deadline that holds, and an answer that is said once."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from libcuda import ATTRIBUTES, Cuda, NoCuda

FAILED, OUT_OF_TIME = 1, 3
"""Exit statuses beside 0, which means answered, or skipped by name."""

# -- child processes ----------------------------------------------------------------------------------------------


class Child:
    """A process of this probe's own script, and the socket to it. It dies with the probe."""

    def __init__(self, role: str, environment: dict[str, str | None] | None = None) -> None:
        changed = {**os.environ, **(environment or {})}
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.role = role
        with theirs:
            command = [sys.executable, os.path.abspath(sys.argv[0]), "--child", role, str(theirs.fileno())]
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={name: value for name, value in changed.items() if value is not None},
            )
        _children.append(self)

    def send(self, message: object, fds: Sequence[int] = ()) -> None:
        """Tell it something; `EOFError` where it has ended."""
        try:
            send(self.socket, message, fds)
        except ConnectionError as error:
            raise EOFError(f"child {self.role!r} ended with status {self.end()}") from error

    def hear(self, timeout: float) -> Any:
        """Its next message; `TimeoutError` or `EOFError` where there is none."""
        return self.hear_with_fds(timeout)[0]

    def hear_with_fds(self, timeout: float) -> tuple[Any, list[int]]:
        self.socket.settimeout(timeout)
        try:
            return receive(self.socket)
        except TimeoutError as error:
            raise TimeoutError(f"child {self.role!r} said nothing for {timeout} s") from error
        except (EOFError, ConnectionError) as error:
            raise EOFError(f"child {self.role!r} ended with status {self.end()}") from error

    def ask(self, message: object, timeout: float, fds: Sequence[int] = ()) -> Any:
        self.send(message, fds)
        return self.hear(timeout)

    def kill(self) -> float:
        """SIGKILL it; seconds until it was gone, or `TimeoutError`: a driver may hold it."""
        start = time.monotonic()
        self.process.kill()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"child {self.role!r} was not gone 20 s after its SIGKILL") from error
        return round(time.monotonic() - start, 3)

    def end(self) -> int | None:
        """Hang up and let it end by itself, for a while."""
        self.socket.close()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(10)


_children: list[Child] = []


def send(sock: socket.socket, message: object, fds: Sequence[int] = ()) -> None:
    """One JSON message of at most 128 KiB, with descriptors."""
    socket.send_fds(sock, [json.dumps(message).encode()], list(fds))


def receive(sock: socket.socket) -> tuple[Any, list[int]]:
    """One message and its descriptors; `EOFError` at the end."""
    data, fds, flags, _ = socket.recv_fds(sock, 1 << 17, 253)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise ValueError("a message was cut short")
    if not data:
        raise EOFError
    return json.loads(data), fds


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGKILL))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(OUT_OF_TIME)


@contextlib.contextmanager
def children(*roles: str) -> Iterator[list[Child]]:
    """Start children and see that none is left."""
    made: list[Child] = []
    try:
        for role in roles:
            made.append(Child(role))  # noqa: PERF401 - what was started must be known if one fails
        yield made
    finally:
        for child in made:
            child.kill()
            child.socket.close()


# -- the frame of a probe -----------------------------------------------------------------------------------------


class Skip(Exception):
    """The probe cannot ask its question here; the text says why."""


FIGURES: dict[str, Any] = {}
"""What this probe has measured so far: what is in it is reported also when time runs out or something fails."""


def run(
    name: str,
    question: str,
    ask: Callable[[], str],
    roles: Mapping[str, Callable[[socket.socket], None]] | None = None,
    *,
    seconds: float = 55.0,
) -> NoReturn:
    """Be the probe, or one of its children, as the command line says; ends the process.

    Args:
        name: of the probe: its script's name without suffix.
        question: one sentence.
        ask: finds the answer, puts what it measures into `FIGURES`, and says it in a line.
        roles: what children do, by role; each gets the socket to the probe.
        seconds: after which it is ended with all of its children.
    """
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--out", type=Path, help="directory for the answer as JSON; $OUT if that is set")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        role, number = arguments.child
        _die_with(os.getppid())
        _watch(seconds, None)
        with socket.socket(fileno=int(number)) as sock, contextlib.suppress(EOFError, ConnectionError):
            (roles or {})[role](sock)
        os._exit(0)  # a context may be broken on purpose; its destructors have nothing to say
    out = arguments.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    record: dict[str, Any] = {"probe": name, "question": question, "status": "failed", "figures": FIGURES}
    late = {"status": "out of time", "answer": f"no answer within {seconds} s"}
    _watch(seconds, lambda: _finish({**record, **late}, out))
    start = time.monotonic()
    status = 0
    try:
        record["answer"] = ask()
        record["status"] = "answered"
    except (NoCuda, Skip) as reason:
        record.update(status="skipped", answer=f"skipped: {reason}")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what this probe has to report
        record["answer"] = f"failed: {type(error).__name__}: {error}"
        status = FAILED
    record["seconds"] = round(time.monotonic() - start, 2)
    _finish(record, out)
    os._exit(status)


_finishing = threading.Lock()


def _finish(record: dict[str, Any], out: Path | None) -> None:
    """End the children, say the answer once, and write it down."""
    if not _finishing.acquire(blocking=False):
        threading.Event().wait()  # the other thread ends the process
    for child in _children:
        if child.process.poll() is None:
            child.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold it for a while
                child.process.wait(5)
    text = json.dumps(record)
    print(f"{record['probe']}: {record['answer']}")
    print(text, flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"probe-{record['probe']}.json").write_text(json.dumps(json.loads(text), indent=1) + "\n")


def _watch(seconds: float, last_words: Callable[[], None] | None) -> None:
    """End the process after so long, also while the main thread is stuck in the driver: ctypes releases the GIL."""

    def end() -> None:
        try:
            if last_words is not None:
                last_words()
        finally:
            os._exit(OUT_OF_TIME)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def machine() -> dict[str, Any]:
    """Who answers: device, driver, kernel and the versions of what is installed. Loads neither torch nor CuPy."""
    from importlib import metadata

    found: dict[str, Any] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "uid": os.getuid(),
    }
    for package in ("torch", "cuda-bindings", "cupy-cuda12x", "cupy-cuda13x", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    with contextlib.suppress(OSError):
        found["nvidia_module"] = Path("/sys/module/nvidia/version").read_text().strip()
    try:
        cuda = Cuda().start()
    except NoCuda as reason:
        found["device"] = None
        found["reason"] = str(reason)
        return found
    found["device"] = cuda.name()
    found["cuda_of_driver"] = cuda.version()
    found["free_bytes"] = cuda.free_bytes()
    found["attributes"] = {name: cuda.attribute(name) for name in ATTRIBUTES}
    return found
