"""One side of the test of order on a GPU: the owner, who writes versions, or the reader, who checks them.

    gpu_player.py SOCKET

Kernels and copies are queued through the probes' own binding, fences through etha's: both use the primary context. What
the reader has read lies in device memory until the end, so that no host waits for a device on the way.
"""

from __future__ import annotations

import ctypes
import random
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

sys.path.append(str(Path(__file__).parent.parent / "benchmarks" / "probes"))

from cuda_peer import OWNER, Manifest, describe, receive, send
from libcuda import READ_WRITE, Cuda

from etha.tensor_bus.ipc.cuda import Device, visible_devices
from etha.tensor_bus.ipc.cuda_backend import CudaBackend
from etha.tensor_bus.ipc.driver import load
from etha.tensor_bus.ipc.fence import Fences
from etha.tensor_bus.ipc.mapping import MappingTable, import_memory


class Game(msgspec.Struct):
    """What a side is told.

    Attributes:
        role: ``"owner"`` or ``"reader"``.
        kind: ``"legacy"`` or ``"fd"``.
        mine, theirs: slots.
        waits: whether this side waits for the other's fence.
        versions: how many.
        seed: of pauses and streams.
    """

    role: str
    kind: str
    mine: int
    theirs: int
    waits: bool
    versions: int
    seed: int


class Side:
    """Device, fences and streams of one side."""

    def __init__(self, game: Game, table: int) -> None:
        self.game = game
        self.cuda = Cuda().start()
        self.cuda.load()
        self.driver = load()
        self.device = Device(self.driver, visible_devices(self.driver)[0])
        self.fences = Fences(self.device, table)
        self.source = random.Random(game.seed)
        self.streams = [self.cuda.stream() for _ in range(3)]

    def pause(self) -> int:
        """Nanoseconds: often none, at most a millisecond."""
        return self.source.randrange(1_000_000) if self.source.random() < 0.1 else 0

    def finish(self) -> None:
        for stream in self.streams:
            self.cuda("cuStreamSynchronize", stream)


def own(side: Side, peer: socket.socket) -> int:
    """Write each version as soon as the read before it is queued; 0, for no read was torn here."""
    cuda = side.cuda
    piece = max(cuda.granularity(), 1 << 21)
    sizes = (piece, piece)
    if side.game.kind == "legacy":
        address = cuda.allocate(2 * piece)
    else:
        address = cuda.reserve(2 * piece)
        for index in range(2):
            cuda.map(address + index * piece, piece, cuda.create(piece), READ_WRITE)
    manifest, fds = describe(side.driver, address, sizes)
    send(peer, manifest, fds)
    read = 0
    for version in range(1, side.game.versions + 1):
        stream = side.source.choice(side.streams)
        if side.game.waits:
            side.fences.wait(stream.value or 0, side.game.theirs, read)
        half = side.pause()
        cuda("cuMemsetD32Async", address, version, piece // 4, stream)
        if half:
            cuda.launch("spin", stream, half)
        cuda("cuMemsetD32Async", address + piece, version, piece // 4, stream)
        send(peer, (version, side.fences.signal(stream.value or 0, side.game.mine)))
        read, _ = receive(peer, int)
    side.finish()
    return 0


def read(side: Side, peer: socket.socket) -> int:
    """Copy the first and last word of each version aside; how many pairs were not that version."""
    cuda, versions = side.cuda, side.game.versions
    manifest, fds = receive(peer, Manifest)
    table = MappingTable()
    memory = import_memory(manifest, fds, table, CudaBackend(side.device, OWNER))
    size = manifest.storages[0].nbytes
    address = ctypes.addressof(memory.buffer(0))
    aside = cuda.allocate(8 * versions)
    for _ in range(versions):
        (version, written), _ = receive(peer, tuple[int, int])
        stream = side.source.choice(side.streams)
        if side.game.waits:
            side.fences.wait(stream.value or 0, side.game.theirs, written)
        place = aside + 8 * (version - 1)
        cuda("cuMemcpyDtoDAsync_v2", place, address, 4, stream)
        half = side.pause()
        if half:
            cuda.launch("spin", stream, half)
        cuda("cuMemcpyDtoDAsync_v2", place + 4, address + size - 4, 4, stream)
        send(peer, side.fences.signal(stream.value or 0, side.game.mine))
    side.finish()
    words = (ctypes.c_uint32 * (2 * versions))()
    cuda("cuMemcpyDtoH_v2", ctypes.addressof(words), aside, 8 * versions)
    pairs: list[Any] = list(zip(words[::2], words[1::2], strict=True))
    memory.close()
    table.reap()
    side.device.drain()
    return sum(pair != (version, version) for version, pair in enumerate(pairs, 1))


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    game, (table, other) = receive(sock, Game)
    with socket.socket(fileno=other) as peer:
        side = Side(game, table)
        send(sock, own(side, peer) if game.role == "owner" else read(side, peer))


if __name__ == "__main__":
    main()
