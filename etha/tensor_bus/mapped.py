"""A publication's memory in a reader, as it lies at one time: an import, its mapping, and the tensors over it.

Made by a `Subscription`, which replaces it when the owner has moved its tensors. Its end is told to the agent by
`Endings.import_over`, once no tensor of it is left.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from etha.tensor_bus import clock, packets
from etha.tensor_bus.ipc.mapping import ImportedMemory, import_memory
from etha.tensor_bus.ipc.view import build_views
from etha.tensor_bus.link import Link

if TYPE_CHECKING:
    import torch


class Mapped:
    """An import and what is mapped for it. Ended by `end`, or when it is dropped.

    Attributes:
        number: of the import.
        generation, version: as the agent said when it was granted.
        layout: which manifest is mapped; 0 for none.
        tensors: name to tensor.
    """

    _over = True

    def __init__(self, link: Link, name: str, timeout: float, follows: int = 0) -> None:
        """Wait for the publication to exist and map it; ``follows``: this generation's memory anew, or nothing.

        Raises:
            EthaError: see `TensorBusClient.subscribe`. Nothing is left mapped.
        """
        self.number = link.number()
        self.tensors: dict[str, torch.Tensor] = {}
        self._link = link
        self._memory: ImportedMemory | None = None
        deadline = clock.deadline_after(timeout)
        packet = packets.Subscribe(self.number, name, threading.get_native_id(), deadline, follows)
        try:
            reply, mail = link.request(self.number, packet, timeout)
            if not isinstance(reply, packets.Imported):
                raise TypeError(f"an import was expected, not {type(reply).__name__}")
            self.generation, self.version, self.layout = reply.generation, reply.version, reply.layout
            record = link.state.publication(reply.generation)
            backend = link.device.backend
            self._memory = import_memory(record.manifest, mail.descriptors(), backend=backend)
            mail.close()
            self.tensors = build_views(record.manifest, self._memory, backend)
            self._over = False
        except BaseException:
            if self._memory is not None:
                self._memory.close()
            link.connection.tell(packets.Release(self.number))
            raise

    def at(self, layout: int) -> dict[str, torch.Tensor] | None:
        """The tensors, if this layout is what is mapped; None otherwise, and once it is over."""
        tensors = self.tensors  # first: whoever takes them away says before that they are not mapped
        return tensors if self.layout == layout and not self._over else None

    def unmap(self) -> None:
        """Close the memory, and tell the agent; the import goes on. Leases that are out keep their tensors."""
        self._link.endings.import_over(self.number, self._memory, subscribed=True)
        self.layout = 0
        self.tensors = {}
        self._memory = None

    def end(self) -> None:
        """Give the import back; idempotent. May be called by a finaliser."""
        if not self._over and not self._link.connection.forked:
            # Noted before anything is undone: whatever interrupts this, the next call of etha completes it.
            self._link.endings.import_over(self.number, self._memory)
            self._over = True
            self.tensors = {}

    def __del__(self) -> None:
        self.end()
