"""/dev/shm: where torch puts shared tensors. Is it there, is it memory, and does a model fit?

How much is enough: a model of 16 GB, or half of the memory that there is, whichever is less; half is what Linux gives
/dev/shm unless told otherwise (tmpfs(5)), and Docker gives 64 MiB.
"""

from __future__ import annotations

import errno
import os
import tempfile
from typing import Final

from etha.cli.doctor.finding import Finding, Gate
from etha.cli.doctor.runner import Check
from etha.cli.doctor.surroundings import MODEL_BYTES, file_system, fitting, memory_bytes, size

DIRECTORY: Final = "/dev/shm"
_TRIED_BYTES: Final = 1 << 20
_NEARLY: Final = 0.9
"""Half of the memory is never quite what tmpfs takes for half."""

SHM: Final = Gate("gates", DIRECTORY, f"making a file of {size(_TRIED_BYTES)} in {DIRECTORY}, and asking for its size")

_NOTHING: Final = "torch cannot put a tensor there, so no host memory can be shared"
_MEMORY: Final = ("tmpfs", "ramfs", "shm", "?")
_RAN_OUT: Final = (errno.ENOSPC, errno.EDQUOT)


def checks() -> list[Check]:
    """One check."""
    return [Check(SHM, lambda: [_look()])]


def _look() -> Finding:
    if not os.path.isdir(DIRECTORY):
        return SHM.broken("there is no such directory", _NOTHING, _mount())
    found = os.statvfs(DIRECTORY)
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    seen = f"{size(total)}, of which {size(free)} are free"
    try:
        _make_file()
    except OSError as error:
        if error.errno in _RAN_OUT:
            return SHM.broken(f"{error.strerror}: {seen}", _NOTHING, _enlarge() if total < _wanted() else _tidy())
        return SHM.broken(
            f"{error.strerror}", _NOTHING, f"sudo chmod 1777 {DIRECTORY}; if it is mounted read-only: {_enlarge()}"
        )
    kind = file_system(DIRECTORY)
    if kind not in _MEMORY:
        return SHM.degraded(f"it is {kind}: {seen}", "what is shared is written to a disk", _mount())
    if total < _wanted() * _NEARLY:
        means = f"all published tensors together must fit in there; a model of 16 GB wants {size(_wanted())} here"
        return SHM.degraded(f"only {seen}", means, _enlarge())
    if free < total * (1 - _NEARLY):
        return SHM.degraded(seen, "there is little room for another tensor", _tidy())
    return SHM.ok(seen, f"there is room for a model of {size(min(MODEL_BYTES, free))}")


def _make_file() -> None:
    # The pages are really taken: a file that is only declared large kills its user (SIGBUS) when they run out.
    with tempfile.TemporaryFile(dir=DIRECTORY) as file:
        os.posix_fallocate(file.fileno(), 0, _TRIED_BYTES)


def _wanted() -> int:
    return min(MODEL_BYTES, memory_bytes() // 2)


def _gigabytes() -> int:
    return max(1, -(-_wanted() // (1 << 30)))


def _enlarge() -> str:
    wanted = _gigabytes()
    return fitting(
        f"sudo mount -o remount,size={wanted}G {DIRECTORY}",
        docker=f"docker run --shm-size={wanted}g",
        kubernetes=f"emptyDir: {{medium: Memory, sizeLimit: {wanted}Gi}}, as a volume mounted at {DIRECTORY}",
    )


def _mount() -> str:
    return fitting(
        f"sudo mkdir -p {DIRECTORY} && sudo mount -t tmpfs -o mode=1777,size={_gigabytes()}G tmpfs {DIRECTORY}",
        docker=f"docker run --shm-size={_gigabytes()}g",
        kubernetes=_enlarge(),
    )


def _tidy() -> str:
    return f"ls -l {DIRECTORY}  # and remove torch_PID_* of processes that died; or: {_enlarge()}"
