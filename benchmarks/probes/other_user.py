"""Probe 4: can a process of another user open a legacy handle from its bytes alone?

A child that has become another user (it needs root for that) gets the 64 bytes and tries. A child of the same user is
the control: if that fails too, the answer says nothing. The other user's child also tries an fd that it was sent, which
is meant to work: whoever has the descriptor has the memory.
"""

from __future__ import annotations

import ctypes
import os
import socket
from typing import Any

from libcuda import MIB, READ, READ_WRITE, Cuda, CudaError, NoCuda
from rig import FIGURES, Skip, children, receive, run, send

QUESTION = "Can another user open a legacy handle from its bytes?"

SIZE = 2 * MIB
WORD = 0x5EC2E700
NOBODY = 65534


def opener(sock: socket.socket) -> None:
    cuda = Cuda()  # the library is loaded while its files can surely be read
    told, fds = receive(sock)
    found: dict[str, Any] = {}
    if told["uid"] is not None:
        os.setgroups([])
        os.setresgid(told["uid"], told["uid"], told["uid"])
        os.setresuid(told["uid"], told["uid"], told["uid"])
        # A change of user makes /proc/self root's, which the driver reads.
        ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE
    found["uid"] = os.getuid()
    try:
        cuda.start()
    except NoCuda as reason:
        send(sock, {**found, "failed": f"has no device at all: {reason}"})
        return
    try:
        address = cuda.open_legacy(bytes.fromhex(told["handle"]))
        found["legacy"] = f"opened, reads {cuda.look(address)}"
    except CudaError as error:
        found["legacy"] = str(error)
    try:
        imported = cuda.import_fd(fds[0])
        address = cuda.reserve(SIZE)
        cuda.map(address, SIZE, imported, READ)
        found["fd"] = f"opened, reads {cuda.look(address)}"
    except CudaError as error:
        found["fd"] = str(error)
    send(sock, found)


def main() -> str:
    cuda = Cuda().start()
    if os.getuid() != 0:
        raise Skip("needs root, to become another user")
    size = max(SIZE, cuda.granularity())
    address = cuda.allocate(size)
    cuda.fill(address, WORD, size)
    handle = cuda.create(size)
    mapped = cuda.reserve(size)
    cuda.map(mapped, size, handle, READ_WRITE)
    cuda.fill(mapped, WORD, size)
    figures = FIGURES
    figures["word"] = hex(WORD)
    for name, uid in (("same user", None), ("another user", NOBODY)):
        with children("opener") as (child,):
            fd = cuda.export_fd(handle)
            told = {"uid": uid, "handle": cuda.export_legacy(address).hex()}
            try:
                figures[name] = child.ask(told, 20, [fd])
            except (EOFError, TimeoutError) as error:
                figures[name] = {"failed": str(error)}
            os.close(fd)
    parts = [f"{name}: {found.get('failed') or found['legacy']}" for name, found in figures.items() if name != "word"]
    return "; ".join(parts)


if __name__ == "__main__":
    run("other_user", QUESTION, main, {"opener": opener}, seconds=50)
