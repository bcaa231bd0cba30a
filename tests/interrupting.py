"""Ctrl-C at every point where Python can be interrupted, for workers of `test_interrupts`.

`at_point` runs a call and raises `KeyboardInterrupt` in etha's own code just where CPython 3.11 looks for signals:
when a Python function begins (``RESUME``), when a loop goes round (``JUMP_BACKWARD``), and when a call into C has
returned. The k-th such point of an operation is reached in run k, until a run completes. What the kernel interrupts
(a wait) is left to real signals: `at_random`.
"""

from __future__ import annotations

import dis
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import etha

_ROOT = str(Path(etha.__file__).parent)
_LOOKS = {"RESUME", "JUMP_BACKWARD", "POP_JUMP_BACKWARD_IF_TRUE", "POP_JUMP_BACKWARD_IF_FALSE"}
_CALLS = {"CALL", "CALL_FUNCTION_EX"}
_names: dict[object, dict[int, str]] = {}


def _opname(code, offset: int) -> str:
    if code not in _names:
        _names[code] = {each.offset: each.opname for each in dis.get_instructions(code)}
    return _names[code][offset]


class _Tracer:
    """Counts the points of this thread, and raises at one."""

    def __init__(self, point: int) -> None:
        self.left = point
        self.where = ""
        self._called_c = None

    def enter(self, frame, event: str, _):
        if not frame.f_code.co_filename.startswith(_ROOT):
            self._called_c = None
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        self._called_c = None
        return self.step

    def step(self, frame, event: str, _):
        if event != "opcode":
            self._called_c = None
            return self.step
        name = _opname(frame.f_code, frame.f_lasti)
        # A call that was followed by no event of another frame went into C.
        here = self._called_c is frame or name in _LOOKS
        self._called_c = frame if name in _CALLS else None
        if here:
            self.left -= 1
            if self.left == 0:
                self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.step


def at_point(call: Callable, point: int) -> str:
    """Run ``call`` with an interrupt at its k-th point; where that was, or "" when it has fewer."""
    tracer = _Tracer(point)
    sys.settrace(tracer.enter)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return tracer.where


class Sender:
    """A thread that sends this process SIGINT some nanoseconds after it was told to."""

    def __init__(self) -> None:
        self._go = threading.Event()
        self._done = threading.Event()
        self._delay = 0
        self._ended = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while self._go.wait() and not self._ended:
            self._go.clear()
            moment = time.monotonic_ns() + self._delay
            while time.monotonic_ns() < moment:
                os.sched_yield()
            os.kill(os.getpid(), signal.SIGINT)
            self._done.set()

    def at_random(self, call: Callable, delay: int) -> bool:
        """Run ``call``, interrupted after ``delay`` ns; whether it was cut short, and not done by then."""
        self._delay = delay
        self._done.clear()
        finished = False
        try:
            self._go.set()
            call()
            finished = True
            while not self._done.wait(1):
                pass  # the signal is on its way: it ends this loop
            # By kill(2) it has been delivered. Unless a finaliser was running, which swallows it, it is raised in here.
            for _ in range(100):
                pass
        except KeyboardInterrupt:
            return not finished
        return False

    def end(self) -> None:
        self._ended = True
        self._go.set()
        self._thread.join()
