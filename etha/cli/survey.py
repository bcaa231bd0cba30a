"""What the agents of this box know, from their lock files and state LMDBs alone. No agent is asked anything.

So it answers while an agent is busy, stopped or dead, and says which. It changes nothing. For ``etha status``.
"""

from __future__ import annotations

import re
from typing import Final

import lmdb
import msgspec

from etha.errors import EthaError
from etha.tensor_bus import clock
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
        lock = _lock(state_path)
        if lock is not None and lock.text is not None and lock.text.boot != boot_id():
            return AgentView(rank, state_path, "of another boot", "its files mean nothing any more", lock.text.pid)
        reader = StateReader(state_path)
        try:
            return _view(rank, state_path, lock, reader)
        finally:
            reader.close()
    except (EthaError, lmdb.Error) as error:
        return AgentView(rank, state_path, "unreadable", str(error))


def _lock(state_path: str) -> LockState | None:
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
    return AgentView(
        rank=agent.rank,
        state_path=state_path,
        condition=_condition(agent, lock, now),
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
            _publication(key_number(key), record, records, claims) for key, record in records[PublicationRecord].items()
        ),
        leases=tuple(
            LeaseView(claim.name, claim.kind, claim.version, _thread(claim), now - claim.since)
            for claim in claims
            if claim.granted and claim.kind in ("lease", "update")
        ),
        waits=tuple(
            Wait(_thread(claim), claim.kind, claim.name, _waits_for(claim, claims), now - claim.since)
            for claim in claims
            if not claim.granted
        ),
        counters=agent.counters,
    )


def _condition(agent: AgentRecord, lock: LockState | None, now: float) -> str:
    if agent.boot != boot_id():
        return "of another boot"
    if lock is None or not lock.held:
        return "dead"
    if process_state(agent.pid) == "stopped":
        return "stopped"
    return "busy" if now - agent.heartbeat > _LATE_SECONDS else "serving"


def _publication(
    generation: int,
    record: PublicationRecord,
    records: dict[type, dict[bytes, object]],
    claims: list[ClaimRecord],
) -> PublicationView:
    version = _numbered(records[VersionRecord], generation)
    memory = _numbered(records[MemoryRecord], generation)
    kinds = {allocation.__struct_config__.tag for allocation in record.manifest.allocations}
    return PublicationView(
        name=record.name,
        generation=generation,
        version=version.version if isinstance(version, VersionRecord) else -1,
        phase=version.phase if isinstance(version, VersionRecord) else "unknown",
        tensors=len(record.manifest.names),
        nbytes=record.manifest.nbytes,
        kind=", ".join(sorted(map(str, kinds))) or "empty",
        owner=record.label,
        readers=sum(claim.kind == "import" and claim.generation == generation for claim in claims),
        memory=_memory(memory if isinstance(memory, MemoryRecord) else None),
    )


def _numbered(records: dict[bytes, object], number: int) -> object | None:
    return next((record for key, record in records.items() if key_number(key) == number), None)


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


def _waits_for(claim: ClaimRecord, claims: list[ClaimRecord]) -> tuple[str, ...]:
    others = [other for other in claims if other is not claim and other.name == claim.name]
    if claim.kind == "lease":
        in_the_way = [o for o in others if o.kind == "update" and o.granted]
        in_the_way = in_the_way or [o for o in others if o.kind in ("update", "close")]
    else:
        kinds = ("lease", "update") if claim.kind == "update" else ("lease", "update", "import")
        in_the_way = [o for o in others if o.kind in kinds and o.granted]
    return tuple(dict.fromkeys(_thread(other) for other in in_the_way))
