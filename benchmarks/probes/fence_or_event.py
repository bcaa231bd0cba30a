"""Probe 1: who waits for whom, and who is let go, when the process that was to signal is killed.

A queues a kernel of 5 s and then a signal: an interprocess event, or a 64-bit write to a slot in shared host memory.
B's stream waits for it. After 1 s A is SIGKILLed. Does B's stream end? By itself, or when somebody stores a huge value
in A's slot? Asked in both directions: A exports what B opened (A owns, B reads), and B exports what A opened.

Beside it, per mechanism, a run in which nobody is killed: B must end with A's kernel and not before, else the rest
says nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import time
from typing import Any

from libcuda import MIB, Cuda, CudaError, IpcHandle
from rig import FIGURES, Child, Skip, children, receive, run, send
from slots import RELEASED, Slots, sealed_memfd

QUESTION = "When the process that was to signal is killed, does the stream that waits for it end?"

SLOTS = 4096
KERNEL_NS = 5_000_000_000
CONTROL_NS = 500_000_000
KILL_AFTER = 1.0
WATCH = 5.5
"""Seconds after the kill: the kernel would have ended 4 s after it."""

SIGNAL = 7
"""The value written and awaited."""


def worker(sock: socket.socket) -> None:
    """Either side. First ``setup``, then what it is told, one word at a time."""
    cuda = Cuda().start()
    cuda.load()
    stream = cuda.stream()
    told, fds = receive(sock)
    slots: Slots | None = None
    event = None
    if told["mechanism"] == "fence":
        slots = Slots(cuda, fds[0], SLOTS)
    answer: dict[str, Any] = {}
    if told["exports"]:
        memory = cuda.allocate(MIB)
        cuda.fill(memory, 0, MIB)
        answer["memory"] = cuda.export_legacy(memory).hex()
        if told["mechanism"] == "event":
            event = cuda.event(6)
            handle = IpcHandle()
            cuda("cuIpcGetEventHandle", handle, event)
            answer["event"] = bytes(handle.reserved).hex()
    else:
        memory = cuda.open_legacy(bytes.fromhex(told["memory"]))
        if told["mechanism"] == "event":
            event = ctypes.c_void_p()
            cuda("cuIpcOpenEventHandle", event, IpcHandle.from_buffer_copy(bytes.fromhex(told["event"])))
    send(sock, answer)
    scratch = cuda.allocate(4)
    while True:
        said, _ = receive(sock)
        if said == "queue":  # A: kernel, then signal
            cuda.launch("spin", stream, told["nanoseconds"])
            cuda.launch("move", stream, memory, scratch)
            if slots is not None:
                slots.signal(stream, 0, SIGNAL)
            else:
                cuda("cuEventRecord", event, stream)
            send(sock, "queued")
        elif said == "wait":  # B: wait, then a kernel; what memory of the dead gives is another probe's question
            if slots is not None:
                slots.wait(stream, 0, SIGNAL)
            else:
                cuda("cuStreamWaitEvent", stream, event, 0)
            cuda.launch("nothing", stream)
            send(sock, "waiting")
        elif said == "query":
            try:
                send(sock, "done" if cuda.done(stream) else "waiting")
            except CudaError as error:
                send(sock, error.name)
        elif said == "use":  # is the context of the survivor still good?
            send(sock, cuda.attempt("cuMemsetD32_v2", scratch, 1, 1))


def main() -> str:
    cuda = Cuda().start()
    figures = FIGURES
    for name in ("stream_memory_operations_64_bit", "ipc_events", "host_pointer_for_registered"):
        figures[name] = cuda.attribute(name)
    fd = sealed_memfd(SLOTS)
    try:
        slots = Slots(cuda, fd, SLOTS)
        figures["register_sealed_memfd"] = "ok"
        figures["device_pointer_is_host_pointer"] = slots.host == slots.device
        stream = cuda.stream()
        slots.signal(stream, 1, 2**40 + 1)
        cuda("cuStreamSynchronize", stream)
        figures["write_reaches_host"] = slots.read(1) == 2**40 + 1
        # The two ends of the cyclic comparison, on this very device.
        for name, value in (("released_value_passes", RELEASED), ("all_ones_passes", 2**64 - 1)):
            slots.store(2, value)
            other = cuda.stream()
            slots.wait(other, 2, 5)
            figures[name] = cuda.done_within(other, 0.5) is not None
            slots.store(2, 5)
            cuda("cuStreamSynchronize", other)
    except CudaError as error:
        figures["register_sealed_memfd"] = str(error)
        slots = None
    cases = []
    for mechanism in ("fence", "event"):
        if mechanism == "fence" and slots is None:
            continue
        cases.append((mechanism, "A exports", False))
        cases.append((mechanism, "A exports", True))
        cases.append((mechanism, "B exports", True))
    if not cases:
        raise Skip("neither mechanism is there")
    for mechanism, direction, killed in cases:
        key = f"{mechanism}, {direction}, {'A killed' if killed else 'nobody killed'}"
        try:
            figures[key] = case(mechanism, direction, killed)
        except (EOFError, TimeoutError) as error:
            figures[key] = {"failed": str(error)}
    os.close(fd)
    return summary(figures)


def case(mechanism: str, direction: str, killed: bool) -> dict[str, Any]:
    """One run with two processes of its own."""
    found: dict[str, Any] = {}
    fd = sealed_memfd(SLOTS)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        first, second = stack.enter_context(children("worker", "worker"))
        a, b = (first, second) if direction == "A exports" else (second, first)
        told = {"mechanism": mechanism, "nanoseconds": KERNEL_NS if killed else CONTROL_NS}
        shared = first.ask({**told, "exports": True}, 15, [fd] if mechanism == "fence" else [])
        second.ask({**told, **shared, "exports": False}, 15, [fd] if mechanism == "fence" else [])
        a.ask("queue", 10)
        queued = time.monotonic()
        b.ask("wait", 10)
        if not killed:
            ended = follow(b, 5.0)
            found["b_ended_after"] = None if ended is None else round(time.monotonic() - queued, 3)
            found["b"] = ended
            return found
        early = follow(b, KILL_AFTER - (time.monotonic() - queued))
        found["b_before_the_kill"] = early or "waiting"
        found["a_gone_after"] = a.kill()
        start = time.monotonic()
        ended = follow(b, WATCH)
        found["b"] = ended or "still waiting"
        if ended:
            found["b_ended_after_kill"] = round(time.monotonic() - start, 3)
        if mechanism == "fence":
            found["slot_after"] = peek(fd)
            if not ended:
                poke(fd, RELEASED)
                start = time.monotonic()
                found["b_after_release"] = follow(b, 2.0) or "still waiting"
                found["b_ended_after_release"] = round(time.monotonic() - start, 3)
                found["slot_stays_released"] = peek(fd) == RELEASED
        found["b_context"] = (
            b.ask("use", 5) if "waiting" not in found.get("b_after_release", found["b"]) else "not asked"
        )
    return found


def follow(child: Child, seconds: float) -> str | None:
    """What ended its stream, ``"done"`` or an error, or None if it still waits."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        said = child.ask("query", 10)
        if said != "waiting":
            return str(said)
        time.sleep(0.005)
    return None


def peek(fd: int) -> int:
    return int.from_bytes(os.pread(fd, 8, 0), "little")


def poke(fd: int, value: int) -> None:
    os.pwrite(fd, value.to_bytes(8, "little"), 0)


def summary(figures: dict[str, Any]) -> str:
    parts = [f"sealed memfd registers: {figures['register_sealed_memfd']}"]
    for key, found in figures.items():
        if isinstance(found, dict) and "A killed" in key:
            text = found.get("failed") or f"B {found['b']}"
            if "b_after_release" in found:
                text += f", released by hand: {found['b_after_release']}"
            parts.append(f"{key}: {text}")
    return "; ".join(parts)


if __name__ == "__main__":
    run("fence_or_event", QUESTION, main, {"worker": worker}, seconds=58)
