"""From the registry to the state LMDB: everything that changed in one turn of the control loop is one transaction.

Only when that is committed are the effects carried out, so no worker is told of what a reader of the state could not
see.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Final, Protocol

import msgspec

from etha.errors import QueueFull, SystemLimit
from etha.tensor_bus.chronicle import Chronicle
from etha.tensor_bus.claims import (
    Claim,
    ClaimId,
    Closing,
    Import,
    Lease,
    Publication,
    Rebinding,
    Registration,
    Suspending,
    Update,
)
from etha.tensor_bus.records import MAX_RECORD_BYTES
from etha.tensor_bus.registry import Registry
from etha.tensor_bus.state import (
    GENERATION_KEY,
    MAP_SIZE,
    ClaimRecord,
    ClientRecord,
    GenerationRecord,
    OutcomeRecord,
    PublicationRecord,
    ServedRecord,
    VersionRecord,
    claim_key,
    client_key,
    memory_key,
    outcome_key,
    publication_key,
    served_key,
    version_key,
)

logger = logging.getLogger(__name__)

_OUTCOMES_KEPT: Final = 64
"""Per client: more than it has threads that wait."""

MANIFEST_LIMIT: Final = MAX_RECORD_BYTES - (1 << 20)
"""Bytes of one registration: its publication's record, with the owner's label, is a little longer."""

MANIFESTS_LIMIT: Final = MAP_SIZE // 4
"""Bytes of all registrations at a time. The rest is room for what else is recorded, for the copies that LMDB keeps of
changed pages, and for the old pages that a reader which stands still holds on to."""

_KINDS: Final[dict[type[Claim], str]] = {
    Lease: "lease",
    Update: "update",
    Import: "import",
    Registration: "register",
    Rebinding: "rebind",
    Suspending: "suspend",
    Closing: "close",
}


class Writer(Protocol):
    """What is written to: a `StateWriter`, but for rehearsals."""

    def write(self, changes: Mapping[bytes, msgspec.Struct | None]) -> None: ...

    def oldest_reader(self) -> str | None: ...


class Journal:
    """Collects one turn's changes and commits them. Used by the control loop only."""

    def __init__(self, writer: Writer, registry: Registry) -> None:
        self._writer = writer
        self._registry = registry
        self._changes: dict[bytes, msgspec.Struct | None] = {}
        self._recorded: dict[int, tuple[ClaimId, int]] = {}
        self._newest = 0
        self._reserved: dict[ClaimId, int] = {}
        self._reserved_bytes = 0
        self._halted = False
        self._outcomes: dict[bytes, dict[int, OutcomeRecord]] = {}
        self._chronicle = Chronicle()

    def served(self, client: bytes, sequence: int) -> None:
        """The client's commands up to ``sequence`` have had their effect."""
        self._changes[served_key(client)] = ServedRecord(sequence)

    def outcome(self, client: bytes, sequence: int, record: OutcomeRecord) -> None:
        """What became of a command."""
        kept = self._outcomes.setdefault(client, {})
        kept[sequence] = record
        if len(kept) > _OUTCOMES_KEPT:
            oldest = next(iter(kept))
            del kept[oldest]
            self._changes[outcome_key(client, oldest)] = None
        self._changes[outcome_key(client, sequence)] = record

    def outcomes(self, client: bytes) -> Mapping[int, OutcomeRecord]:
        """Sequence to outcome of the client's commands, as far as they are kept, the oldest first."""
        return self._outcomes.get(client, {})

    def inherit(
        self,
        records: Mapping[bytes, msgspec.Struct],
        outcomes: dict[bytes, dict[int, OutcomeRecord]],
        manifests: Iterable[tuple[Publication, int]],
        newest: int,
    ) -> None:
        """Go on where a predecessor has ended: what it recorded stands in the state already.

        Args:
            records: all of it.
            outcomes: client to sequence to outcome, each in order.
            manifests: publications that are recorded, each with the bytes of its record.
            newest: the newest generation.
        """
        self._chronicle.inherit(records.items())
        self._outcomes = outcomes
        self._newest = newest
        for publication, size in manifests:
            self._recorded[publication.generation] = (publication.brought_by, publication.layout)
            self._reserved[publication.brought_by] = size
            self._reserved_bytes += size

    def forget(self, key: bytes) -> None:
        """Delete a record."""
        self._changes[key] = None

    def put(self, key: bytes, record: msgspec.Struct) -> None:
        """Any other record."""
        self._changes[key] = record

    def forget_client(self, client: bytes) -> None:
        """The client is gone: so are its records, its claims excepted, which the registry ends."""
        self._changes[client_key(client)] = None
        self._changes[served_key(client)] = None
        for sequence in self._outcomes.pop(client, ()):
            self._changes[outcome_key(client, sequence)] = None

    def reserve(self, claim: ClaimId, name: str, size: int) -> None:
        """Keep room for a registration, until its publication is forgotten or it has failed.

        Raises:
            QueueFull: it is too long, or there is no room for it beside those that are there.
        """
        if size > MANIFEST_LIMIT or self._reserved_bytes + size > MANIFESTS_LIMIT:
            raise QueueFull(
                f'the manifest of "{name}" has {size} bytes; one may have {MANIFEST_LIMIT}, and all together'
                f" {MANIFESTS_LIMIT}, of which {self._reserved_bytes} are taken.",
                resource=name,
                remedy="Register fewer tensors at once, close publications, or use an agent of another rank too.",
            )
        self._reserved[claim] = size
        self._reserved_bytes += size

    def commit(self, now: float) -> None:
        """Write everything that has changed since the last time that this succeeded.

        Raises:
            QueueFull, SystemLimit: nothing was written, and nothing of it is forgotten.
        """
        if self._registry.table.dirty:
            self._collect(now)
        if self._changes:
            self._writer.write(self._changes)
            changes, self._changes = self._changes, {}
            self._chronicle.committed(changes)

    def record(self, now: float) -> bool:
        """`commit`, and say in the log that it fails, or that it does no more; whether it did not fail."""
        try:
            self.commit(now)
        except (QueueFull, SystemLimit) as error:
            if not self._halted:
                stale = self._writer.oldest_reader() or "none"
                logger.error("nothing can be recorded, so nothing is granted (oldest reader: %s): %s", stale, error)
            self._halted = True
            return False
        if self._halted:
            logger.warning("it can be recorded again")
        self._halted = False
        return True

    def _collect(self, now: float) -> None:
        table = self._registry.table
        dirty = table.take_dirty()
        for claim_id in dirty.claims:
            claim = table.claims.get(claim_id)
            self._changes[claim_key(*claim_id)] = None if claim is None else _claim_record(claim)
        for generation in dirty.publications:
            self._collect_publication(generation, now)
        ended = [claim_id for claim_id in dirty.claims & self._reserved.keys() if claim_id not in table.claims]
        if ended:
            recorded = {made_by for made_by, _ in self._recorded.values()}
            for claim_id in ended:
                if claim_id not in recorded:
                    self._free(claim_id)
        for client_id in dirty.clients:
            client = table.clients.get(client_id)
            if client is None:
                self.forget_client(client_id)
            else:
                self._changes[client_key(client_id)] = ClientRecord(
                    client.pid, client.label, client.started, client.connected, client.since, client.slot
                )

    def _collect_publication(self, generation: int, now: float) -> None:
        publication = self._registry.publications.get(generation)
        if publication is None:
            forgotten = self._recorded.pop(generation, None)
            if forgotten is not None:
                self._free(forgotten[0])
            for key in (publication_key(generation), version_key(generation), memory_key(generation)):
                self._changes[key] = None
            return
        known = self._recorded.get(generation)
        if known is None or known[1] != publication.layout:
            owner = self._registry.table.clients.get(publication.owner)
            if owner is None:
                return  # it came and went within one turn: nobody was told of it
            if known is not None:
                self._free(known[0])
            self._recorded[generation] = (publication.brought_by, publication.layout)
            self._changes[publication_key(generation)] = PublicationRecord(
                name=publication.name,
                owner=owner.id,
                pid=owner.pid,
                label=owner.label,
                manifest=publication.manifest,
                since=publication.since,
                number=publication.number,
                sequence=publication.sequence,
                layout=publication.layout,
            )
            if generation > self._newest:
                self._newest = generation
                self._changes[GENERATION_KEY] = GenerationRecord(generation)
        self._changes[version_key(generation)] = _version_record(publication, now)

    def _free(self, claim: ClaimId) -> None:
        self._reserved_bytes -= self._reserved.pop(claim, 0)


def _claim_record(claim: Claim) -> ClaimRecord:
    return ClaimRecord(
        kind=_KINDS[type(claim)],
        granted=claim.granted,
        generation=claim.generation,
        name=claim.name,
        version=(claim.version if claim.granted else claim.exact or claim.minimum)
        if isinstance(claim, Lease)
        else None,
        pid=claim.actor[0],
        thread=claim.actor[1],
        label=claim.label,
        since=claim.since,
        writes=claim.writes if isinstance(claim, Lease) else 0,
        guarded=claim.guarded if isinstance(claim, Lease) else True,
        layout=claim.layout if isinstance(claim, Import) else 0,
    )


def _version_record(publication: Publication, now: float) -> VersionRecord:
    return VersionRecord(
        version=publication.version,
        phase=publication.phase.value,
        writes=publication.writes,
        guarded=publication.guarded,
        wanted=publication.wanted or not publication.live,
        since=now,
        rest=publication.rest.value,
        recovering=publication.recovering,
        suspended=publication.suspended,
        fence=publication.fence,
        after=tuple(publication.after.items()),
    )
