"""How a list of tensors is handed to another process: by etha, and as it is done without.

* handles: one of torch's handles per tensor, made anew for every step, pickled in a list; the receiver opens each;
* bucket: the tensors are copied into one flat buffer, whose handle is sent, piece by piece until the list is through;
* pinned: the same through one buffer of host memory that both processes have mapped and pinned.

A piece is sent once the receiver has copied the one before. Each class is both ends: an owner sends, a reader receives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Protocol

import torch

from bandwidths.actors import now
from bandwidths.memory import Memory
from etha import TensorBusClient
from etha.tensor_bus import Lease

Tensors = Mapping[str, torch.Tensor]

PUBLICATION = "model"


class Way(Protocol):
    """One way. `receive` answers with two moments: the tensors are at hand; their bytes have been copied."""

    def send(self, version: int) -> None:
        """Hand over what the tensors hold now."""
        ...

    def receive(self, version: int, into: Tensors | None) -> tuple[int, int]:
        """Take it; copy it, unless there is nowhere to copy it to."""
        ...


class Etha:
    """Registered once; a publish and a lease for each version."""

    def __init__(self, memory: Memory, bus: TensorBusClient, tensors: Tensors | None) -> None:
        self._memory = memory
        if tensors is None:
            self._subscription = bus.subscribe(PUBLICATION)
        else:
            self._publication = bus.register_tensors(PUBLICATION, dict(tensors))

    def send(self, version: int) -> None:
        self._publication.publish(version)

    def lease(self, version: int) -> Lease:
        """On a version at least so new."""
        return self._subscription.read(min_version=version)

    def receive(self, version: int, into: Tensors | None) -> tuple[int, int]:
        with self.lease(version) as lease:
            taken = now()
            if into is not None:
                lease.copy_into(into)
                self._memory.wait()
            return taken, now()


class Handles:
    """torch.multiprocessing's reductions of every tensor, in every step."""

    def __init__(self, memory: Memory, connection: Connection, tensors: Tensors | None) -> None:
        self._memory = memory
        self._connection = connection
        self._tensors = tensors

    def send(self, version: int) -> None:
        self._connection.send(list((self._tensors or {}).values()))
        self._connection.recv_bytes()
        if self._memory.on_device:
            torch.cuda.ipc_collect()

    def receive(self, version: int, into: Tensors | None) -> tuple[int, int]:
        those = self._connection.recv()
        taken = now()
        if into is not None:
            for target, source in zip(into.values(), those, strict=True):
                target.copy_(source, non_blocking=True)
            self._memory.wait()
        moments = taken, now()
        del those
        self._connection.send_bytes(b"dropped")
        return moments


class Bucket:
    """One flat buffer of the owner's, through which all goes; its handle is sent for each piece."""

    def __init__(self, memory: Memory, connection: Connection, tensors: Tensors | None, nbytes: int) -> None:
        self._memory = memory
        self._connection = connection
        self._tensors = tensors or {}
        self._nbytes = nbytes
        if tensors is not None:
            self._buffer = memory.shared((nbytes,), torch.uint8)

    def send(self, version: int) -> None:
        for piece in pieces(self._tensors, self._nbytes):
            for start, end, tensor in piece:
                self._buffer[start:end].copy_(flat(tensor), non_blocking=True)
            self._offer()
            self._connection.recv_bytes()

    def receive(self, version: int, into: Tensors | None) -> tuple[int, int]:
        taken = 0
        for piece in pieces(into or {}, self._nbytes):
            buffer = self._take()
            taken = now()
            for start, end, tensor in piece:
                flat(tensor).copy_(buffer[start:end], non_blocking=True)
            self._memory.wait()
            del buffer
            self._connection.send_bytes(b"copied")
        return taken, now()

    def _offer(self) -> None:
        self._connection.send(self._buffer)

    def _take(self) -> torch.Tensor:
        buffer: torch.Tensor = self._connection.recv()
        return buffer


class Pinned(Bucket):
    """One buffer of host memory, which both have had since before they were forked."""

    def __init__(self, memory: Memory, connection: Connection, tensors: Tensors | None, buffer: torch.Tensor) -> None:
        super().__init__(memory, connection, None, buffer.nbytes)
        self._tensors = tensors or {}
        self._buffer = buffer
        status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
        if int(status) != 0:
            raise RuntimeError(f"cudaHostRegister of {buffer.nbytes} bytes: {status}")

    def _offer(self) -> None:
        self._memory.wait()
        self._connection.send_bytes(b"filled")

    def _take(self) -> torch.Tensor:
        self._connection.recv_bytes()
        return self._buffer


def pieces(tensors: Tensors, nbytes: int) -> Iterator[list[tuple[int, int, torch.Tensor]]]:
    """Tensors in their order, as many at a time as a buffer takes; each with its place there.

    Raises:
        ValueError: one is larger than the buffer.
    """
    piece: list[tuple[int, int, torch.Tensor]] = []
    end = 0
    for tensor in tensors.values():
        if tensor.nbytes > nbytes:
            raise ValueError(f"a tensor of {tensor.nbytes} bytes does not go into a buffer of {nbytes}")
        if end + tensor.nbytes > nbytes:
            yield piece
            piece, end = [], 0
        piece.append((end, end + tensor.nbytes, tensor))
        end += tensor.nbytes
    if piece:
        yield piece


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes."""
    return tensor.view(-1).view(torch.uint8)
