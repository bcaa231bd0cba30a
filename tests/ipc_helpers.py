"""What the tests of `etha.tensor_bus.ipc` share: other processes, and a round trip from tensors to views."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from etha.tensor_bus.ipc.export import Export
from etha.tensor_bus.ipc.host import export
from etha.tensor_bus.ipc.manifest import ITEMSIZE
from etha.tensor_bus.ipc.mapping import ImportedMemory, MappingTable, import_memory
from etha.tensor_bus.ipc.view import build_views

STRATEGIES = ("file_descriptor", "file_system")


def in_fork(body: Callable[[], object]) -> str:
    """Run ``body`` in a forked child and return the repr of its result; what it raises fails the caller."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read)
            os.write(write, repr(body()).encode())
            status = 0
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise ChildProcessError(f"status {status}: {text}")
    return text


def python(code: str, *arguments: str, fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter, with warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, pass_fds=fds, timeout=120, check=False)


def mapped_addresses(path_part: str = "") -> set[int]:
    """Start of every mapping of this process whose line holds ``path_part``."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {int(line.split("-", 1)[0], 16) for line in lines if path_part in line}


def storage_bytes(tensor: torch.Tensor) -> bytes:
    """All bytes of the storage under a tensor."""
    return bytes(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).tolist())


@dataclass
class RoundTrip:
    """Tensors, exported and viewed again in this process."""

    export: Export
    table: MappingTable
    imported: ImportedMemory
    views: dict[str, torch.Tensor]


@contextmanager
def round_trip(tensors: Mapping[str, torch.Tensor]) -> Iterator[RoundTrip]:
    """Owner and reader in one process, with a mapping table of their own that must be empty in the end."""
    exported = export(tensors)
    table = MappingTable()
    try:
        imported = import_memory(exported.manifest, [fd.fileno() for fd in exported.fds], table)
        trip = RoundTrip(exported, table, imported, build_views(exported.manifest, imported))
        try:
            yield trip
        finally:
            imported.close()
            trip.views.clear()
            table.reap()
    finally:
        exported.close_fds()


def shared(*shape: int) -> torch.Tensor:
    """Distinct numbers in shared memory."""
    count = 1
    for size in shape:
        count *= size
    return torch.arange(count, dtype=torch.float32).reshape(shape).share_memory_()


def raw(dtype: str) -> torch.Tensor:
    """48 distinct bytes in shared memory, as numbers of ``dtype``."""
    storage = torch.arange(48, dtype=torch.uint8).share_memory_().untyped_storage()
    return (
        torch.empty(0, dtype=torch.uint8).view(getattr(torch, dtype)).set_(storage, 0, (48 // ITEMSIZE[dtype],), (1,))
    )


class Named(torch.nn.Parameter):
    """A subclass that dispatches nothing for itself, as vLLM's parameters are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("etha asked a subclass in Python")


GEOMETRIES: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": lambda: shared(3, 4),
    "offset": lambda: shared(12)[5:],
    "strided": lambda: shared(12)[::3],
    "transposed": lambda: shared(3, 4).t(),
    "expanded": lambda: shared(3, 1).expand(3, 7),
    "expanded_everywhere": lambda: shared(1).expand(2**40),
    "overlapping": lambda: shared(12).as_strided((4, 3), (2, 1), 1),
    "channels_last": lambda: shared(2, 3, 4, 5).to(memory_format=torch.channels_last).share_memory_(),
    "zero_dim": lambda: shared(4)[2],
    "parameter": lambda: torch.nn.Parameter(shared(3)),
    "buffer": lambda: torch.nn.Buffer(shared(3)),
    "subclass": lambda: Named(shared(3)),
    "empty_shared": lambda: torch.empty(0, 3).share_memory_(),
    "empty_private": lambda: torch.empty(4, 0, 3),
    "empty_slice_of_private": lambda: torch.ones(5)[5:],
    "empty_slice_of_shared": lambda: shared(5)[2:2],
    "requires_grad": lambda: shared(3).requires_grad_(),
}


@contextmanager
def child_with_socket(
    code: str, tmp_path: Path, *arguments: str
) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A new interpreter that has ``sock`` connected to the one given here; it is killed in the end."""
    path = str(tmp_path / "peer.sock")
    prelude = (
        "import os, socket, sys\n"
        "sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "sock.connect(sys.argv[1])\n"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        os.chmod(tmp_path, 0o755)
        os.chmod(path, 0o777)
        listener.listen()
        listener.settimeout(60)
        script = tmp_path / "the_child.py"
        script.write_text(prelude + code)
        child = subprocess.Popen([sys.executable, str(script), path, *arguments])
        try:
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(60)
                yield child, sock
        finally:
            child.send_signal(signal.SIGCONT)
            child.kill()
            child.wait()
