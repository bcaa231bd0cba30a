"""What a new agent takes over from its predecessor: from the records of the state back to a registry.

A claim that was granted is still held, whoever comes back first, until its holder releases it, does not name it any
more when it reconnects, or is dead. A claim that was waiting is not restored: a request is made again by its worker
when that reconnects, a command stands in the queue and is served again. Whoever died while there was no agent is ended
as if its death had just been seen.

A publication keeps its version and its phase; one whose registration was not answered never existed. Its memory is
*recovering* until descriptors of it are there again: taken from the owner, or sent by it.

Nothing here reads a file: the agent hands in what it has read. Called once, before the agent serves.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from etha.errors import EthaError, InvalidRecord
from etha.tensor_bus.claimants import NUMBER_LIMIT
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
from etha.tensor_bus.ipc.manifest import validate
from etha.tensor_bus.ipc.peer import Peer
from etha.tensor_bus.journal import Journal
from etha.tensor_bus.records import encode
from etha.tensor_bus.registry import Registry
from etha.tensor_bus.sessions import Session
from etha.tensor_bus.state import (
    ClaimRecord,
    ClientRecord,
    GenerationRecord,
    OutcomeRecord,
    PublicationRecord,
    ServedRecord,
    VersionRecord,
    key_client,
    key_number,
    memory_key,
    publication_key,
    version_key,
)

logger = logging.getLogger(__name__)

_PHASES: Final = frozenset(phase.value for phase in Phase)

_FOREVER: Final = float("inf")
"""Deadline of what is granted already."""


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
    """
    return _Recovery(records, registry, journal, now, known).run()


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
            self._kinds[type(record)][key] = record
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
        newest = max((each.newest for each in self._kinds[GenerationRecord].values()), default=0)
        newest = max(newest, *self._registry.publications, 0)
        self._journal.inherit(self._records, outcomes, self._sizes, newest)
        self._registry.generations = itertools.count(newest + 1)
        return found

    def _client(self, client: bytes, record: ClientRecord, found: Recovered) -> None:
        known = Client(client, record.pid, record.label, record.since, record.started, connected=False)
        self._registry.table.clients[client] = known
        self._registry.table.dirty.clients.add(client)
        try:
            peer = self._known(record.pid, record.started)
        except ProcessLookupError:
            found.dead[client] = record
            return
        session = Session(None, peer, record.since)
        session.client = client
        served = self._kinds[ServedRecord].get(b"s" + client)
        session.served = 0 if served is None else served.sequence
        found.living.append(session)

    def _publication(self, generation: int, record: PublicationRecord) -> None:
        registry = self._registry
        version: VersionRecord | None = self._kinds[VersionRecord].get(version_key(generation))
        owner = registry.table.clients.get(record.owner)
        if version is None or version.phase == Phase.OPENING or not self._is_sound(generation, record, version):
            for key in (publication_key(generation), version_key(generation), memory_key(generation)):
                self._journal.forget(key)
            return
        publication = Publication(
            generation, record.name, record.owner, record.number, record.manifest, version.version, record.since
        )
        publication.phase, publication.rest = Phase(version.phase), Phase(version.rest)
        if publication.phase is Phase.CLOSING:  # its command is served again, if it is not too late
            publication.phase = publication.rest
        publication.writes, publication.guarded = version.writes, version.guarded
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
            registry.names[record.name] = publication
            owner.publications.add(generation)

    def _is_sound(self, generation: int, record: PublicationRecord, version: VersionRecord) -> bool:
        """Whether it can be gone on with: what an agent wrote can, but any process of the user may have written."""
        try:
            validate(record.manifest)
            if version.phase not in _PHASES or version.rest not in RESTING or generation >= NUMBER_LIMIT:
                raise InvalidRecord(f"generation {generation} is {version.phase!r:.40}, rests {version.rest!r:.40}.")
            if version.phase in LIVE and record.name in self._registry.names:
                raise InvalidRecord(f"generation {generation} has the name of another.")
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
            claim = Lease(**common, version=record.version, writes=record.writes, guarded=record.guarded)
            publication.leases[claim.id] = claim
        elif record.kind == "update" and publication.phase is Phase.WRITING:
            claim = publication.update = Update(**common)
        elif record.kind == "import":
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
