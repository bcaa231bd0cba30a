"""The tensors of one publication, gone through once: names checked, each tensor described, each storage found once.

What every kind of memory does before it exports anything. Where a storage lies is the business of a subclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Generic, TypeVar

from etha.errors import InvalidArgument
from etha.tensor_bus.ipc.manifest import TensorSpec, name_fault
from etha.tensor_bus.ipc.shareable import dtype_name, refusal

if TYPE_CHECKING:
    import torch

Row = TypeVar("Row")
"""What a kind of memory notes of one storage."""


class Survey(Generic[Row]):
    """The tables of a manifest, collected tensor by tensor, without opening anything.

    One tensor object under several names is one; tensors over one storage are over one.

    Attributes:
        rows: one per storage, as `locate` or `no_bytes` says.
        kept: the storages, in the same order; None for one of no bytes.
        specs, names, tensors: as in a manifest; the tensors by name, as they were given.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.kept: list[torch.UntypedStorage | None] = []
        self.specs: list[TensorSpec] = []
        self.names: dict[str, int] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self._spec_of: dict[int, int] = {}
        self._row_of: dict[int, int] = {}

    def locate(self, name: str, storage: torch.UntypedStorage) -> Row:
        """Find a storage that has bytes; ``name`` is the first tensor's in it.

        Raises:
            NotShareable: it lies where it cannot be shared.
        """
        raise TypeError(f"{type(self).__name__} does not say where {name!r} lies")

    def no_bytes(self) -> Row:
        """What is noted of a storage of which nothing is used: it may lie anywhere."""
        raise TypeError(f"{type(self).__name__} does not say what no bytes are")

    def add_all(self, tensors: object, kind: str) -> None:
        """Describe every tensor of a mapping.

        Args:
            tensors: name to tensor.
            kind: the device type that all of them must have.

        Raises:
            InvalidArgument: no mapping, or a name that is no string, empty, or too long.
            NotShareable: ``resource`` names the tensor; the text says why, and what to do.
        """
        import torch

        named = _checked_names(tensors)
        with torch._C.DisableTorchFunction():
            for name, value in named.items():
                fault = refusal(value, kind)
                if fault is not None:
                    raise fault.error(name)
                if isinstance(value, torch.Tensor):
                    self._add(name, value)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        spec = self._spec_of.get(id(tensor))
        if spec is None:
            spec = self._spec_of[id(tensor)] = len(self.specs)
            self.specs.append(
                TensorSpec(
                    storage=self._row(name, tensor),
                    dtype=dtype_name(tensor.dtype),
                    shape=tuple(tensor.shape),
                    stride=tuple(tensor.stride()),
                    offset=int(tensor.storage_offset()) * tensor.element_size(),
                )
            )
        self.names[name] = spec
        self.tensors[name] = tensor

    def _row(self, name: str, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if tensor.numel() == 0 or storage.nbytes() == 0:
            return self._append(self.no_bytes(), None)
        row = self._row_of.get(storage._cdata)
        if row is None:
            row = self._row_of[storage._cdata] = self._append(self.locate(name, storage), storage)
        return row

    def _append(self, row: Row, kept: torch.UntypedStorage | None) -> int:
        self.rows.append(row)
        self.kept.append(kept)
        return len(self.rows) - 1


def _checked_names(tensors: object) -> dict[str, object]:
    if not isinstance(tensors, Mapping):
        raise InvalidArgument(
            f"tensors is a {type(tensors).__qualname__}, not a mapping of names to tensors.",
            remedy="Give dict(module.named_parameters()), for example.",
        )
    named: dict[str, object] = {}
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise InvalidArgument(f"The tensor name {name!r} is no string.", resource=repr(name))
        fault = name_fault(name)
        if fault is not None:
            raise InvalidArgument(f"A tensor name {fault}.", resource=ascii(name[:64]))
        named[name] = value
    return named
