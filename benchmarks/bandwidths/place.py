"""Which memory a row is of.

On a device that is decided by torch's allocator, which is told by the environment, once, when torch is imported.
"""

from __future__ import annotations

import os
from typing import Final, Literal, NamedTuple

Kind = Literal["host", "legacy", "fd"]

_SETTINGS: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""The second is the newer name of the first."""


class Place(NamedTuple):
    """One kind of memory.

    Attributes:
        kind: the host's; or a device's, shared by legacy handle (cudaMalloc) or by descriptor (virtual memory).
    """

    kind: Kind

    @property
    def device(self) -> str:
        """For torch and for the agent. Of several devices the program has shown the one that was named."""
        return "cpu" if self.kind == "host" else "cuda:0"

    def prepare(self) -> None:
        """Have torch, which this process has not imported yet, give memory of this kind; its children inherit it."""
        for setting in _SETTINGS:
            os.environ.pop(setting, None)
            if self.kind == "fd":
                os.environ[setting] = "expandable_segments:True"


def places(device: str) -> tuple[Place, ...]:
    """Those that a device has."""
    return (Place("host"),) if device == "cpu" else (Place("legacy"), Place("fd"))
