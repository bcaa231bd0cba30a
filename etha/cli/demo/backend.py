"""Which backend this box gives the demo, and why; decided without loading torch."""

from __future__ import annotations

import ctypes
from pathlib import Path


def describe_backend() -> str:
    """``host backend (...)``, with the reason why it is not a GPU."""
    missing = []
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        missing.append("no /dev/nvidia*")
    if not _can_load("libcuda.so.1"):
        missing.append("no libcuda.so.1")
    if missing:
        return f"host backend (no GPU found: {' and '.join(missing)})"
    return "host backend (a GPU is here, and the demo does not measure on one yet)"


def _can_load(library: str) -> bool:
    """Whether the dynamic linker finds it; loading libcuda creates no context and touches no device."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
