"""What a new agent takes over from its predecessor: from the records of the state back to a registry.

A claim that was granted is still held, whoever comes back first, until its holder releases it, does not name it any
more when it reconnects, or is dead. A claim that was waiting is not restored: a request is made again by its worker
when that reconnects, a command stands in the queue and is served again. Whoever died while there was no agent is ended
as if its death had just been seen.

A publication keeps its version and its phase; one whose registration was not answered never existed. Its memory is
*recovering* until descriptors of it are there again: taken from the owner, or sent by it.

A checksum finds bytes that have changed, not records that contradict each other, and those would end every agent that
starts on them. `rehearse` finds them: it recovers on paper, and ends everyone.

Nothing here reads a file: the caller hands in what it has read. `recover` is called once, before the agent serves;
`rehearse` by the child that looks first.
"""

from __future__ import annotations

import errno
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, NoReturn

import msgspec

from etha.errors import EthaError, InvalidRecord
from etha.tensor_bus.claims import (
    LIVE,
    RESTING,
    Claim,
    Client,
    Import,
    Lease,
    Phase,
    Publication,
    Update,
    command_sequence,
)
from etha.tensor_bus.ipc.fence import RELEASED, SLOTS
from etha.tensor_bus.ipc.manifest import validate
from etha.tensor_bus.ipc.peer import Peer
from etha.tensor_bus.journal import Journal
from etha.tensor_bus.records import encode
from etha.tensor_bus.registry import Registry
from etha.tensor_bus.sessions import Session
from etha.tensor_bus.state import (
    AgentRecord,
    ClaimRecord,
    ClientRecord,
    GenerationRecord,
    MemoryRecord,
    OutcomeRecord,
    PublicationRecord,
    ServedRecord,
    VersionRecord,
    key_client,
    key_number,
    memory_key,
    publication_key,
    served_key,
    version_key,
)

logger = logging.getLogger(__name__)

_FOREVER: Final = float("inf")
"""Deadline of what is granted already."""

_KEY_BYTES: Final[dict[type[msgspec.Struct], int]] = {
    AgentRecord: 1,
    GenerationRecord: 1,
    ClientRecord: 17,
    ServedRecord: 17,
    PublicationRecord: 9,
    VersionRecord: 9,
    MemoryRecord: 9,
    OutcomeRecord: 25,
    ClaimRecord: 25,
}
_NUMBER_LIMIT: Final = 1 << 63
_PID_LIMIT: Final = 1 << 31


class Recovered(NamedTuple):
    """Whom a predecessor knew.

    Attributes:
        living: a session for each client whose process lives, without a connection.
        dead: client id to record of those whose process has died.
    """

    living: list[Session]
    dead: dict[bytes, ClientRecord]


def recover(
    records: Mapping[bytes, Any],
    registry: Registry,
    journal: Journal,
    now: float,
    known: Callable[[int, int], Peer] = Peer.known,
) -> Recovered:
    """Fill an empty registry, and tell the journal what is recorded already.

    Args:
        records: key to record, all of the state.
        registry: of the new agent; nobody has connected yet.
        journal: of the new agent.
        now: ``CLOCK_BOOTTIME`` seconds.
        known: finds the process of a pid and a start time; raises `ProcessLookupError` where that is dead.

    Raises:
        InvalidRecord: they hold what no agent writes.
    """
    return _Recovery(records, registry, journal, now, known).run()


def rehearse(records: Mapping[bytes, Any], now: float) -> None:
    """Recover on paper, as if everyone had died, and end them all. Looks for no process, and writes nothing.

    Raises:
        InvalidRecord: the records hold what no agent writes, or contradict each other.
    """
    registry = Registry()
    journal = Journal(_Paper(), registry)
    try:
        for client in recover(records, registry, journal, now, _everyone_is_dead).dead:
            registry.client_died(client, now)
        journal.commit(now)
    except EthaError:
        raise
    except Exception as error:  # whatever it is: it would end each agent that starts on these
        raise InvalidRecord(
            f"what is recorded contradicts itself: {type(error).__name__}: {error}.", resource="state"
        ) from error


def _everyone_is_dead(pid: int, started: int) -> NoReturn:
    raise ProcessLookupError(errno.ESRCH, "on paper")


class _Paper:
    """Takes what a journal writes; only its encoding is of interest."""

    def write(self, changes: Mapping[bytes, msgspec.Struct | None]) -> None:
        for record in changes.values():
            if record is not None:
                encode(record)

    def oldest_reader(self) -> None:
        return None


def _require(sound: bool, what: str) -> None:
    if not sound:
        raise InvalidRecord(f"{what}: no agent writes that.", resource="state")


class _Recovery:
    def __init__(
        self,
        records: Mapping[bytes, Any],
        registry: Registry,
        journal: Journal,
        now: float,
        known: Callable[[int, int], Peer],
    ) -> None:
        self._records = records
        self._registry = registry
        self._journal = journal
        self._now = now
        self._known = known
        self._kinds: dict[type[msgspec.Struct], dict[bytes, Any]] = defaultdict(dict)
        for key, record in records.items():
            _require(len(key) == _KEY_BYTES[type(record)], f"a {type(record).__name__} under a key of {len(key)} bytes")
            self._kinds[type(record)][key] = record
        self._newest = max((each.newest for each in self._kinds[GenerationRecord].values()), default=0)
        _require(0 <= self._newest < _NUMBER_LIMIT, f"a newest generation of {self._newest}")
        self._sizes: list[tuple[Publication, int]] = []
        self._dead: dict[bytes, ClientRecord] = {}

    def run(self) -> Recovered:
        found = Recovered([], self._dead)
        for key, client in self._kinds[ClientRecord].items():
            self._client(key_client(key), client, found)
        for key, publication in self._kinds[PublicationRecord].items():
            self._publication(key_number(key), publication)
        for key, claim in self._kinds[ClaimRecord].items():
            if not self._claim(key_client(key), key_number(key), claim):
                self._journal.forget(key)
        self._end_what_nobody_holds()
        outcomes: dict[bytes, dict[int, OutcomeRecord]] = {}
        for key, outcome in self._kinds[OutcomeRecord].items():
            outcomes.setdefault(key_client(key), {})[key_number(key)] = outcome
        self._journal.inherit(self._records, outcomes, self._sizes, self._newest)
        self._registry.generations = itertools.count(self._newest + 1)
        return found

    def _client(self, client: bytes, record: ClientRecord, found: Recovered) -> None:
        _require(0 < record.pid < _PID_LIMIT and record.started >= 0, f"pid {record.pid}, started {record.started}")
        served: ServedRecord | None = self._kinds[ServedRecord].get(served_key(client))
        _require(0 <= record.slot < SLOTS, f"slot {record.slot}")
        _require(served is None or served.sequence >= 0, "a negative sequence")
        known = Client(
            client, record.pid, record.label, record.since, record.started, connected=False, slot=record.slot
        )
        self._registry.table.clients[client] = known
        self._registry.table.dirty.clients.add(client)
        try:
            peer = self._known(record.pid, record.started)
        except ProcessLookupError:
            found.dead[client] = record
            return
        session = Session(None, peer, record.since)
        session.client = client
        session.served = 0 if served is None else served.sequence
        found.living.append(session)

    def _publication(self, generation: int, record: PublicationRecord) -> None:
        registry = self._registry
        version: VersionRecord | None = self._kinds[VersionRecord].get(version_key(generation))
        owner = registry.table.clients.get(record.owner)
        if version is None or version.phase == Phase.OPENING or not self._is_sound(record):
            for key in (publication_key(generation), version_key(generation), memory_key(generation)):
                self._journal.forget(key)
            return
        _require_sound_numbers(generation, record, version, self._newest)
        publication = Publication(
            generation, record.name, record.owner, record.number, record.manifest, version.version, record.since
        )
        publication.phase, publication.rest = Phase(version.phase), Phase(version.rest)
        if publication.phase is Phase.CLOSING:  # its command is served again, if it is not too late
            publication.phase = publication.rest
        publication.writes, publication.guarded = version.writes, version.guarded
        publication.fence, publication.after = version.fence, dict(version.after)
        publication.layout, publication.sequence = record.layout, record.sequence
        publication.suspended = version.suspended
        publication.wanted_recorded = version.wanted
        live = publication.live and owner is not None
        owned = live and record.owner not in self._dead
        publication.recovering = publication.memory_open = owned and not version.suspended
        if not live and publication.phase in LIVE:
            publication.phase = Phase.DEAD
        registry.publications[generation] = publication
        registry.table.dirty.publications.add(generation)
        self._sizes.append((publication, len(encode(record))))
        if live and owner is not None:
            _require(record.name not in registry.names, f'two publications named "{record.name}"')
            registry.names[record.name] = publication
            owner.publications.add(generation)

    def _is_sound(self, record: PublicationRecord) -> bool:
        try:
            validate(record.manifest)
        except EthaError as error:
            logger.error('what is recorded of "%s" is damaged, and is left out: %s', record.name, error)
            return False
        return True

    def _claim(self, client: bytes, number: int, record: ClaimRecord) -> bool:
        """Whether the claim is held on."""
        registry = self._registry
        publication = registry.publications.get(record.generation)
        known = registry.table.clients.get(client)
        if not record.granted or publication is None or known is None or command_sequence(number) is not None:
            return False
        common: dict[str, Any] = {
            "client": client,
            "number": number,
            "actor": (record.pid, record.thread),
            "label": record.label,
            "name": record.name,
            "generation": record.generation,
            "deadline": _FOREVER,
            "since": record.since,
        }
        claim: Claim
        if record.kind == "lease":
            newest = (publication.version, publication.writes)
            sound = record.version is not None and record.version <= newest[0] and record.writes <= newest[1]
            _require(sound, f'a lease on version {record.version} of "{record.name}", which is at {newest[0]}')
            claim = Lease(**common, version=record.version, writes=record.writes, guarded=record.guarded)
            publication.leases[claim.id] = claim
        elif record.kind == "update" and publication.phase is Phase.WRITING:
            _require(publication.update is None and client == publication.owner, f'two writers of "{record.name}"')
            claim = publication.update = Update(**common)
        elif record.kind == "import":
            _require(0 <= record.layout <= publication.layout, f'layout {record.layout} of "{record.name}"')
            claim = Import(**common, layout=record.layout)
            publication.imports[claim.id] = claim
        else:
            return False
        claim.granted = claim.judged = True
        registry.table.claims[claim.id] = claim
        known.claims.add(claim.id)
        return True

    def _end_what_nobody_holds(self) -> None:
        """A publication that is over, and one that was being written and has no writer on record."""
        registry = self._registry
        for publication in list(registry.publications.values()):
            if publication.phase is Phase.WRITING and publication.update is None:
                publication.phase = publication.rest = Phase.TORN
            if publication.over:
                del registry.publications[publication.generation]
            elif publication.phase in RESTING:
                publication.rest = publication.phase


def _require_sound_numbers(
    generation: int, record: PublicationRecord, version: VersionRecord, newest_generation: int
) -> None:
    title = f'"{record.name}" (generation {generation})'
    _require(0 < generation <= newest_generation, f"{title} behind the newest, {newest_generation}")
    _require(version.phase in _PHASES and version.rest in RESTING, f"{title} in phase {version.phase}/{version.rest}")
    _require(0 <= version.version < _NUMBER_LIMIT, f"{title} at version {version.version}")
    _require(all(0 <= fence < RELEASED for fence in (version.fence, *dict(version.after).values())), f"{title} fenced")
    _require(0 <= version.writes < _NUMBER_LIMIT, f"{title} after {version.writes} writes")
    _require(0 < record.layout < _NUMBER_LIMIT, f"{title} with layout {record.layout}")
    _require(0 < record.sequence < _NUMBER_LIMIT, f"{title} brought by command {record.sequence}")


_PHASES: Final = frozenset(Phase)
