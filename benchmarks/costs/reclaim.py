"""From a process's death until everything of its is free: what it held at the agent, and what it left on the box.

Looked at from outside, again and again, until nothing is left: records in the state, the agent's mappings and
descriptors, commands in the queue, files of torch's in /dev/shm, slots in LMDB's tables of readers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import torch
import torch.multiprocessing

from costs.processes import PATIENCE, Box, Helper, Talk, client
from costs.tensors import MIB, parameters
from etha.tensor_bus.command_queue import CommandQueue
from etha.tensor_bus.paths import agent_paths
from etha.tensor_bus.state import ClaimRecord, ClientRecord, PublicationRecord, StateReader, key_client

KINDS: Final = ("owner", "reader", "everything")
"""Who dies: the owner of a publication that is read; a reader with leases; a client that is and has all there is."""

PARTS: Final = ("records", "memory", "commands", "files", "slots")
_LEASES: Final = 100
_TENSORS: Final = 16


class Death(msgspec.Struct, frozen=True):
    """Seconds from SIGKILL until each part was free; ``whole`` is the last of them."""

    parts: dict[str, float]

    @property
    def whole(self) -> float:
        """Seconds until nothing was left."""
        return max(self.parts.values())


class Ground:
    """A box with an owner that lives, and looks at what is there of a process.

    Nobody else has the memory of the dead mapped: torch's files stay for as long as anybody has.
    """

    def __init__(self, box: Box) -> None:
        self._agent = box.agent.pid
        paths = agent_paths(0)
        self._state, self._queue = StateReader(paths.state), CommandQueue(paths)
        self._bus = client()
        self._standing = self._bus.register_tensors("standing", parameters(1))
        self._rest = self._memory()

    def close(self) -> None:
        """End what was made."""
        self._bus.close()
        self._queue.close()
        self._state.close()

    def death(self, kind: str) -> Death:
        """One process lives, holds what its kind holds, and is killed."""
        with Helper(_LIVES[kind]) as helper:
            told = helper.hear()
            looks: dict[str, Callable[[], bool]] = {
                "records": lambda: self._recorded(helper.pid),
                "memory": lambda: self._memory() != self._rest,
                "commands": lambda: bytes.fromhex(told) in self._queue.clients(),
                "files": lambda: _files(helper.pid),
                "slots": lambda: self._slots(helper.pid),
            }
            if not looks["records"]():
                raise RuntimeError("nothing of it is on record: this would measure nothing")
            started = time.perf_counter()
            helper.kill()
            parts: dict[str, float] = {}
            while looks:
                for name in [name for name, there in looks.items() if not there()]:
                    parts[name] = time.perf_counter() - started
                    del looks[name]
                if time.perf_counter() - started > PATIENCE:
                    raise TimeoutError(f"still there of a dead {kind}: {', '.join(looks)}")
        return Death(parts)

    def _recorded(self, pid: int) -> bool:
        found = self._state.snapshot((ClientRecord, ClaimRecord, PublicationRecord))
        clients = {key_client(key) for key, record in found[ClientRecord].items() if record.pid == pid}
        live = any(record.owner in clients for record in found[PublicationRecord].values())
        return bool(clients) or live or any(claim.pid == pid for claim in found[ClaimRecord].values())

    def _memory(self) -> tuple[int, int]:
        """Shared mappings and descriptors of the agent, those for the life of a connection among them."""
        lines = Path(f"/proc/{self._agent}/maps").read_text().splitlines()
        return sum(line.split(None, 2)[1][3] == "s" for line in lines), len(os.listdir(f"/proc/{self._agent}/fd"))

    def _slots(self, pid: int) -> bool:
        tables = (self._queue._env.readers(), self._state._env.readers())
        return any(line.split()[:1] == [str(pid)] for table in tables for line in table.splitlines())


def measure(rounds: int, told: Callable[[float], None]) -> dict[str, list[Death]]:
    """Kind to deaths, the kinds in turns."""
    torch.set_num_threads(1)
    found: dict[str, list[Death]] = {kind: [] for kind in KINDS}
    with Box() as box:
        ground = Ground(box)
        try:
            for number in range(rounds):
                for kind in KINDS:
                    found[kind].append(ground.death(kind))
                told((number + 1) / rounds)
        finally:
            ground.close()
    return found


def _files(pid: int) -> bool:
    return any(name.startswith(f"torch_{pid}_") for name in os.listdir("/dev/shm"))


def _own(talk: Talk) -> None:
    bus = client()
    kept = bus.register_tensors("theirs", parameters(_TENSORS, MIB, "file_system"))
    for _ in range(10):
        kept.publish()
    talk.say(bus.connection.client.hex())
    talk.hear()


def _read(talk: Talk) -> None:
    bus = client()
    subscription = bus.subscribe("standing")
    kept = [subscription.read() for _ in range(_LEASES)]
    subscription.fileno()
    talk.say(bus.connection.client.hex())
    talk.hear()
    del kept


def _everything(talk: Talk) -> None:
    bus = client()
    own = bus.register_tensors("theirs", parameters(_TENSORS, MIB, "file_system"))
    standing, theirs = bus.subscribe("standing"), bus.subscribe("theirs")
    kept = [each.read() for each in (standing, theirs) for _ in range(_LEASES // 2)]
    standing.fileno()
    other = bus.register_tensors("written", parameters(1))
    update = other.update()
    update.__enter__()
    own.publish()
    talk.say(bus.connection.client.hex())
    talk.hear()
    del kept


_LIVES: Final[dict[str, Callable[[Talk], None]]] = {"owner": _own, "reader": _read, "everything": _everything}
