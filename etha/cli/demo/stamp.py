"""The stamp: a seal over every tensor of a version, by which a torn read shows itself.

The trainer seals inside ``update``; a reader recomputes the seal from the bytes in place. Bytes of
two versions under one seal, or a seal of another version than the bytes, do not match.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

NAME: Final = "demo.stamp"
"""Under which the stamp is registered, beside the parameters."""

_EXTRA: Final = 2
"""Entries after the checksums: the version, and when it was sealed."""

_MIX: Final = 0x9E3779B97F4A7C15 - (1 << 64)
"""2**64 over the golden ratio, as int64: multiples of neighbouring versions differ in half their bits."""


@dataclass(frozen=True)
class Verdict:
    """What a reader found."""

    torn: bool
    version: int
    sealed_ns: int
    """CLOCK_MONOTONIC when the trainer had written the last byte: one clock for the whole box."""


def blank(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A stamp for ``tensors``: int64, (len + 2,), in shared memory, not yet sealed."""
    stamp = torch.zeros(len(tensors) + _EXTRA, dtype=torch.int64)
    stamp.share_memory_()  # type: ignore[no-untyped-call]
    return stamp


def seal(stamp: torch.Tensor, tensors: Mapping[str, torch.Tensor], version: int) -> None:
    """Writes the seal of ``version`` over the bytes that ``tensors`` hold now."""
    stamp[:-_EXTRA] = _checksums(tensors, version)
    stamp[-_EXTRA] = version
    stamp[-1] = time.monotonic_ns()


def check(stamp: torch.Tensor, tensors: Mapping[str, torch.Tensor], version: int | None = None) -> Verdict:
    """Recomputes the seal from the bytes in place.

    Args:
        stamp: As registered.
        tensors: All that it covers, by the names they were registered under.
        version: What the lease says; None for a reader that has no lease to compare with.
    """
    sealed_version, sealed_ns = int(stamp[-_EXTRA]), int(stamp[-1])
    matches = torch.equal(_checksums(tensors, sealed_version), stamp[:-_EXTRA])
    torn = not matches or (version is not None and version != sealed_version)
    return Verdict(torn, sealed_version, sealed_ns)


@torch.no_grad()
def _checksums(tensors: Mapping[str, torch.Tensor], version: int) -> torch.Tensor:
    """One int64 a tensor, sorted by name: the sum of its 32-bit words, wrapping, mixed with the version.

    A sum misses two words that were exchanged, and nothing that an optimizer step does to float32
    words; it reads the tensor where it lies, at memory speed.
    """
    mixed = torch.tensor(version, dtype=torch.int64) * _MIX
    sums = [tensors[name].detach().view(-1).view(torch.int32).sum() for name in sorted(tensors)]
    return torch.stack(sums) ^ mixed
