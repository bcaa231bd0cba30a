"""What the owner holds for one registered publication: the manifest, the descriptors, and the pin.

The pin is references: to each tensor and, apart from them, to each storage, so that the bytes outlive even a
``param.data = ...``. References do not stop a storage from being resized or a tensor from being moved off it, so
`Export.check` compares, at every publish, what is with what was exported. Nor do they stop a module from putting other
parameters in their place (``load_state_dict(assign=True)``). That shows in a tensor that others held when it was
exported, and that nobody holds now: whoever publishes means something else.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from operator import le, sub
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from etha.errors import StorageMoved

if TYPE_CHECKING:
    import torch

    from etha.tensor_bus.ipc.descriptors import SharedFd
    from etha.tensor_bus.ipc.manifest import Manifest


_OWN_REFERENCES: Final = next(map(sys.getrefcount, [object()]))
"""To each tensor, by an export, as this Python counts: in the list that it checks, and the count's own argument."""


class Export:
    """The memory under one set of tensors, pinned and described.

    Attributes:
        manifest: what a reader needs.
        fds: one per ``manifest.allocations``, in the same order.
        tensors: the tensors by name, as they were given; read-only.
        reopen: descriptors as ``fds`` were, the caller's to close: for an agent that has restarted.
    """

    def __init__(
        self,
        manifest: Manifest,
        fds: tuple[SharedFd, ...],
        tensors: Mapping[str, torch.Tensor],
        storages: Sequence[torch.UntypedStorage | None],
        reopen: Callable[[], tuple[SharedFd, ...]] = tuple,
    ) -> None:
        """Take over what a backend has exported.

        Args:
            manifest: has passed `validate`.
            fds: one per allocation; they are this object's from now on.
            tensors: by name, the same object under each of its names.
            storages: one per ``manifest.storages``; None for a storage of no bytes.
            reopen: makes the descriptors anew; raises `NotShareable` or `SystemLimit` where that cannot be.
        """
        import torch

        self.manifest = manifest
        self.fds = fds
        self.reopen = reopen
        self.tensors = MappingProxyType(dict(tensors))
        first_name: dict[int, str] = {}
        for name, index in manifest.names.items():
            first_name.setdefault(index, name)
        self._names = [first_name[index] for index in range(len(manifest.tensors))]
        self._plain = torch._C.DisableTorchFunction
        self._data_ptr = torch.Tensor.data_ptr
        self._nbytes = torch.UntypedStorage.nbytes
        self._pinned = [self.tensors[name] for name in self._names]
        self._storages = [storage for storage in storages if storage is not None]
        with self._plain():
            self._addresses = list(map(self._data_ptr, self._pinned))
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._rows = [row for row, storage in enumerate(storages) if storage is not None]
        self._watch_holders()

    def _watch_holders(self) -> None:
        """Find the tensors that somebody holds besides us, our backend, and the mapping that they came in."""
        names = Counter(self.manifest.names.values())
        counts = map(sys.getrefcount, self._pinned)
        ours = [names[row] + _OWN_REFERENCES for row in range(len(self._pinned))]
        # For now there are two more mappings: the one that was given to the backend, and its copy given to us.
        held = [count > own + 2 * names[row] for row, (count, own) in enumerate(zip(counts, ours, strict=True))]
        self._watched = list(compress(self._pinned, held))
        self._ours = [own + 1 for own in compress(ours, held)]  # `_watched` is one more

    def check(self) -> None:
        """Compare each tensor's address and each storage's size with what was exported.

        Four passes in C, no Python per element. The geometry is not compared: a tensor that was transposed in place
        still lies where it lay.

        Raises:
            StorageMoved: ``resource`` is the name of the first tensor that moved, whose storage was resized, or that
                nobody but this export holds any more, though others did when it was made.
        """
        # A subclass, or torch.set_default_device, would answer each data_ptr() in Python (3 µs instead of 0.13).
        with self._plain():
            if (
                list(map(self._data_ptr, self._pinned)) != self._addresses
                or list(map(self._nbytes, self._storages)) != self._sizes
            ):
                self._name_culprit()
            if self._watched and min(map(sub, map(sys.getrefcount, self._watched), self._ours)) <= 0:
                self._name_dropped()

    def _name_dropped(self) -> None:
        dropped = list(map(le, map(sys.getrefcount, self._watched), self._ours))
        for tensor in compress(self._watched, dropped):
            if tensor._use_count() == 1:  # type: ignore[attr-defined]  # else a view can still write
                name = next(name for name, ours in self.tensors.items() if ours is tensor)
                raise StorageMoved(
                    f"tensor {name!r} is held by nobody but etha: another has taken its place.",
                    resource=name,
                    remedy="Rebind the tensors as they are now: rebind(dict(module.named_parameters())).",
                )

    def _name_culprit(self) -> None:
        remedy = "Rebind the tensors as they are now: rebind(dict(module.named_parameters()))."
        for name, tensor, address in zip(self._names, self._pinned, self._addresses, strict=True):
            if self._data_ptr(tensor) != address:
                raise StorageMoved(
                    f"tensor {name!r} no longer lies where it was exported.", resource=name, remedy=remedy
                )
        for row, storage, size in zip(self._rows, self._storages, self._sizes, strict=True):
            if self._nbytes(storage) != size:
                specs = self.manifest.tensors
                name = next(name for name, spec in zip(self._names, specs, strict=True) if spec.storage == row)
                raise StorageMoved(
                    f"the storage of tensor {name!r} was resized from {size} to {storage.nbytes()} bytes.",
                    resource=name,
                    remedy=remedy,
                )

    def close_fds(self) -> None:
        """Close the descriptors that are ours and forget torch's; idempotent. The pin stays."""
        for fd in self.fds:
            fd.close()
