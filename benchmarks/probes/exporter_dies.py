"""Probe 2: what an importer sees when the exporter is killed, or frees and allocates again; legacy and fd.

The importer only copies a word out, now and then. A third process fills as much memory as was shared with another
word, so that pages which were given away under the importer's mapping show themselves.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

from libcuda import MIB, READ, READ_WRITE, Cuda, CudaError
from rig import FIGURES, children, receive, run, send

QUESTION = "What does an importer see when the exporter is killed, or frees and allocates again?"

SIZE = 64 * MIB
OLD, NEW, STRANGER = 0x0D0D0D0D, 0x2E2E2E2E, 0x57575757


def exporter(sock: socket.socket) -> None:
    cuda = Cuda().start()
    kind, _ = receive(sock)
    address, handle = make(cuda, kind, OLD)
    while True:
        share(cuda, sock, kind, address, handle)
        said, _ = receive(sock)
        if said == "free and allocate":
            freed = free(cuda, kind, address, handle)
            before, (address, handle) = address, make(cuda, kind, NEW)
            send(sock, {"freed": freed, "same_address": before == address})
            receive(sock)


def make(cuda: Cuda, kind: str, word: int) -> tuple[int, int]:
    if kind == "legacy":
        address, handle = cuda.allocate(SIZE), 0
    else:
        handle = cuda.create(SIZE)
        address = cuda.reserve(SIZE)
        cuda.map(address, SIZE, handle, READ_WRITE)
    cuda.fill(address, word, SIZE)
    return address, handle


def free(cuda: Cuda, kind: str, address: int, handle: int) -> str:
    if kind == "legacy":
        return cuda.attempt("cuMemFree_v2", address)
    said = [
        cuda.attempt("cuMemUnmap", address, SIZE),
        cuda.attempt("cuMemAddressFree", address, SIZE),
        cuda.attempt("cuMemRelease", handle),
    ]
    return "ok" if set(said) == {"ok"} else ", ".join(said)


def share(cuda: Cuda, sock: socket.socket, kind: str, address: int, handle: int) -> None:
    common = {"buffer_id": cuda.pointer("buffer_id", address), "block": cuda.pointer("memory_block_id", address)}
    if kind == "legacy":
        send(sock, {**common, "handle": cuda.export_legacy(address).hex()})
    else:
        fd = cuda.export_fd(handle)
        send(sock, common, [fd])
        os.close(fd)


def importer(sock: socket.socket) -> None:
    cuda = Cuda().start()
    opened: dict[str, int] = {}
    while True:
        told, fds = receive(sock)
        name = told["name"]
        if told["do"] == "open":
            try:
                opened[name] = open_shared(cuda, told.get("handle"), fds)
                send(sock, {"address": opened[name], "range": cuda.range(opened[name])[1]})
            except CudaError as error:
                send(sock, {"error": str(error)})
        elif told["do"] == "look":
            address = opened[name]
            send(sock, {"first": cuda.look(address), "last": cuda.look(address + SIZE - 4)})
        else:
            address = opened.pop(name)
            if told["kind"] == "legacy":
                said = cuda.attempt("cuIpcCloseMemHandle", address)
            else:
                said = cuda.attempt("cuMemUnmap", address, SIZE)
                cuda.attempt("cuMemAddressFree", address, SIZE)
            send(sock, {"said": said, "synchronize": cuda.attempt("cuCtxSynchronize")})


def open_shared(cuda: Cuda, handle: str | None, fds: list[int]) -> int:
    if handle is not None:
        return cuda.open_legacy(bytes.fromhex(handle))
    imported = cuda.import_fd(fds[0])
    os.close(fds[0])
    address = cuda.reserve(SIZE)
    cuda.map(address, SIZE, imported, READ)
    cuda("cuMemRelease", imported)  # the mapping keeps it
    return address


def stranger(sock: socket.socket) -> None:
    """Fills what is free, at most 4 GiB, with another word."""
    cuda = Cuda().start()
    blocks = min(64, cuda.free_bytes() // 2 // SIZE)
    for _ in range(blocks):
        cuda.fill(cuda.allocate(SIZE), STRANGER, SIZE)
    send(sock, blocks)
    receive(sock)


def main() -> str:
    cuda = Cuda().start()
    found: dict[str, Any]
    figures = FIGURES
    figures.update(word_of_exporter=hex(OLD), after_realloc=hex(NEW), of_stranger=hex(STRANGER))
    for kind in ("legacy", "fd"):
        for what, case in (("exporter killed", kill), ("freed and allocated again", reallocate)):
            found = figures[f"{kind}, {what}"] = {"free_before": cuda.free_bytes()}
            try:
                case(cuda, kind, found)
            except (EOFError, TimeoutError) as error:
                found["failed"] = str(error)
            found["free_after_all"] = cuda.free_bytes()
    return summary(figures)


def kill(cuda: Cuda, kind: str, found: dict[str, Any]) -> None:
    with children("exporter", "importer") as (source, reader):
        offer, fds = begin(source, kind)
        ask(reader, found, "open", {"do": "open", **offer}, fds)
        ask(reader, found, "before", {"do": "look"})
        found["exporter_gone_after"] = source.kill()
        found["free_after_kill"] = cuda.free_bytes()
        ask(reader, found, "after the kill", {"do": "look"})
        with children("stranger") as (other,):
            found["stranger_blocks"] = other.hear(15)
            ask(reader, found, "with a stranger's memory", {"do": "look"})
        ask(reader, found, "close", {"do": "close", "kind": kind})
        found["free_after_close"] = cuda.free_bytes()


def reallocate(cuda: Cuda, kind: str, found: dict[str, Any]) -> None:
    with children("exporter", "importer") as (source, reader):
        offer, fds = begin(source, kind)
        ask(reader, found, "open", {"do": "open", **offer}, fds)
        found["exporter"] = source.ask("free and allocate", 10)
        ask(reader, found, "after", {"do": "look"})
        source.send("go on")
        again, fds = source.hear_with_fds(10)
        found["same_handle_bytes"] = again.get("handle") == offer.get("handle") if kind == "legacy" else None
        found["same_buffer_id"] = again["buffer_id"] == offer["buffer_id"]
        found["same_block_id"] = again["block"] == offer["block"]
        ask(reader, found, "open again", {"do": "open", **again}, fds, name="second")
        if "address" in found["open again"]:
            found["same_address_in_importer"] = found["open"].get("address") == found["open again"]["address"]
            ask(reader, found, "through the second", {"do": "look"}, name="second")
            ask(reader, found, "close second", {"do": "close", "kind": kind}, name="second")
        ask(reader, found, "close", {"do": "close", "kind": kind})


def begin(source: Any, kind: str) -> tuple[dict[str, Any], list[int]]:
    source.send(kind)
    offer, fds = source.hear_with_fds(15)
    return offer, fds


def ask(
    reader: Any,
    found: dict[str, Any],
    key: str,
    what: dict[str, Any],
    fds: list[int] | None = None,
    name: str = "first",
) -> None:
    with contextlib.ExitStack() as stack:
        for fd in fds or ():
            stack.callback(os.close, fd)
        found[key] = reader.ask({"name": name, **what}, 10, fds or ())


def summary(figures: dict[str, Any]) -> str:
    parts = []
    for key, found in figures.items():
        if isinstance(found, dict):
            looks = {
                when: found[when]["first"] for when in found if isinstance(found[when], dict) and "first" in found[when]
            }
            parts.append(f"{key}: {found.get('failed') or looks}")
    return "; ".join(parts)


if __name__ == "__main__":
    roles = {"exporter": exporter, "importer": importer, "stranger": stranger}
    run("exporter_dies", QUESTION, main, roles, seconds=55)
