"""The state LMDB: what the agent knows, written by the agent alone, read by anyone of the same user.

It answers while the agent is busy, stopped or dead. A reader copies out what it asked for and ends its transaction at
once, so that no reader keeps old pages alive.

Keys are one letter and what identifies the record::

    a                            AgentRecord        who serves, its heartbeat, its counters
    c  client id                 ClientRecord       a worker
    g                            GenerationRecord   the newest number that was given to a publication
    s  client id                 ServedRecord       its last served command
    o  client id ‖ sequence      OutcomeRecord      what became of an answered command
    p  generation                PublicationRecord  the manifest: written with every registration and rebinding
    v  generation                VersionRecord      what changes with every version
    m  generation                MemoryRecord       which mappings of the owner hold it
    k  client id ‖ number        ClaimRecord        a lease, an update, an import, or the wait for one

A version is small and changes often, a manifest is large and seldom does: hence two keys.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Annotated, Any, Final, TypeVar

import lmdb
import msgspec

from etha.errors import InvalidRecord, StaleHandle
from etha.tensor_bus.environments import fault, open_environment
from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.records import Codec, Failure

MAP_SIZE: Final = 1 << 30
_NUMBER: Final = struct.Struct(">Q")


class AgentRecord(msgspec.Struct, frozen=True, array_like=True):
    """The agent.

    Attributes:
        pid, boot, namespace, epoch, schema, rank, device: as in its lock file.
        command: path of its command queue.
        started, heartbeat: ``CLOCK_BOOTTIME`` seconds. The heartbeat is for people; nothing is decided by it.
        counters: name to count since the start.
    """

    pid: int
    boot: str
    namespace: int
    epoch: int
    schema: int
    rank: int
    device: str
    command: str
    started: float
    heartbeat: float
    counters: dict[str, int]


class ClientRecord(msgspec.Struct, frozen=True, array_like=True):
    """A worker's client.

    Attributes:
        pid: by the kernel's word.
        label: for people.
        started: when the process started, clock ticks since boot: with the pid, its identity. 0 if it was hidden.
        connected: False when the connection ended and the process lives on.
        since: ``CLOCK_BOOTTIME`` seconds.
        slot: its own in the agent's fences, if that has any.
    """

    pid: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
    label: str
    started: int
    connected: bool
    since: float
    slot: int = 0


class GenerationRecord(msgspec.Struct, frozen=True, array_like=True):
    """The newest generation: a successor gives larger numbers only, so that no handle is ever mistaken for another."""

    newest: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class ServedRecord(msgspec.Struct, frozen=True, array_like=True):
    """The largest sequence number of a client that was served."""

    sequence: Annotated[int, msgspec.Meta(ge=0)]


class OutcomeRecord(msgspec.Struct, frozen=True, array_like=True):
    """What became of an answered command.

    Attributes:
        generation: the publication concerned; 0 if there is none.
        failure: why it failed, or None.
    """

    generation: int
    failure: Failure | None


class PublicationRecord(msgspec.Struct, frozen=True, array_like=True):
    """A publication, as registered.

    Attributes:
        name: its name.
        owner: client id.
        pid, label: the owning process.
        manifest: what it shares.
        since: ``CLOCK_BOOTTIME`` seconds.
        number: claim number of the registration that made it.
        sequence: of the command that brought this manifest, a `Register` or the last `Rebind`; its descriptors bear it.
        layout: 1 for the first manifest, one more for each that replaced it.
    """

    name: str
    owner: bytes
    pid: int
    label: str
    manifest: Manifest
    since: float
    number: Annotated[int, msgspec.Meta(ge=0)]
    sequence: Annotated[int, msgspec.Meta(ge=0)]
    layout: Annotated[int, msgspec.Meta(gt=0)]


class VersionRecord(msgspec.Struct, frozen=True, array_like=True):
    """What changes with every version.

    Attributes:
        version: the newest whole version.
        phase: a value of `etha.tensor_bus.claims.Phase`.
        writes: how many updates have begun; a lease is torn when this grew since its grant.
        guarded: False when the version was published without excluding readers.
        wanted: someone waits for the leases to be released, or for the mappings to be closed.
        since: ``CLOCK_BOOTTIME`` seconds of the last change.
        rest: the phase that it returns to when what is going on is withdrawn.
        recovering: the agent is new and has no descriptors of the memory yet: subscriptions wait.
        suspended: the owner has taken its memory back for a while.
        fence: the point of the owner's work behind which the version is whole; 0: it is.
        after: clients that have read it, with the points of their work behind which they read no more.
    """

    version: Annotated[int, msgspec.Meta(ge=0)]
    phase: str
    writes: Annotated[int, msgspec.Meta(ge=0)]
    guarded: bool
    wanted: bool
    since: float
    rest: str
    recovering: bool
    suspended: bool
    fence: int = 0
    after: tuple[tuple[bytes, int], ...] = ()


class ClaimRecord(msgspec.Struct, frozen=True, array_like=True):
    """A claim of a client on a publication, held or waited for.

    Attributes:
        kind: ``"lease"``, ``"update"``, ``"import"``, ``"register"``, ``"rebind"``, ``"suspend"`` or ``"close"``.
        granted: False while it waits.
        generation: the publication; 0 while it waits for one to exist.
        name: the publication's name.
        version: the version leased, or to be reached; None where it means nothing.
        pid, thread, label: who.
        since: ``CLOCK_BOOTTIME`` seconds of the request, or of the grant.
        writes, guarded: of a lease, the publication's at the grant.
        layout: of an import, which manifest its holder has mapped; 0 for none.
    """

    kind: str
    granted: bool
    generation: int
    name: str
    version: int | None
    pid: int
    thread: int
    label: str
    since: float
    writes: int = 0
    guarded: bool = True
    layout: int = 0


class MemoryRecord(msgspec.Struct, frozen=True, array_like=True):
    """Which memory of the owner holds a publication, as the kernel shows it.

    Attributes:
        mappings: per allocation, the address ranges ``(start, end)`` in the owner.
        descriptors: per allocation, the owner's descriptor numbers.
        gate: what forbade the look, or None.
    """

    mappings: tuple[tuple[tuple[int, int], ...], ...]
    descriptors: tuple[tuple[int, ...], ...]
    gate: str | None


R = TypeVar("R", bound=msgspec.Struct)

_LETTERS: Final[dict[type[Any], bytes]] = {
    AgentRecord: b"a",
    ClientRecord: b"c",
    GenerationRecord: b"g",
    ServedRecord: b"s",
    OutcomeRecord: b"o",
    PublicationRecord: b"p",
    VersionRecord: b"v",
    MemoryRecord: b"m",
    ClaimRecord: b"k",
}
_CODECS: Final[dict[bytes, Codec[Any]]] = {letter: Codec(kind) for kind, letter in _LETTERS.items()}

_KEY_BYTES: Final = {b"a": 1, b"g": 1, b"c": 17, b"s": 17, b"o": 25, b"p": 9, b"v": 9, b"m": 9, b"k": 25}

AGENT_KEY: Final = b"a"
GENERATION_KEY: Final = b"g"


def client_key(client: bytes) -> bytes:
    """Key of a `ClientRecord`."""
    return b"c" + client


def served_key(client: bytes) -> bytes:
    """Key of a `ServedRecord`."""
    return b"s" + client


def outcome_key(client: bytes, sequence: int) -> bytes:
    """Key of an `OutcomeRecord`."""
    return b"o" + client + _NUMBER.pack(sequence)


def publication_key(generation: int) -> bytes:
    """Key of a `PublicationRecord`."""
    return b"p" + _NUMBER.pack(generation)


def version_key(generation: int) -> bytes:
    """Key of a `VersionRecord`."""
    return b"v" + _NUMBER.pack(generation)


def memory_key(generation: int) -> bytes:
    """Key of a `MemoryRecord`."""
    return b"m" + _NUMBER.pack(generation)


def claim_key(client: bytes, number: int) -> bytes:
    """Key of a `ClaimRecord`."""
    return b"k" + client + _NUMBER.pack(number)


def key_client(key: bytes) -> bytes:
    """The client id in a key that begins with one."""
    return key[1:17]


def key_number(key: bytes) -> int:
    """The generation, sequence or number at the end of a key."""
    return int(_NUMBER.unpack(key[-_NUMBER.size :])[0])


class StateReader:
    """A worker's or a tool's side. Safe across threads; holds no transaction between calls."""

    def __init__(self, path: str) -> None:
        """Open the state at ``path`` for reading.

        Raises:
            NoAgent, UnsafePath, SystemLimit: see `open_environment`.
        """
        self.path = path
        self._environment = open_environment(path, map_size=MAP_SIZE, readonly=True)

    def superseded(self) -> bool:
        """Whether another file stands at the path now: an agent has begun anew, and knows nothing of what is here."""
        return self._environment.superseded()

    def agent(self) -> AgentRecord | None:
        """Who serves, or served last."""
        return self._get(AGENT_KEY, AgentRecord)

    def publication(self, generation: int) -> PublicationRecord:
        """A publication's manifest.

        Raises:
            StaleHandle: no such generation any more.
        """
        record = self._get(publication_key(generation), PublicationRecord)
        if record is None:
            raise StaleHandle(
                f"generation {generation} is no longer known to the agent.",
                resource=str(generation),
                remedy="Subscribe again.",
            )
        return record

    def version(self, generation: int) -> VersionRecord | None:
        """The newest version of a publication, or None when it is gone."""
        return self._get(version_key(generation), VersionRecord)

    def outcome(self, client: bytes, sequence: int) -> OutcomeRecord | None:
        """What became of a command, if that is known (any more)."""
        return self._get(outcome_key(client, sequence), OutcomeRecord)

    def all(self, kind: type[R]) -> dict[bytes, R]:
        """Key to record of every record of a kind, as one transaction shows them."""
        return self.snapshot((kind,))[kind]

    def snapshot(self, kinds: Iterable[type[Any]]) -> dict[type[Any], dict[bytes, Any]]:
        """Every record of several kinds, as one transaction shows them.

        Raises:
            InvalidRecord: a record is damaged.
        """
        letters = {_LETTERS[kind]: kind for kind in kinds}
        raw: list[tuple[bytes, bytes]] = []
        try:
            with self._environment, self._env.begin() as transaction, transaction.cursor() as cursor:
                for letter in letters:
                    found = cursor.set_range(letter)
                    while found and cursor.key()[:1] == letter:
                        raw.append((bytes(cursor.key()), bytes(cursor.value())))
                        found = cursor.next()
        except lmdb.Error as error:
            raise fault(self.path, error) from error
        result: dict[type[Any], dict[bytes, Any]] = {kind: {} for kind in letters.values()}
        for key, data in raw:
            if len(key) != _KEY_BYTES[key[:1]]:
                raise InvalidRecord(f"{self.path} has a key of {len(key)} bytes.", resource=self.path)
            result[letters[key[:1]]][key] = _CODECS[key[:1]].decode(data)
        return result

    def everything(self) -> dict[bytes, Any]:
        """Key to record of every record, as one transaction shows them.

        Raises:
            InvalidRecord: a record is damaged, or of no kind that is known.
        """
        found: dict[bytes, Any] = {}
        for records in self.snapshot(_LETTERS).values():
            found.update(records)
        return found

    def close(self) -> None:
        """Give back this use of the file."""
        self._environment.close()

    @property
    def _env(self) -> lmdb.Environment:
        return self._environment.env  # of the moment: it may have been opened again

    def _get(self, key: bytes, kind: type[R]) -> R | None:
        try:
            with self._environment, self._env.begin() as transaction:
                data = transaction.get(key)
        except lmdb.Error as error:
            raise fault(self.path, error) from error
        if data is None:
            return None
        record: R = _CODECS[key[:1]].decode(data)
        return record
