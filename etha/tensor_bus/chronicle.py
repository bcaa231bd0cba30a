"""What the agent's log tells of its workers: who came, what they registered, what ended, what was refused.

Told from the records, once they are committed: so the log says nothing that the state did not show, and the parts of
the agent need not each remember to tell. A version, a lease and an update are the workers' daily work: they are not
told. With INFO off, a commit costs one look at the logger's level.

Used by the journal alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from etha.tensor_bus.claims import LIVE, Phase
from etha.tensor_bus.command_queue import CLIENT_ID_BYTES
from etha.tensor_bus.state import ClientRecord, OutcomeRecord, PublicationRecord, VersionRecord, key_number

logger = logging.getLogger(__name__)

_CLIENT: Final = slice(1, 1 + CLIENT_ID_BYTES)
_TOLD: Final = {phase.value for phase in LIVE} - {Phase.OPENING.value}
"""Of a publication that was told of as registered."""


@dataclass
class _Known:
    """A publication that was told of, or will be once it is open."""

    title: str
    owner: str
    content: str
    phase: str


class Chronicle:
    """Tells each commit's news. Used by the control loop only."""

    def __init__(self) -> None:
        self._clients: dict[bytes, ClientRecord] = {}
        self._publications: dict[int, _Known] = {}

    def inherit(self, records: Iterable[tuple[bytes, msgspec.Struct]]) -> None:
        """A predecessor has told of these: their ends are told here."""
        phases: dict[int, str] = {}
        for key, record in records:
            if isinstance(record, ClientRecord):
                self._clients[key[_CLIENT]] = record
            elif isinstance(record, PublicationRecord):
                self._publication(key_number(key), record)
            elif isinstance(record, VersionRecord):
                phases[key_number(key)] = record.phase
        for generation, known in self._publications.items():
            known.phase = phases.get(generation, known.phase)

    def committed(self, changes: Mapping[bytes, msgspec.Struct | None]) -> None:
        """These changes are in the state."""
        if not logger.isEnabledFor(logging.INFO):
            return
        for key, record in changes.items():
            letter = key[:1]
            if letter == b"c":
                self._client(key[_CLIENT], record)
            elif letter == b"p":
                self._publication(key_number(key), record)
            elif letter == b"v":
                self._version(key_number(key), record)
            elif letter == b"o" and isinstance(record, OutcomeRecord) and record.failure is not None:
                failure = record.failure
                who = self._label(key[_CLIENT])
                logger.info("refused %s, command %d: %s: %s", who, key_number(key), failure.leaf, failure.message)

    def _client(self, client: bytes, record: msgspec.Struct | None) -> None:
        if not isinstance(record, ClientRecord):
            self._clients.pop(client, None)
            return
        known, self._clients[client] = self._clients.get(client), record
        if known is None:
            logger.info("%s joined", record.label)
        elif known.connected and not record.connected:
            logger.info("%s has no connection any more; what it holds stays until it dies", record.label)

    def _publication(self, generation: int, record: msgspec.Struct | None) -> None:
        if isinstance(record, PublicationRecord) and generation in self._publications:
            known = self._publications[generation]
            logger.info("%s moved %s: layout %d", known.owner, known.title, record.layout)
        elif isinstance(record, PublicationRecord):
            content = f"{len(record.manifest.names)} tensors, {record.manifest.nbytes} bytes"
            self._publications[generation] = _Known(
                f'"{record.name}" (generation {generation})', record.label, content, Phase.OPENING.value
            )

    def _version(self, generation: int, record: msgspec.Struct | None) -> None:
        known = self._publications.get(generation)
        if known is None:
            return
        before = known.phase
        known.phase = record.phase if isinstance(record, VersionRecord) else Phase.CLOSED.value
        if before == Phase.OPENING and known.phase in _TOLD:
            logger.info("%s registered %s: %s", known.owner, known.title, known.content)
        elif known.phase == Phase.TORN and before != known.phase:
            logger.info("%s is torn: an update of %s ended half-way", known.title, known.owner)
        elif known.phase == Phase.DEAD and before != known.phase:
            logger.info("%s is over: its owner, %s, died", known.title, known.owner)
        elif known.phase == Phase.CLOSED and before in _TOLD:
            logger.info("%s of %s is closed", known.title, known.owner)
        if record is None:
            del self._publications[generation]

    def _label(self, client: bytes) -> str:
        known = self._clients.get(client)
        return "a worker" if known is None else known.label
