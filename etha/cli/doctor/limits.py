"""Descriptors and locked memory, against what a model of 16 GB takes.

Descriptors: the owner and the agent hold one for each allocation. In host memory that is one for each storage: some
hundreds for a dense model. In virtual GPU memory it is one for each chunk of 20 MiB, torch's segment: some 800 for
16 GB.

Locked memory: host memory that is shared takes none. What a GPU's driver will pin for etha is the table of fences, 8
bytes for each writer and reader; 64 KiB are 8,192 of them, and what Linux allowed everyone before 5.16 (8 MiB since).
Libraries for RDMA lock what they register, which is the model.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from collections.abc import Callable
from typing import Final

from etha.cli.doctor.finding import Finding, Gate
from etha.cli.doctor.runner import Check
from etha.cli.doctor.surroundings import fitting, size
from etha.errors import SystemLimit
from etha.tensor_bus.ipc.descriptors import reserve_descriptors

_MODEL_DESCRIPTORS: Final = 800
_SMALL_DESCRIPTORS: Final = 32
"""What the smallest publication, its connection and two LMDB files take, with room."""

_FENCES: Final = 64 << 10

NOFILE: Final = Gate("gates", "RLIMIT_NOFILE", f"making room for the {_MODEL_DESCRIPTORS} descriptors of a 16 GB model")
MEMLOCK: Final = Gate("gates", "RLIMIT_MEMLOCK", f"locking {size(_FENCES)}")


def checks() -> list[Check]:
    """Both limits; the soft limit that is raised is the child's own."""
    return [Check(NOFILE, lambda: [_descriptors()]), Check(MEMLOCK, lambda: [_locked()])]


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    seen = f"soft {_limit(soft)}, hard {_limit(hard)}"
    remedy = fitting(
        "sudo prlimit --pid $$ --nofile=65536:65536  # for good: limits.conf, or LimitNOFILE=65536 in the unit",
        docker="docker run --ulimit nofile=65536:65536",
        kubernetes="Raise LimitNOFILE of the node's container runtime: a pod cannot.",
    )
    try:
        reserve_descriptors(_SMALL_DESCRIPTORS)
    except SystemLimit as error:
        return NOFILE.broken(f"{seen}: {error.message}", "not even a small model can be registered", remedy)
    try:
        reserve_descriptors(_MODEL_DESCRIPTORS, _MODEL_DESCRIPTORS)
    except SystemLimit as error:
        means = "a model with hundreds of storages cannot be registered (SystemLimit)"
        return NOFILE.degraded(f"{seen}: {error.message}", means, remedy)
    return NOFILE.ok(seen, "etha raises its own soft limit to the hard one when it must")


def _locked() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    seen = f"soft {_limit(soft, size)}, hard {_limit(hard, size)}"
    refused = _lock()
    if refused is None:
        return MEMLOCK.ok(
            seen,
            "host memory that is shared is not locked; only RDMA, which locks what it registers, wants a model's size",
        )
    return MEMLOCK.degraded(
        f"{seen}: {refused}",
        "sharing host memory takes none; what pins memory (a GPU's fences, RDMA) will fail",
        fitting(
            "sudo prlimit --pid $$ --memlock=unlimited  # for good: limits.conf, or LimitMEMLOCK=infinity in the unit",
            docker="docker run --ulimit memlock=-1",
            kubernetes="securityContext: {capabilities: {add: [IPC_LOCK]}}",
        ),
    )


def _lock() -> str | None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    with mmap.mmap(-1, _FENCES) as memory:
        first = ctypes.c_char.from_buffer(memory)
        failed = libc.mlock(ctypes.addressof(first), _FENCES) != 0
        number = ctypes.get_errno()
        del first  # mmap cannot be closed while something points into it
    return f"{os.strerror(number)} ({errno.errorcode.get(number, number)})" if failed else None


def _limit(value: int, form: Callable[[int], str] = str) -> str:
    if value == resource.RLIM_INFINITY:
        return "unlimited"
    return form(value)
