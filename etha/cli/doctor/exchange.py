"""Two throw-away processes that share a small tensor end to end: once for each way in which torch shares host memory.

``python -m etha.cli.doctor.exchange COMMAND_PATH STATE_PATH``. Says each step on stdout before it is taken, one JSON
object a line. torch is imported once; the reader is a fork of the owner, made before either has a client.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from etha.cli.doctor import throwaway
from etha.tensor_bus.client import TensorBusClient

if TYPE_CHECKING:
    import torch

KINDS: Final = ("file_descriptor", "file_system")
"""torch's sharing strategies for host memory."""

_TIMEOUT: Final = 5.0
_ELEMENTS: Final = 256


class Step(msgspec.Struct, frozen=True):
    """What a process is about to do, or how that failed.

    Attributes:
        who: ``"owner"`` or ``"reader"``.
        kind: of `KINDS`; None for what comes before them.
        what: the step; `DONE` after the last of a kind.
        failure: the error's class and text; None if the step is only begun.
    """

    who: str
    kind: str | None
    what: str
    failure: str | None = None


DONE: Final = "done"


class _Teller:
    """Says the steps of one process, and how one failed."""

    def __init__(self, who: str) -> None:
        self.who = who
        self.kind: str | None = None
        self.what = ""

    def step(self, what: str) -> None:
        self.what = what
        self._say(Step(self.who, self.kind, what))

    def failed(self, failure: str) -> None:
        self._say(Step(self.who, self.kind, self.what, failure))

    def attempt(self, body: Callable[[], object]) -> bool:
        """Whether it went well. What went wrong is this program's result: it is told, and the next kind is tried."""
        try:
            body()
        except Exception as error:  # noqa: BLE001 - torch raises what it likes
            self.failed(f"{type(error).__name__}: {error}")
            return False
        return True

    def _say(self, step: Step) -> None:
        os.write(1, msgspec.json.encode(step) + b"\n")


class _Ends:
    """One side's ends of two pipes: a word to the other side, and one from it."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing

    def tell(self, well: bool) -> None:
        os.write(self._writing, b"+" if well else b"-")

    def hear(self) -> bool:
        """Whether the other side is well; False if it is gone."""
        return os.read(self._reading, 1) == b"+"


def main() -> None:
    """The owner; it forks the reader."""
    owner = _Teller("owner")
    if not owner.attempt(lambda: _import_torch(owner)):
        return
    to_reader, to_owner = os.pipe(), os.pipe()

    def read() -> None:
        os.close(to_reader[1])
        os.close(to_owner[0])
        _read(_Ends(to_reader[0], to_owner[1]))

    pid = throwaway.fork(read)
    os.close(to_reader[0])
    os.close(to_owner[1])
    owner.attempt(lambda: _own(owner, _Ends(to_owner[0], to_reader[1])))
    os.close(to_reader[1])
    status = os.waitpid(pid, 0)[1]
    if os.waitstatus_to_exitcode(status):
        _Teller("reader").failed(f"the reader {throwaway.obituary(status)}")


def _import_torch(owner: _Teller) -> None:
    owner.step("import torch")
    import torch

    torch.set_num_threads(1)


def _client() -> TensorBusClient:
    command, state = sys.argv[1:3]
    return TensorBusClient(0, command, state, _TIMEOUT)


def _own(owner: _Teller, reader: _Ends) -> None:
    owner.step("connect to the agent")
    with _client() as client:
        for kind in KINDS:
            owner.kind = kind
            if not owner.attempt(lambda: _own_one(owner, client, reader)):
                reader.tell(False)


def _own_one(owner: _Teller, client: TensorBusClient, reader: _Ends) -> None:
    import torch

    owner.step("put a tensor into shared memory")
    tensor = torch.zeros(_ELEMENTS)
    # What share_memory_() does, by strategy. The strategy itself is set in torch.multiprocessing, which brings pickle.
    storage = tensor.untyped_storage()
    if owner.kind == "file_system":
        storage._share_filename_cpu_()
    else:
        storage._share_fd_cpu_()
    tensor.fill_(1)
    owner.step("register it with the agent")
    publication = client.register_tensors(str(owner.kind), {"tensor": tensor}, timeout=_TIMEOUT)
    reader.tell(True)
    if reader.hear():
        owner.step("update it in place")
        with publication.update(timeout=_TIMEOUT):
            tensor.fill_(2)
        reader.tell(True)
        reader.hear()
    owner.step("close it")
    publication.close(_TIMEOUT)
    owner.step(DONE)


def _read(owner: _Ends) -> None:
    reader = _Teller("reader")
    reader.step("connect to the agent")
    clients: list[TensorBusClient] = []
    if not reader.attempt(lambda: clients.append(_client())):
        return
    for kind in KINDS:
        if owner.hear():
            reader.kind = kind
            owner.tell(reader.attempt(lambda: _read_one(reader, clients[0], owner)))
    clients[0].close()


def _read_one(reader: _Teller, client: TensorBusClient, owner: _Ends) -> None:
    reader.step("subscribe, and map its memory")
    with client.subscribe(str(reader.kind), timeout=_TIMEOUT) as subscription:
        reader.step("read version 0 under a lease")
        with subscription.read(timeout=_TIMEOUT) as lease:
            _require(lease["tensor"], 1)
        owner.tell(True)
        if not owner.hear():
            return
        reader.step("see the owner's write in the same memory")
        with subscription.read(min_version=1, timeout=_TIMEOUT) as lease:
            _require(lease["tensor"], 2)
    reader.step(DONE)


def _require(tensor: torch.Tensor, value: int) -> None:
    if not bool((tensor == value).all()):
        raise ValueError(f"the tensor holds {tensor[:3].tolist()}..., not {value}")


if __name__ == "__main__":
    main()
