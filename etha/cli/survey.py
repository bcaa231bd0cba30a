"""What the agents of this box know, from their lock files and state LMDBs alone. No agent is asked anything.

So it answers while an agent is busy, stopped or dead, and says which. It changes nothing, and takes time in proportion
to what is recorded. For ``etha status``; `lock_beside` and `condition_of` also for ``etha inspect``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Final, TypeVar

import lmdb
import msgspec

from etha.errors import EthaError
from etha.tensor_bus import clock
from etha.tensor_bus.examination import require_readable
from etha.tensor_bus.ipc.process import boot_id, process_state
from etha.tensor_bus.lockfile import LockState, read_lock
from etha.tensor_bus.paths import agents_by_convention
from etha.tensor_bus.state import (
    AgentRecord,
    ClaimRecord,
    ClientRecord,
    MemoryRecord,
    PublicationRecord,
    StateReader,
    VersionRecord,
    key_number,
)

R = TypeVar("R", bound=msgspec.Struct)

_LATE_SECONDS: Final = 3.0
_RANK: Final = re.compile(r"agent_rank(\d+)_state\.lmdb$")


class Worker(msgspec.Struct, frozen=True):
    """A connected client, or one whose connection ended while its process lives."""

    pid: int
    label: str
    connected: bool
    age_s: float


class PublicationView(msgspec.Struct, frozen=True):
    """A publication; ``memory`` says where its owner holds it, or which gate forbade the look."""

    name: str
    generation: int
    version: int
    phase: str
    tensors: int
    nbytes: int
    kind: str
    owner: str
    readers: int
    memory: str


class LeaseView(msgspec.Struct, frozen=True):
    """A lease or an update that is held."""

    publication: str
    kind: str
    version: int | None
    holder: str
    age_s: float


class Wait(msgspec.Struct, frozen=True):
    """Someone who waits, and for whom."""

    who: str
    wants: str
    publication: str
    waits_for: tuple[str, ...]
    age_s: float


class AgentView(msgspec.Struct, frozen=True):
    """One agent.

    ``condition`` is ``"serving"``, ``"busy"`` (it runs, and its heartbeat is late), ``"stopped"`` (by a signal),
    ``"dead"``, ``"starting"``, ``"of another boot"`` or ``"unreadable"``; ``problem`` says more where there is more
    to say.
    """

    rank: int | None
    state_path: str
    condition: str
    problem: str | None = None
    pid: int | None = None
    epoch: int | None = None
    schema: int | None = None
    device: str | None = None
    heartbeat_age_s: float | None = None
    workers: tuple[Worker, ...] = ()
    publications: tuple[PublicationView, ...] = ()
    leases: tuple[LeaseView, ...] = ()
    waits: tuple[Wait, ...] = ()
    counters: dict[str, int] = {}


def survey(state_path: str | None = None) -> list[AgentView]:
    """Every agent that the path convention finds, or the one of ``state_path``."""
    if state_path is not None:
        match = _RANK.search(state_path)
        return [look(int(match[1]) if match else None, state_path)]
    return [look(rank, path) for rank, path in agents_by_convention()]


def look(rank: int | None, state_path: str) -> AgentView:
    """One agent."""
    try:
        lock = lock_beside(state_path)
        if lock is not None and lock.text is not None and lock.text.boot != boot_id():
            return AgentView(rank, state_path, "of another boot", "its files mean nothing any more", lock.text.pid)
        if lock is None or not lock.held:
            require_readable(state_path)
        reader = StateReader(state_path)
        try:
            return _view(rank, state_path, lock, reader)
        finally:
            reader.close()
    except (EthaError, lmdb.Error) as error:
        return AgentView(rank, state_path, "unreadable", str(error))


def lock_beside(state_path: str) -> LockState | None:
    """What the lock file says that the convention puts beside a state LMDB; None where there is none."""
    if not state_path.endswith("_state.lmdb"):
        return None
    return read_lock(state_path.removesuffix("_state.lmdb") + "_command.lmdb.agent")


def _view(rank: int | None, state_path: str, lock: LockState | None, reader: StateReader) -> AgentView:
    now = clock.now()
    records = reader.snapshot((AgentRecord, ClientRecord, PublicationRecord, VersionRecord, MemoryRecord, ClaimRecord))
    agent = next(iter(records[AgentRecord].values()), None)
    if agent is None:
        return AgentView(rank, state_path, "starting" if lock is None or lock.held else "dead")
    if lock is None:
        lock = read_lock(agent.command + ".agent")
    claims: list[ClaimRecord] = list(records[ClaimRecord].values())
    versions = _by_generation(records[VersionRecord])
    memories = _by_generation(records[MemoryRecord])
    readers = Counter(claim.generation for claim in claims if claim.kind == "import")
    holders = _Holders(claims)
    return AgentView(
        rank=agent.rank,
        state_path=state_path,
        condition=condition_of(agent, lock, now),
        pid=agent.pid,
        epoch=agent.epoch,
        schema=agent.schema,
        device=agent.device,
        heartbeat_age_s=now - agent.heartbeat,
        workers=tuple(
            Worker(client.pid, client.label, client.connected, now - client.since)
            for client in records[ClientRecord].values()
        ),
        publications=tuple(
            _publication(generation, record, versions.get(generation), memories.get(generation), readers[generation])
            for generation, record in _by_generation(records[PublicationRecord]).items()
        ),
        leases=tuple(
            LeaseView(claim.name, claim.kind, claim.version, _thread(claim), now - claim.since)
            for claim in claims
            if claim.granted and claim.kind in ("lease", "update")
        ),
        waits=tuple(
            Wait(_thread(claim), claim.kind, claim.name, holders.of(claim), now - claim.since)
            for claim in claims
            if not claim.granted
        ),
        counters=agent.counters,
    )


def condition_of(agent: AgentRecord, lock: LockState | None, now: float) -> str:
    """One of the conditions of `AgentView`, of an agent whose state could be read."""
    if agent.boot != boot_id():
        return "of another boot"
    if lock is None or not lock.held:
        return "dead"
    if process_state(agent.pid) == "stopped":
        return "stopped"
    return "busy" if now - agent.heartbeat > _LATE_SECONDS else "serving"


def _by_generation(records: dict[bytes, R]) -> dict[int, R]:
    return {key_number(key): record for key, record in records.items()}


def _publication(
    generation: int,
    record: PublicationRecord,
    version: VersionRecord | None,
    memory: MemoryRecord | None,
    readers: int,
) -> PublicationView:
    kinds = {allocation.__struct_config__.tag for allocation in record.manifest.allocations}
    return PublicationView(
        name=record.name,
        generation=generation,
        version=-1 if version is None else version.version,
        phase=phase_of(version),
        tensors=len(record.manifest.names),
        nbytes=record.manifest.nbytes,
        kind=", ".join(sorted(map(str, kinds))) or "empty",
        owner=record.label,
        readers=readers,
        memory=_memory(memory),
    )


def phase_of(version: VersionRecord | None) -> str:
    """Where a publication stands, in a word or two."""
    if version is None:
        return "unknown"
    if version.suspended:
        return "suspended"
    return f"{version.phase}, recovering" if version.recovering else version.phase


def _memory(record: MemoryRecord | None) -> str:
    if record is None:
        return "not looked at yet"
    if record.gate is not None:
        return f"hidden by {record.gate}; run: etha doctor"
    mappings = sum(map(len, record.mappings))
    descriptors = sum(map(len, record.descriptors))
    return f"{mappings} mappings, {descriptors} descriptors in the owner"


def _thread(claim: ClaimRecord) -> str:
    return f"{claim.label} thread {claim.thread}"


class _Holders:
    """Who stands in the way of whom: listed once per name, and not sought for each that waits."""

    def __init__(self, claims: list[ClaimRecord]) -> None:
        of: dict[str, list[ClaimRecord]] = {}
        for claim in claims:
            of.setdefault(claim.name, []).append(claim)
        self._reads = {name: _threads(_before_a_read(those)) for name, those in of.items()}
        self._updates = {name: _threads(_granted(those, "lease", "update")) for name, those in of.items()}
        self._ends = {name: _threads(_granted(those, "lease", "update", "import")) for name, those in of.items()}

    def of(self, claim: ClaimRecord) -> tuple[str, ...]:
        """Of a claim that waits; itself is never among them."""
        table = {"lease": self._reads, "update": self._updates}.get(claim.kind, self._ends)
        return table[claim.name]


def _before_a_read(claims: list[ClaimRecord]) -> list[ClaimRecord]:
    return _granted(claims, "update") or [claim for claim in claims if claim.kind in ("update", "close")]


def _granted(claims: list[ClaimRecord], *kinds: str) -> list[ClaimRecord]:
    return [claim for claim in claims if claim.granted and claim.kind in kinds]


def _threads(claims: Iterable[ClaimRecord]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(_thread, claims)))
