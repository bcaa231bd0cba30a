"""What a publication is made of: its allocations, storages and tensors, who owns them and who reads them.

Pure: from the records of the state LMDB, and from looks at processes that its caller has taken, to one view. Linear in
tensors, storages, and allocations times the processes that hold them. For ``etha inspect``, whose ``--json`` these
structs are; all ages are seconds, all sizes and offsets bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from etha.cli.survey import phase_of
from etha.tensor_bus.ipc.allocations import Allocation, HostAllocation, pieces
from etha.tensor_bus.ipc.manifest import ITEMSIZE, Manifest
from etha.tensor_bus.state import ClaimRecord, ClientRecord, PublicationRecord, VersionRecord

Ranges = tuple[tuple[int, int], ...]
"""Address ranges, each from its first byte to behind its last."""


class Look(NamedTuple):
    """What a process has of a publication's memory, by allocation.

    Attributes:
        taken: ``"now"``; ``"at registration"``, by the agent; or ``"never"``, and then both tables are empty.
        state: of the process, now: ``"running"``, ``"stopped"``, ``"zombie"``, ``"dead"`` or ``"unknown"``.
        gate: what forbids the look now (see `etha.tensor_bus.ipc.observation.Observation`), or None.
        mappings: per allocation, the address ranges in the process.
        descriptors: per allocation, its descriptor numbers.
    """

    taken: str
    state: str
    gate: str | None
    mappings: Sequence[Ranges] = ()
    descriptors: Sequence[tuple[int, ...]] = ()


class ClaimView(msgspec.Struct, frozen=True):
    """A lease, an update, an import, a registration or a closing, held or waited for.

    Attributes:
        kind: ``"lease"``, ``"update"``, ``"import"``, ``"register"`` or ``"close"``.
        granted: False while it waits.
        version: the version leased, or to be reached.
        age_s: since the grant, or since it began to wait.
    """

    kind: str
    granted: bool
    version: int | None
    pid: int
    label: str
    thread: int
    age_s: float


class ProcessView(msgspec.Struct, frozen=True):
    """The owner, or a reader.

    Attributes:
        state: as in `Look`.
        connected: False when its connection ended, and when the agent no longer knows it.
        age_s: since it registered, or subscribed.
        looked: ``"now"``, ``"at registration"`` or ``"never"``.
        gate: what forbids a look at its memory now, or None.
        mapped: how many allocations it has mapped.
    """

    pid: int
    label: str
    state: str
    connected: bool
    age_s: float
    looked: str
    gate: str | None
    mapped: int


class Holding(msgspec.Struct, frozen=True):
    """What one process has of one allocation: ``role`` is ``"owner"`` or ``"reader"``."""

    role: str
    pid: int
    mappings: Ranges
    descriptors: tuple[int, ...]


class AllocationView(msgspec.Struct, frozen=True):
    """What is shared as a whole.

    Attributes:
        kind: of its handle: ``"host"``, ``"cuda-legacy"`` or ``"cuda-fd"``.
        device, inode: the file that it is; None for memory of a device.
        gpu: UUID of the device that it lies on, hexadecimal; None for host memory.
        descriptors: how many it takes to open it.
        holders: the processes that were seen to have it mapped or open.
    """

    number: int
    kind: str
    nbytes: int
    device: int | None
    inode: int | None
    gpu: str | None
    descriptors: int
    holders: tuple[Holding, ...]


class StorageView(msgspec.Struct, frozen=True):
    """A byte range of an allocation; ``allocation`` is None for one of no bytes. ``tensors`` view it."""

    number: int
    allocation: int | None
    offset: int
    nbytes: int
    tensors: int


class TensorView(msgspec.Struct, frozen=True):
    """One name.

    Attributes:
        tied_to: the first name of the same tensor, if this is another.
        storage: its number; several tensors may lie in one.
        allocation: None for a tensor of a storage without bytes.
        offset: from the allocation's first byte.
        storage_offset: from the storage's first byte.
        nbytes: elements times item size.
        stride: in elements.
    """

    name: str
    tied_to: str | None
    storage: int
    allocation: int | None
    offset: int
    storage_offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str


class Anatomy(msgspec.Struct, frozen=True):
    """One publication, whole.

    Attributes:
        phase: a value of `etha.tensor_bus.claims.Phase`, ``"suspended"``, or with ``", recovering"`` behind it.
        writes: updates begun.
        guarded: False when the version was published without excluding readers.
        wanted: someone waits for the leases to end.
        changed_s: since the last change of version or phase.
        nbytes: of all storages, each once.
        claims: everything held and waited for, imports left out: those are the readers.
    """

    name: str
    generation: int
    version: int | None
    phase: str
    writes: int
    guarded: bool
    wanted: bool
    age_s: float
    changed_s: float | None
    nbytes: int
    owner: ProcessView
    readers: tuple[ProcessView, ...]
    claims: tuple[ClaimView, ...]
    allocations: tuple[AllocationView, ...]
    storages: tuple[StorageView, ...]
    tensors: tuple[TensorView, ...]


class Reader(NamedTuple):
    """An import: the claim, the client that has it, and the look at its process."""

    claim: ClaimRecord
    client: ClientRecord | None
    look: Look


class Owner(NamedTuple):
    """The owner's client, None once the agent no longer knows it, and the look at its process."""

    client: ClientRecord | None
    look: Look


def anatomy(
    generation: int,
    record: PublicationRecord,
    version: VersionRecord | None,
    owner: Owner,
    readers: Sequence[Reader],
    claims: Sequence[ClaimRecord],
    device: str,
    now: float,
) -> Anatomy:
    """Put the view together.

    Args:
        generation: of the publication.
        record, version: its records; the manifest has passed `validate`.
        owner: whose it is.
        readers: its imports.
        claims: its other claims.
        device: what its agent serves.
        now: ``CLOCK_BOOTTIME`` seconds.
    """
    manifest = record.manifest
    looks = {reader.claim.pid: ("reader", reader.look) for reader in readers} | {record.pid: ("owner", owner.look)}
    return Anatomy(
        name=record.name,
        generation=generation,
        version=None if version is None else version.version,
        phase=phase_of(version),
        writes=0 if version is None else version.writes,
        guarded=version is not None and version.guarded,
        wanted=version is not None and version.wanted,
        age_s=now - record.since,
        changed_s=None if version is None else now - version.since,
        nbytes=manifest.nbytes,
        owner=_process(record.pid, record.label, owner.client, owner.look, now - record.since),
        readers=tuple(
            _process(each.claim.pid, each.claim.label, each.client, each.look, now - each.claim.since)
            for each in readers
        ),
        claims=tuple(
            ClaimView(each.kind, each.granted, each.version, each.pid, each.label, each.thread, now - each.since)
            for each in claims
        ),
        allocations=tuple(
            _allocation(number, allocation, looks) for number, allocation in enumerate(manifest.allocations)
        ),
        storages=_storages(manifest),
        tensors=_tensors(manifest, device),
    )


def _process(pid: int, label: str, client: ClientRecord | None, look: Look, age: float) -> ProcessView:
    connected = client is not None and client.connected and look.state != "dead"
    mapped = sum(map(bool, look.mappings))
    return ProcessView(pid, label, look.state, connected, age, look.taken, look.gate, mapped)


def _allocation(number: int, allocation: Allocation, looks: dict[int, tuple[str, Look]]) -> AllocationView:
    holders = []
    for pid, (role, look) in sorted(looks.items(), key=lambda item: item[1][0] != "owner"):
        mappings = look.mappings[number] if number < len(look.mappings) else ()
        descriptors = look.descriptors[number] if number < len(look.descriptors) else ()
        if mappings or descriptors:
            holders.append(Holding(role, pid, tuple(mappings), tuple(descriptors)))
    holding = tuple(holders)
    kind = str(allocation.__struct_config__.tag)
    count = len(pieces(allocation))
    if isinstance(allocation, HostAllocation):
        return AllocationView(number, kind, allocation.size, allocation.device, allocation.inode, None, count, holding)
    return AllocationView(number, kind, allocation.size, None, None, allocation.device.hex(), count, holding)


def _storages(manifest: Manifest) -> tuple[StorageView, ...]:
    viewed = Counter(spec.storage for spec in manifest.tensors)
    return tuple(
        StorageView(
            number,
            None if storage.allocation < 0 else storage.allocation,
            storage.offset,
            storage.nbytes,
            viewed[number],
        )
        for number, storage in enumerate(manifest.storages)
    )


def _tensors(manifest: Manifest, device: str) -> tuple[TensorView, ...]:
    first: dict[int, str] = {}
    rows = []
    for name, index in manifest.names.items():
        spec = manifest.tensors[index]
        storage = manifest.storages[spec.storage]
        rows.append(
            TensorView(
                name=name,
                tied_to=first.get(index),
                storage=spec.storage,
                allocation=None if storage.allocation < 0 else storage.allocation,
                offset=storage.offset + spec.offset,
                storage_offset=spec.offset,
                nbytes=math.prod(spec.shape) * ITEMSIZE[spec.dtype],
                dtype=spec.dtype,
                shape=spec.shape,
                stride=spec.stride,
                device=device,
            )
        )
        first.setdefault(index, name)
    return tuple(rows)
