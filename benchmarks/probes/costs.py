"""Probe 5: what export, open and close cost, by size, count and kind; between two processes.

Export is timed in the owner, open and close in the reader. For fds, export is retain, export and release per chunk,
and open is import and release per chunk, one reservation, and a mapping and its access per chunk. Sending the
descriptors is not in it. Medians of `REPEATS`; each round opens anew, so nothing comes from the driver's count of
opened handles.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from typing import Any

from libcuda import MIB, READ, READ_WRITE, Cuda, median
from rig import FIGURES, children, receive, run, send

QUESTION = "What do export, open and close cost, by size, count and kind?"

REPEATS = 5
PACKET = 200
"""Descriptors in one packet; the kernel's limit is 253."""

CASES = (
    *(("legacy", 1, size * MIB) for size in (2, 64, 1024, 8192)),
    *(("legacy", count, 2 * MIB) for count in (10, 100, 800)),
    *(("fd", 1, size * MIB) for size in (2, 64, 1024, 8192)),
    *(("fd", count, 2 * MIB) for count in (10, 100, 800)),
    ("fd", 800, 20 * MIB),
)
"""Kind, how many allocations or chunks, and bytes of each. 20 MiB is what torch maps at a time in a large segment."""


def owner(sock: socket.socket) -> None:
    cuda = Cuda().start()
    limit()
    while True:
        (kind, count, size), _ = receive(sock)
        handles: list[int] = []
        if kind == "legacy":
            addresses = [cuda.allocate(size) for _ in range(count)]
        else:
            base = cuda.reserve(count * size)
            addresses = [base + index * size for index in range(count)]
            for address in addresses:
                handles.append(cuda.create(size))
                cuda.map(address, size, handles[-1], READ_WRITE)
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            exported: list[Any] = [(export(cuda, kind, address)) for address in addresses]
            times.append(time.perf_counter() - start)
            if kind == "legacy":
                for first in range(0, count, PACKET):
                    send(sock, [handle.hex() for handle in exported[first : first + PACKET]])
            else:
                for first in range(0, count, PACKET):
                    send(sock, None, exported[first : first + PACKET])
                for fd in exported:
                    os.close(fd)
            receive(sock)
        send(sock, median(times))
        receive(sock)  # the reader has closed all
        for address in addresses:
            if kind == "legacy":
                cuda("cuMemFree_v2", address)
            else:
                cuda("cuMemUnmap", address, size)
        for handle in handles:
            cuda("cuMemRelease", handle)
        if kind == "fd":
            cuda("cuMemAddressFree", base, count * size)


def export(cuda: Cuda, kind: str, address: int) -> bytes | int:
    if kind == "legacy":
        return cuda.export_legacy(address)
    handle = cuda.retain(address)
    fd = cuda.export_fd(handle)
    cuda("cuMemRelease", handle)
    return fd


def limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> str:
    cuda = Cuda().start()
    limit()
    figures = FIGURES
    figures["rows"] = []
    began = time.monotonic()
    with children("owner") as (child,):
        for kind, count, size in CASES:
            row: dict[str, Any] = {"kind": kind, "count": count, "size": size}
            figures["rows"].append(row)
            if count * size > cuda.free_bytes() // 2:
                row["skipped"] = "more than half of the free memory"
                continue
            if time.monotonic() - began > 40:
                row["skipped"] = "out of time"
                continue
            child.send((kind, count, size))
            opens, closes = [], []
            for _ in range(REPEATS):
                shared: list[Any] = []
                while len(shared) < count:
                    handles, fds = child.hear_with_fds(30)
                    shared += fds if handles is None else map(bytes.fromhex, handles)
                start = time.perf_counter()
                opened = open_all(cuda, kind, shared, size)
                opens.append(time.perf_counter() - start)
                start = time.perf_counter()
                close_all(cuda, kind, opened, size)
                closes.append(time.perf_counter() - start)
                if kind == "fd":
                    for fd in shared:
                        os.close(fd)
                child.send("next")
            row["export_s"] = round(child.hear(30), 6)
            row["open_s"], row["close_s"] = round(median(opens), 6), round(median(closes), 6)
            child.send("closed")
    return summary(figures["rows"])


def open_all(cuda: Cuda, kind: str, shared: list[Any], size: int) -> list[int]:
    if kind == "legacy":
        return [cuda.open_legacy(handle) for handle in shared]
    base = cuda.reserve(len(shared) * size)
    for index, fd in enumerate(shared):
        handle = cuda.import_fd(fd)
        cuda.map(base + index * size, size, handle, READ)
        cuda("cuMemRelease", handle)
    return [base + index * size for index in range(len(shared))]


def close_all(cuda: Cuda, kind: str, opened: list[int], size: int) -> None:
    for address in opened:
        if kind == "legacy":
            cuda("cuIpcCloseMemHandle", address)
        else:
            cuda("cuMemUnmap", address, size)
    if kind == "fd":
        cuda("cuMemAddressFree", opened[0], len(opened) * size)


def summary(rows: list[dict[str, Any]]) -> str:
    parts = []
    for row in rows:
        what = f"{row['kind']} {row['count']} x {row['size'] // MIB} MiB"
        if "skipped" in row:
            parts.append(f"{what}: skipped, {row['skipped']}")
            continue
        each = [f"{row[key] / row['count'] * 1e6:.0f}" for key in ("export_s", "open_s", "close_s")]
        parts.append(f"{what}: {' / '.join(each)}")
    return "us each to export / open / close: " + "; ".join(parts)


if __name__ == "__main__":
    run("costs", QUESTION, main, {"owner": owner}, seconds=56)
