"""Probe 7: what a write to memory that is mapped read-only does, to the writer and to the owner.

Only with ``ETHA_GPU_FAULTS=1``, and never under MPS, where one client's fault ends the others too. Every write is made
by a throw-away child. Afterwards the owner, who lives in another process, must still compute, and its bytes be as they
were.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from libcuda import READ, READ_WRITE, Cuda, CudaError
from rig import FIGURES, Skip, children, receive, run, send

QUESTION = "What does a write through a read-only mapping do?"

WORD, OTHER = 0x600DDA7A, 0xBADBADBA
WAYS = ("read", "copy from the host", "copy on the device", "kernel")


def owner(sock: socket.socket) -> None:
    cuda = Cuda().start()
    size = cuda.granularity()
    handle = cuda.create(size)
    address = cuda.reserve(size)
    cuda.map(address, size, handle, READ_WRITE)
    cuda.fill(address, WORD, size)
    fd = cuda.export_fd(handle)
    send(sock, size, [fd])
    while True:
        receive(sock)
        try:
            cuda.fill(address + size // 2, 1, 4)
            send(sock, {"computes": "ok", "word": cuda.look(address)})
        except CudaError as error:
            send(sock, {"computes": str(error), "word": cuda.look(address)})


def writer(sock: socket.socket) -> None:
    cuda = Cuda().start()
    cuda.load()
    (way, size), fds = receive(sock)
    imported = cuda.import_fd(fds[0])
    address = cuda.reserve(size)
    cuda.map(address, size, imported, READ)
    scratch = cuda.allocate(4)
    cuda.fill(scratch, OTHER, 4)
    stream = cuda.stream()
    found: dict[str, Any] = {}
    try:
        if way == "read":
            cuda.launch("move", stream, scratch, address)
        elif way == "copy from the host":
            word = OTHER.to_bytes(4, "little")
            cuda("cuMemcpyHtoD_v2", address, word, 4)
        elif way == "copy on the device":
            cuda("cuMemcpyDtoDAsync_v2", address, scratch, 4, stream)
        else:
            cuda.launch("move", stream, address, scratch)
        found["call"] = "ok"
    except CudaError as error:
        found["call"] = str(error)
    found["stream"] = cuda.attempt("cuStreamSynchronize", stream)
    found["reads_afterwards"] = cuda.look(scratch if way == "read" else address)
    found["context_afterwards"] = cuda.attempt("cuCtxSynchronize")
    send(sock, found)


def main() -> str:
    Cuda().start()
    if os.environ.get("ETHA_GPU_FAULTS") != "1":
        raise Skip("it makes the device fault on purpose; allow that with ETHA_GPU_FAULTS=1")
    pipe = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    if pipe.exists():
        raise Skip(f"MPS may be running ({pipe} exists), and a fault would end its other clients")
    figures = FIGURES
    figures["word"] = hex(WORD)
    with children("owner") as (source,):
        size, fds = source.hear_with_fds(20)
        for way in WAYS:
            with children("writer") as (child,):
                try:
                    figures[way] = child.ask((way, size), 20, fds)
                except (EOFError, TimeoutError) as error:
                    figures[way] = {"failed": str(error)}
            try:
                figures[way]["owner"] = source.ask("look", 10)
            except (EOFError, TimeoutError) as error:
                figures[way]["owner"] = {"failed": str(error)}
                break
        for fd in fds:
            os.close(fd)
    return summary(figures)


def summary(figures: dict[str, Any]) -> str:
    parts = []
    for way in WAYS:
        found = figures.get(way, {"failed": "not tried"})
        if "failed" in found:
            parts.append(f"{way}: {found['failed']}")
        else:
            parts.append(f"{way}: call {found['call']}, stream {found['stream']}, owner {found['owner']}")
    return "; ".join(parts)


if __name__ == "__main__":
    run("read_only_fault", QUESTION, main, {"owner": owner, "writer": writer}, seconds=50)
