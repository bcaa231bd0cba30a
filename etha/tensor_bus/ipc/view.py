"""From mapped bytes to tensors: one base per storage, then dtype, offset, shape and strides on it.

A storage is exactly as long as its owner's, so neighbours in the same allocation cannot be reached by arithmetic on a
view, and tensors that share a storage there share one here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from etha.errors import InvalidRecord
from etha.tensor_bus.ipc.backend import HOST, Backend
from etha.tensor_bus.ipc.manifest import ITEMSIZE, Manifest, TensorSpec

if TYPE_CHECKING:
    import torch

    from etha.tensor_bus.ipc.mapping import ImportedMemory


def build_views(manifest: Manifest, imported: ImportedMemory, backend: Backend = HOST) -> dict[str, torch.Tensor]:
    """Make the tensors of a manifest over the memory imported for it.

    The tensors alias the owner's memory and never require a gradient. Writing to one of host memory ends the process
    with SIGSEGV: the pages are mapped read-only, which torch does not know. Names of one tensor share one tensor
    object.

    Args:
        manifest: has passed `validate`; the one ``imported`` was made from.
        imported: still open; each call makes views of its own.
        backend: of its kind.

    Returns:
        name to tensor, in the manifest's order. Memory stays mapped until the last tensor over it is gone.

    Raises:
        InvalidRecord: a dtype that this torch does not have, or geometry that it refuses; ``resource`` is the name.
        LeaseReleased: ``imported`` was closed.
    """
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    # The caller's modes are not meant for this: fake tensors have no memory, and what is made in inference mode can
    # take no part in autograd later.
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.inference_mode(False):
        storages = [
            (backend.base(imported.buffer(row)) if storage.nbytes else backend.empty()).untyped_storage()
            for row, storage in enumerate(manifest.storages)
        ]
        first_name: dict[int, str] = {}
        for name, index in manifest.names.items():
            first_name.setdefault(index, name)
        tensors = [
            _view(first_name[index], backend.empty(), storages[spec.storage], spec)
            for index, spec in enumerate(manifest.tensors)
        ]
    return {name: tensors[index] for name, index in manifest.names.items()}


def _view(name: str, empty: torch.Tensor, storage: torch.UntypedStorage, spec: TensorSpec) -> torch.Tensor:
    import torch

    dtype = getattr(torch, spec.dtype, None) if spec.dtype in ITEMSIZE else None
    if not isinstance(dtype, torch.dtype):
        raise InvalidRecord(
            f"tensor {name!r} has the dtype {spec.dtype[:64]}, which torch {torch.__version__} does not have.",
            resource=name,
            remedy="Use the owner's version of torch.",
        )
    # Not torch.empty(0, dtype=dtype): of complex32 it warns, and the reader did not choose the dtype.
    view = empty.view(dtype)
    try:
        return view.set_(storage, spec.offset // dtype.itemsize, spec.shape, spec.stride)
    except RuntimeError as error:
        raise InvalidRecord(
            f"tensor {name!r} has a geometry that torch {torch.__version__} refuses.", resource=name
        ) from error
