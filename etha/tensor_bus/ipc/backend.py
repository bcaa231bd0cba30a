"""The seam between kinds of memory: what every backend can do, and which one serves a device type.

A caller asks `backend_for` once and never looks at a device again; ``cuda`` will be a second `Backend` here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from etha.errors import InvalidArgument
from etha.tensor_bus.ipc import host
from etha.tensor_bus.ipc.export import Export
from etha.tensor_bus.ipc.manifest import Allocation


class Opened(Protocol):
    """One allocation opened in this process."""

    @property
    def address(self) -> int:
        """Address of the first byte."""

    @property
    def size(self) -> int:
        """Bytes, > 0."""

    def close(self) -> None:
        """Unmap; idempotent. Only called when no view is left."""


@dataclass(frozen=True)
class Backend:
    """What a kind of memory offers.

    Attributes:
        kind: the device type it serves, as in ``torch.device.type``.
        export: tensors by name to an `Export`; raises `InvalidArgument`, `NotShareable` or `SystemLimit`.
        check_descriptor: refuses a descriptor that is not what an allocation claims; raises `StaleHandle` or
            `InvalidRecord`.
        open_allocation: descriptor and claim to an `Opened`, read-only; checks the descriptor first.
    """

    kind: str
    export: Callable[[Mapping[str, object]], Export]
    check_descriptor: Callable[[int, Allocation], None]
    open_allocation: Callable[[int, Allocation], Opened]


HOST: Final = Backend("cpu", host.export, host.check_descriptor, host.open_allocation)


def backend_for(device_type: str) -> Backend:
    """The backend that serves a device type.

    Args:
        device_type: as in ``torch.device.type``, without an index.

    Raises:
        InvalidArgument: this build has none for it.
    """
    if device_type == HOST.kind:
        return HOST
    raise InvalidArgument(
        f"No backend serves {device_type!r} memory; this build has host memory only.",
        resource=device_type,
        remedy="Use an agent whose device is cpu.",
    )
