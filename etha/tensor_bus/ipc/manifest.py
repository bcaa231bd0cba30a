"""The records that say what is shared, and the one check of them.

A manifest is three tables and the names. An *allocation* is what the operating system or the driver shares as
a whole (see `etha.tensor_bus.ipc.allocations`); a *storage* is a byte range of one allocation, what torch calls
an untyped storage; a *tensor* is dtype, shape, strides and offset over one storage. Names point at tensors, and two
names may point at one: that is how tied tensors stay tied.

The module is pure: it imports neither torch nor anything that does I/O. `validate()` must have passed before any
number of a manifest is used to map or to view memory.

The rows hold numbers and strings, so no cycle can go through them: they are made without the collector's knowledge
(``gc=False``), which would else look at each of tens of thousands again and again.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, Final

import msgspec

from etha.errors import InvalidRecord
from etha.tensor_bus.ipc import allocations as kinds
from etha.tensor_bus.ipc.allocations import MAX_INT64, Allocation, HostAllocation

ITEMSIZE: Final[dict[str, int]] = {
    "bool": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
}
"""Bytes per element of every dense dtype that can be shared, by torch's canonical name.

Quantized dtypes are absent (their scale is no part of the storage), and so are sub-byte integers and ``bits``
(torch itself cannot compute on them). An older torch may lack some: see `etha.tensor_bus.ipc.view`.
"""

MAX_ENTRIES: Final = 2**20
"""Rows of one table, and names, of one manifest."""

MAX_DIMENSIONS: Final = 64
"""Dimensions of one tensor: what torch's own kernels take (``at::TensorIterator``) is 64 too."""

MAX_NAME_BYTES: Final = 1024
"""Bytes of one tensor name in UTF-8."""

_ENTRIES: Final = msgspec.Meta(max_length=MAX_ENTRIES)
_DIMENSIONS: Final = msgspec.Meta(max_length=MAX_DIMENSIONS)
"""Checked as a record is read, so that one which is too long is refused before it has become objects."""


class Storage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A byte range of one allocation.

    Attributes:
        allocation: index into `Manifest.allocations`; -1 for a storage of no bytes.
        offset: first byte within the allocation.
        nbytes: length in bytes; 0 only with ``allocation == -1``.
    """

    allocation: int
    offset: int
    nbytes: int


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor over one storage.

    Attributes:
        storage: index into `Manifest.storages`.
        dtype: torch's name without the prefix (``"bfloat16"``), a key of `ITEMSIZE`.
        shape: elements per dimension, each >= 0; ``()`` for a zero-dimensional tensor.
        stride: elements between neighbours per dimension, each >= 0.
        offset: bytes from the storage's first byte to the first element, a multiple of the item size.
    """

    storage: int
    dtype: str
    shape: Annotated[tuple[int, ...], _DIMENSIONS]
    stride: Annotated[tuple[int, ...], _DIMENSIONS]
    offset: int


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """Everything a reader needs to see a publication's tensors, and nothing of their bytes.

    Attributes:
        allocations: each once.
        storages: each once, however many tensors view it.
        tensors: each once, however many names it has.
        names: name to index into ``tensors``, in the owner's order.
    """

    allocations: Annotated[tuple[Allocation, ...], _ENTRIES]
    storages: Annotated[tuple[Storage, ...], _ENTRIES]
    tensors: Annotated[tuple[TensorSpec, ...], _ENTRIES]
    names: Annotated[dict[str, int], _ENTRIES]

    @property
    def pieces(self) -> tuple[Hashable, ...]:
        """What each descriptor that belongs to it is of: allocation by allocation, and there chunk by chunk."""
        return tuple(piece for allocation in self.allocations for piece in kinds.pieces(allocation))

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, each counted once."""
        return sum(storage.nbytes for storage in self.storages)


def rows_by_file(manifest: Manifest) -> dict[tuple[int, int], int]:
    """Device and inode to row of the allocations that are files of host memory."""
    rows = enumerate(manifest.allocations)
    return {(each.device, each.inode): row for row, each in rows if isinstance(each, HostAllocation)}


def validate(manifest: Manifest) -> None:
    """Refuse a manifest of which any number could lead outside its allocations.

    Pure, and linear in the size of the manifest. Every bound is checked in Python's unbounded integers, and
    everything that torch or the kernel will later compute in int64 is checked to fit in it, so what passes
    here cannot overflow there. The memory itself is another matter: whether it is as long as its allocation says is
    checked where that is opened.

    A tensor without elements touches no byte, so its offset and strides need only be numbers torch accepts.

    Args:
        manifest: decoded from another process's bytes, or about to be sent.

    Raises:
        InvalidRecord: ``resource`` is the tensor's name where one is known, else the row (``"storages[3]"``).
    """
    for table, rows in (
        ("allocations", manifest.allocations),
        ("storages", manifest.storages),
        ("tensors", manifest.tensors),
        ("names", manifest.names),
    ):
        if len(rows) > MAX_ENTRIES:
            raise InvalidRecord(f"{len(rows)} {table}, more than {MAX_ENTRIES}.", resource=table)
    _validate_allocations(manifest.allocations)
    _validate_storages(manifest)
    _validate_names(manifest)
    storages = manifest.storages
    for index, spec in enumerate(manifest.tensors):
        fault = _fault(spec, storages)
        if fault is not None:
            name = next(name for name, target in manifest.names.items() if target == index)
            raise InvalidRecord(f"tensor {name!r}: {fault}.", resource=name)


def _validate_allocations(allocations: tuple[Allocation, ...]) -> None:
    identities: set[Hashable] = set()
    for index, allocation in enumerate(allocations):
        resource = f"allocations[{index}]"
        fault = kinds.fault(allocation)
        if fault is not None:
            raise InvalidRecord(f"{resource} {fault}.", resource=resource)
        identity = kinds.identity(allocation)
        if identity in identities:
            raise InvalidRecord(f"{resource} repeats an earlier allocation.", resource=resource)
        identities.add(identity)


def _validate_storages(manifest: Manifest) -> None:
    sizes = [allocation.size for allocation in manifest.allocations]
    for index, storage in enumerate(manifest.storages):
        resource = f"storages[{index}]"
        if storage.allocation == -1:
            if storage.offset != 0 or storage.nbytes != 0:
                raise InvalidRecord(f"{resource} has bytes but no allocation.", resource=resource)
            continue
        if not 0 <= storage.allocation < len(sizes):
            raise InvalidRecord(
                f"{resource} lies in allocation {storage.allocation} of {len(sizes)}.", resource=resource
            )
        if storage.nbytes <= 0:
            raise InvalidRecord(f"{resource} has an allocation but {storage.nbytes} bytes.", resource=resource)
        size = sizes[storage.allocation]
        if storage.offset < 0 or storage.offset + storage.nbytes > size:
            raise InvalidRecord(
                f"{resource} ends at byte {storage.offset + storage.nbytes} of an allocation of {size}.",
                resource=resource,
            )


def _validate_names(manifest: Manifest) -> None:
    count = len(manifest.tensors)
    named = bytearray(count)
    for name, index in manifest.names.items():
        fault = name_fault(name)
        if fault is not None:
            raise InvalidRecord(f"a tensor name {fault}.", resource=ascii(name[:64]))
        if not 0 <= index < count:
            raise InvalidRecord(f"tensor {name!r} is number {index} of {count}.", resource=name)
        named[index] = 1
    missing = named.find(0)
    if missing >= 0:
        raise InvalidRecord(f"tensors[{missing}] has no name.", resource=f"tensors[{missing}]")


def name_fault(name: str) -> str | None:
    """Say why ``name`` cannot name a tensor (``"is empty"``), or None if it can."""
    if not name:
        return "is empty"
    try:
        length = len(name) if name.isascii() else len(name.encode())
    except UnicodeEncodeError:
        return "is not encodable as UTF-8"
    return f"has {length} bytes, more than {MAX_NAME_BYTES}" if length > MAX_NAME_BYTES else None


def _fault(spec: TensorSpec, storages: tuple[Storage, ...]) -> str | None:
    """Say what is wrong with one tensor, or None. The hot loop of `validate`: 10,000 calls in some 20 ms."""
    if not 0 <= spec.storage < len(storages):
        return f"it lies in storage {spec.storage} of {len(storages)}"
    itemsize = ITEMSIZE.get(spec.dtype)
    if itemsize is None:
        return f"its dtype {spec.dtype[:64]!r} is none that can be shared"
    shape, stride = spec.shape, spec.stride
    if len(shape) != len(stride):
        return f"it has {len(shape)} dimensions but {len(stride)} strides"
    if len(shape) > MAX_DIMENSIONS:
        return f"it has {len(shape)} dimensions, more than {MAX_DIMENSIONS}"
    if not 0 <= spec.offset <= MAX_INT64:
        return f"its offset is {spec.offset}"
    if spec.offset % itemsize:
        return f"its offset {spec.offset} is no multiple of its item size {itemsize}"
    numel = 1
    last = 0
    for size, step in zip(shape, stride, strict=True):
        if not (0 <= size <= MAX_INT64 and 0 <= step <= MAX_INT64):
            return f"a size of {size} with a stride of {step} is out of range"
        # In torch's order: a zero hides only the sizes that come after it (c10::TensorImpl::safe_compute_numel).
        numel *= size
        if numel > MAX_INT64:
            return "its number of elements does not fit in 63 bits"
        last += (size - 1) * step
    if numel == 0:
        return None
    end = spec.offset + (last + 1) * itemsize
    if end > storages[spec.storage].nbytes:
        return f"it ends at byte {end} of a storage of {storages[spec.storage].nbytes}"
    return None
