"""Device memory behind one face: what a worker or an agent does with it, through the process's table of mappings.

Not returned by `backend_for`, and nothing of the bus uses it yet: its records are not frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from etha.errors import InvalidRecord
from etha.tensor_bus.ipc.backend import Backend, Opened
from etha.tensor_bus.ipc.cuda import Device, open_allocation
from etha.tensor_bus.ipc.cuda_export import CudaExport, export
from etha.tensor_bus.ipc.cuda_records import CudaAllocation, CudaManifest, descriptors, validate
from etha.tensor_bus.ipc.manifest import Allocation, Manifest
from etha.tensor_bus.ipc.mapping import TABLE, ImportedMemory, MappingTable
from etha.tensor_bus.ipc.mapping import Mapping as TableMapping


class CudaBackend:
    """One device, as one client uses it.

    Attributes:
        device: the device.
        owner: 16-byte id of the client.
        kind: the tensors' device type.
    """

    def __init__(self, device: Device, owner: bytes, kind: str = "cuda") -> None:
        self.device = device
        self.owner = owner
        self.kind = kind

    def export(self, tensors: Mapping[str, object]) -> CudaExport:
        """Share the memory under tensors; see `cuda_export.export`."""
        return export(self.device, self.owner, tensors, self.kind)

    def import_memory(
        self, manifest: CudaManifest, fds: Sequence[int], table: MappingTable | None = None
    ) -> ImportedMemory:
        """Validate a manifest and map all of its allocations, or none; each once in this process.

        Args:
            manifest: from another process, or from this one.
            fds: one per chunk, in the order of the allocations; neither kept nor closed. Of an allocation that is
                mapped already they are not looked at: the driver has no call that tells what a descriptor leads to.
            table: where to open them; None for the process's.

        Raises:
            InvalidRecord: the manifest is none, descriptors are missing, or memory is shorter than claimed.
            InvalidArgument, StaleHandle, DriverError, SystemLimit: see `cuda.open_allocation`.
        """
        validate(manifest)
        if len(fds) != manifest.descriptors:
            raise InvalidRecord(f"{len(fds)} descriptors came for {manifest.descriptors} chunks.", resource="fds")
        place = TABLE if table is None else table
        opened: list[TableMapping] = []
        try:
            first = 0
            for allocation in manifest.allocations:
                count = descriptors(allocation)
                opener = self._opener(fds[first : first + count])
                first += count
                # The table asks of an allocation only that it can be a key; its type has one kind until the records
                # are frozen. The descriptor that it passes on is none: an allocation here may have many, or none.
                opened.append(place.open(cast(Allocation, allocation), -1, opener))
            return ImportedMemory(cast(Manifest, manifest), opened, place)
        except BaseException:
            for mapping in opened:
                place.release(mapping)
            raise

    def _opener(self, fds: Sequence[int]) -> Backend:
        def open_it(_: int, allocation: Allocation) -> Opened:
            return open_allocation(self.device, cast(CudaAllocation, allocation), fds)

        return Backend(self.kind, self.export, lambda fd, allocation: None, open_it)
