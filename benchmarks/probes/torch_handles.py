"""Probe 3: what kind of memory torch's allocator gives, and how it can be exported; chunk sizes, and fds for 16 GB.

One process per configuration: the default, ``expandable_segments`` with each ``TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC``,
and ``cudaMallocAsync``. Each allocates tensors of several sizes, asks the driver about their pointers, and walks the
chunks under them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import resource
import socket
import time
from typing import Any

from libcuda import FABRIC, MIB, POINTER, POSIX_FD, Cuda, CudaError, IpcHandle
from rig import FIGURES, Child, Skip, receive, run, send

QUESTION = "Which handle types does torch's allocator give, in chunks of what size, and how many fds for 16 GB?"

_EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
_ASYNC = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync", "PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}
CONFIGURATIONS: dict[str, dict[str, str]] = {
    "default": {},
    "expandable_segments": _EXPANDABLE,
    "expandable_segments, IPC=0": {**_EXPANDABLE, "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC": "0"},
    "expandable_segments, IPC=1": {**_EXPANDABLE, "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC": "1"},
    "cudaMallocAsync": _ASYNC,
}
SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC")

SIZES = {"1 KiB": 1 << 10, "3 MiB": 3 * MIB, "30 MiB": 30 * MIB, "300 MiB": 300 * MIB}
LIST_BYTES = 16 * 10**9
LIST_PIECE = 250 * 10**6


def allocate(sock: socket.socket) -> None:
    """One configuration: first some tensors by themselves, then, when it is told how much it may have, the list."""
    import torch

    torch.empty(1, device="cuda")
    cuda = Cuda().start()
    found: dict[str, Any] = {"torch": torch.__version__, "backend": torch.cuda.get_allocator_backend()}
    found["tensors"] = {}
    kept = []
    for name, size in SIZES.items():
        kept.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        found["tensors"][name] = describe(cuda, kept[-1].data_ptr(), size)
    send(sock, "ready")
    budget, _ = receive(sock)
    count = min(LIST_BYTES, budget) // LIST_PIECE
    kept.clear()
    torch.cuda.empty_cache()
    pieces = [torch.empty(LIST_PIECE, dtype=torch.uint8, device="cuda") for _ in range(count)]
    start = time.perf_counter()
    chunks: dict[int, int] = {}
    try:
        for piece in pieces:
            chunks.update(walk(cuda, piece.data_ptr(), LIST_PIECE))
    except CudaError as error:
        found["walk"] = str(error)
    found["list"] = {
        "bytes": count * LIST_PIECE,
        "chunks": len(chunks),
        "chunk_sizes": sorted(set(chunks.values()))[:16],
        "distinct_blocks": len({cuda.pointer("memory_block_id", base) for base in chunks}),
        "walk_seconds": round(time.perf_counter() - start, 4),
    }
    found["list"].update(export_all(cuda, list(chunks)))
    send(sock, found)


def describe(cuda: Cuda, address: int, size: int) -> dict[str, Any]:
    """Every attribute, and what each way of exporting says."""
    found: dict[str, Any] = {name: cuda.pointer(name, address) for name in POINTER}
    if isinstance(found["mempool"], int):
        found["mempool"] = found["mempool"] != 0
    try:
        base, length = cuda.range(address)
        found["range"] = {"offset": address - base, "size": length}
        chunks = walk(cuda, address, size)
        found["chunks"] = [length for _, length in chunks][:64]
        found["blocks"] = [cuda.pointer("memory_block_id", base) for base, _ in chunks][:64]
    except CudaError as error:
        found["range"] = str(error)
    found["cuIpcGetMemHandle"] = cuda.attempt("cuIpcGetMemHandle", IpcHandle(), address)
    try:
        retained = cuda.retain(address)
    except CudaError as error:
        found["cuMemRetainAllocationHandle"] = error.name
        return found
    found["cuMemRetainAllocationHandle"] = "ok"
    for name, kind in (("fd", POSIX_FD), ("fabric", FABRIC)):
        room = (ctypes.c_ubyte * 64)()
        said = cuda.attempt("cuMemExportToShareableHandle", ctypes.addressof(room), retained, kind, 0)
        found[f"export as {name}"] = said
        if said == "ok" and kind == POSIX_FD:
            os.close(int.from_bytes(bytes(room[:4]), "little"))
    cuda("cuMemRelease", retained)
    return found


def walk(cuda: Cuda, address: int, size: int) -> list[tuple[int, int]]:
    """The mappings under a range, as `cuMemGetAddressRange` tells them: base and size."""
    found, end = [], address + size
    while address < end:
        base, length = cuda.range(address)
        found.append((base, length))
        if base + length <= address:
            raise CudaError("cuMemGetAddressRange", -1, "a range that does not hold its own address")
        address = base + length
    return found


def export_all(cuda: Cuda, bases: list[int]) -> dict[str, Any]:
    """One fd per chunk, all open at once: what that costs, or what stops it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    fds: list[int] = []
    start = time.perf_counter()
    said = "ok"
    try:
        for base in bases:
            retained = cuda.retain(base)
            try:
                fds.append(cuda.export_fd(retained))
            finally:
                cuda("cuMemRelease", retained)
    except CudaError as error:
        said = str(error)
    seconds = time.perf_counter() - start
    for fd in fds:
        os.close(fd)
    return {"fds": len(fds), "export": said, "export_seconds": round(seconds, 4), "nofile": [soft, hard]}


def main() -> str:
    cuda = Cuda().start()
    if importlib.util.find_spec("torch") is None:
        raise Skip("torch is not installed")
    figures = FIGURES
    nothing: dict[str, str | None] = dict.fromkeys(SETTINGS, None)
    # Importing torch takes seconds, so all do it at once; the lists come one after the other, the memory being one.
    running = [(name, Child("allocate", {**nothing, **chosen})) for name, chosen in CONFIGURATIONS.items()]
    for name, child in running:
        try:
            child.hear(45)
            figures[name] = child.ask(cuda.free_bytes() // 2, 20)
        except (EOFError, TimeoutError, OSError) as error:
            figures[name] = {"failed": str(error)}
        child.process.kill()
        child.process.wait(10)
    return summary(figures)


def summary(figures: dict[str, Any]) -> str:
    parts = []
    for name, found in figures.items():
        if "failed" in found:
            parts.append(f"{name}: {found['failed']}")
            continue
        large = found["tensors"]["300 MiB"]
        parts.append(
            f"{name}: legacy {large['legacy_capable']}, handle types {large['handle_types']},"
            f" mempool {large['mempool']}, {found['list']['fds']} fds for {found['list']['bytes'] / 1e9:.1f} GB"
            f" in chunks of {found['list']['chunk_sizes'][:4]}"
        )
    return "; ".join(parts)


if __name__ == "__main__":
    run("torch_handles", QUESTION, main, {"allocate": allocate}, seconds=58)
