"""What an owner shares under one name: the export of today, and those before it that a reader may still have mapped.

Each export is pinned (its tensors and storages are referenced) from before it is announced until no importer can have
it mapped any more. While a publication is suspended, nothing is: only weak references remember which tensors it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from etha.errors import InvalidArgument, StorageMoved
from etha.tensor_bus.ipc.export import Export

if TYPE_CHECKING:
    import torch

    from etha.tensor_bus.ipc.descriptors import SharedFd


class Shared:
    """One publication's exports. Used under its owner's discipline: one thread moves it at a time."""

    def __init__(
        self,
        name: str,
        exporter: Callable[[Mapping[str, object]], Export],
        exports: dict[int, Export],
        export: Export,
        sequence: int,
    ) -> None:
        """Take over what has been announced.

        Args:
            name: of the publication.
            exporter: of the backend.
            exports: the client's, by the sequence of the command that announced each.
            export: what is shared.
            sequence: of its command.
        """
        self._name = name
        self._exporter = exporter
        self._exports = exports
        self._export: Export | None = export
        self._manifest = export.manifest
        self._sequence = sequence
        self._layout = 1
        self._retired: list[tuple[int, Export]] = []
        self._doubtful: dict[int, Export] = {}
        self._perhaps_suspended = False
        self._remembered: dict[str, weakref.ref[torch.Tensor]] = {}

    def check(self) -> None:
        """Compare what is with what was exported.

        Raises:
            StorageMoved: ``resource`` is the name of the first tensor that moved.
        """
        if self._doubtful:
            raise StorageMoved(
                f'whether "{self._name}" was rebound is not known.', resource=self._name, remedy="Call rebind() again."
            )
        if self._export is not None:
            self._export.check()

    def export_anew(self, tensors: Mapping[str, torch.Tensor] | None) -> Export:
        """Export the tensors, or (None) those that were shared before; the descriptors are open until `close_fds`.

        Raises:
            InvalidArgument: names, dtypes or shapes differ from what was shared, or a tensor is gone.
            NotShareable, SystemLimit: see `etha.tensor_bus.ipc.host.export`.
        """
        export = self._exporter(self._those_before() if tensors is None else tensors)
        try:
            self._require_alike(export)
        except BaseException:
            export.close_fds()
            raise
        return export

    def moved(self, export: Export) -> list[SharedFd | None]:
        """The descriptors of an export, None for each piece that the agent surely has already."""
        if self._export is None or self._doubtful or self._perhaps_suspended:
            return list(export.fds)
        here = set(self._export.manifest.pieces)
        return [None if piece in here else fd for piece, fd in zip(export.manifest.pieces, export.fds, strict=True)]

    def replace(self, export: Export, sequence: int, layout: int) -> None:
        """The agent has it: it is what is shared now. What was before is pinned on, until `let_go`."""
        before = [each for each in (self._export, *self._doubtful.values()) if each is not None]
        self._retired.extend((layout - 1, each) for each in before)
        self._perhaps_suspended = False
        for old in {self._sequence, *self._doubtful} - {sequence}:
            self._exports.pop(old, None)
        self._doubtful.clear()
        self._export, self._manifest, self._sequence, self._layout = export, export.manifest, sequence, layout

    def doubt(self, export: Export, sequence: int) -> None:
        """Whether the agent has it is not known: pin both; a successor of its may ask for either."""
        self._doubtful[sequence] = export
        if sequence:
            self._exports[sequence] = export

    def doubt_memory(self) -> None:
        """Whether it is suspended is not known: pin what there is, and rely on nothing that the agent had."""
        self._perhaps_suspended = True

    def let_go(self, oldest: int) -> None:
        """No reader has anything mapped that is older than this layout."""
        if self._retired:
            self._retired = [(layout, export) for layout, export in self._retired if layout >= oldest]

    def suspend(self) -> None:
        """No importer has anything mapped: let go of all, and remember which tensors it was."""
        if self._export is not None:
            self._remembered = {name: weakref.ref(tensor) for name, tensor in self._export.tensors.items()}
        self.clear()

    def clear(self) -> None:
        """Let go of everything."""
        for sequence in (self._sequence, *self._doubtful):
            self._exports.pop(sequence, None)
        self._export = None
        self._retired.clear()
        self._doubtful.clear()

    def _those_before(self) -> Mapping[str, torch.Tensor]:
        if self._export is not None:
            return self._export.tensors
        found = {name: reference() for name, reference in self._remembered.items()}
        alive = {name: tensor for name, tensor in found.items() if tensor is not None}
        gone = next((name for name, tensor in found.items() if tensor is None), None)
        if gone is not None:
            raise InvalidArgument(
                f'the tensor {gone!r} was dropped while "{self._name}" was suspended.',
                resource=gone,
                remedy="Give the tensors: resume(dict(module.named_parameters())).",
            )
        return alive

    def _require_alike(self, export: Export) -> None:
        before, now = self._manifest, export.manifest
        for name in {**before.names, **now.names}:
            if name not in before.names or name not in now.names:
                side = "was not" if name not in before.names else "is not"
                raise InvalidArgument(
                    f'"{name}" {side} among the tensors of "{self._name}".',
                    resource=name,
                    remedy="Rebind the same names; for others, close and register.",
                )
            old, new = before.tensors[before.names[name]], now.tensors[now.names[name]]
            if (old.dtype, old.shape) != (new.dtype, new.shape):
                raise InvalidArgument(
                    f'"{name}" was {old.dtype} of shape {old.shape}, and is {new.dtype} of shape {new.shape}.',
                    resource=name,
                    remedy="Rebind tensors of the same dtype and shape; for others, close and register.",
                )
