"""Real agents and real workers, as processes. A test that ends leaves none of them, and nothing in the runtime
directory.

Workers talk to their test in lines: a test sends a Python statement, the worker runs it in one namespace and answers
with the value of the last expression if that is a literal, or with the error's class and fields. Nothing sleeps:
whoever waits, waits for a line, a descriptor, or a process's end.
"""

from __future__ import annotations

import ast
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from zygote import zygote

PATIENCE = 60.0
"""Seconds after which a test has failed, whatever it waits for."""

WORKER = """
import ast, sys, traceback
from etha.errors import EthaError
names = {"__name__": "worker"}
for line in sys.stdin:
    source = ast.literal_eval(line)
    try:
        tree = ast.parse(source)
        value = None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
            exec(compile(tree, "<worker>", "exec"), names)
            value = eval(compile(last, "<worker>", "eval"), names)
        else:
            exec(compile(tree, "<worker>", "exec"), names)
        try:
            ast.literal_eval(repr(value))
        except (SyntaxError, ValueError):
            value = None
        answer = ("ok", value)
    except EthaError as error:
        answer = ("raised", type(error).__name__, str(error), error.resource, error.holder)
    except BaseException as error:
        answer = ("raised", type(error).__name__, traceback.format_exc(), None, None)
    print(repr(answer), flush=True)
"""

PRELUDE = """
import os, sys, threading, time, gc, signal, select
import torch
torch.set_num_threads(1)
import etha
from etha import TensorBusClient, bootstrap_client
"""


class Raised(Exception):
    """A worker's statement raised."""

    def __init__(self, kind: str, text: str, resource: str | None, holder: str | None) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.resource = resource
        self.holder = holder


class Worker:
    """A process that runs what its test says, line by line."""

    def __init__(self, environment: dict[str, str], directory: Path) -> None:
        self.errors = directory / f"worker-{time.monotonic_ns()}.stderr"
        with self.errors.open("wb") as stderr:
            self.process = self.begin(environment, stderr.fileno())
        self.pid = self.process.pid
        self._buffer = b""

    def begin(self, environment: dict[str, str], stderr: int):
        """Start the process."""
        return zygote().fork(environment, stderr)

    def say(self, source: str) -> None:
        """Send a statement without waiting for its end."""
        self.process.stdin.write((repr(source) + "\n").encode())
        self.process.stdin.flush()

    def hear(self, timeout: float = PATIENCE):
        """The value of the statement sent; raises `Raised` where it raised."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"worker {self.pid} said nothing for {timeout} s")
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                raise EOFError(f"worker {self.pid} ended: {self.process.wait()}: {self.errors.read_text()}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer = ast.literal_eval(line.decode())
        if answer[0] == "raised":
            raise Raised(*answer[1:])
        return answer[1]

    def heard(self) -> bool:
        """Whether an answer has come already."""
        return b"\n" in self._buffer or bool(select.select([self.process.stdout], [], [], 0)[0])

    def do(self, source: str, timeout: float = PATIENCE):
        """Run a statement; the value of its last expression."""
        self.say(source)
        return self.hear(timeout)

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Let it end by itself, as a program does."""
        self.process.stdin.close()
        status = self.process.wait(PATIENCE)
        self.process.stdout.close()
        return status

    def destroy(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.send_signal(signal.SIGCONT)
        self.process.wait(PATIENCE)
        self.process.stdout.close()
        if not self.process.stdin.closed:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass


class Agent:
    """``etha agent``, as its own process."""

    command = (sys.executable, "-m", "etha", "agent")

    def __init__(self, environment: dict[str, str], directory: Path, *arguments: str) -> None:
        self.errors = directory / f"agent-{time.monotonic_ns()}.stderr"
        with self.errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*self.command, *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                text=True,
            )
        self.pid = self.process.pid
        self.line = self.process.stdout.readline()
        if "serves" not in self.line:
            self.process.wait(PATIENCE)
            self.process.stdout.close()
            status = self.process.returncode
            raise RuntimeError(f"the agent did not start, status {status}: {self.errors.read_text()}")

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        status = self.process.wait(PATIENCE)
        self.process.stdout.close()
        return status


OWNER = """
weights = torch.zeros(1024).share_memory_()
policy = client.register_tensors("policy", {"weights": weights})
"""

READER = """
policy = client.subscribe("policy")
"""
