"""Files that torch left in /dev/shm when the process that made them died.

Torch names its shared memory ``torch_{pid}_{random}_{counter}`` (``NewProcessWideShmHandle``, ATen).
Under the ``file_descriptor`` strategy the name is gone an instant later; under ``file_system`` a helper process,
torch_shm_manager, removes it when its client dies. A kill in that instant, or of that helper, leaves the file, and its
memory, until the next boot.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from etha.tensor_bus.ipc import maps
from etha.tensor_bus.ipc.process import open_files, process_state, start_time

_DIRECTORY: Final = "/dev/shm"


def remove_leftovers(pid: int, uid: int, started: int, directory: str = _DIRECTORY) -> list[str]:
    """Remove what torch left in /dev/shm for a process that died; call it off a control loop, after the death was seen.

    A file stays if a living process that we may look into maps it or has it open: torch ends a process that is the last
    to drop a ``file_system`` storage and finds its name gone. Processes of other users, and those that made themselves
    unreadable (prctl(2), ``PR_SET_DUMPABLE``), cannot be asked. A process that was handed such a name and has not
    opened it yet will not find it, as with torch's own helper.

    Nothing is removed if the pid belongs to another process by now, whose files these may be.

    Args:
        pid: of the dead, in our PID namespace. (Files of a process that shares /dev/shm but not the PID namespace bear
            its pid there: do not call it for such.)
        uid: whose files may be removed.
        started: the dead process's start time (`start_time`), clock ticks since boot.
        directory: where to look; another one is for tests.

    Returns:
        The paths removed, sorted.
    """
    candidates = _candidates(pid, uid, directory)
    if not candidates:
        return []
    for identity in _files_in_use():
        candidates.pop(identity, None)
    removed: list[str] = []
    for identity, path in candidates.items():
        # Asked last: the scan took a while, and pid and name can be taken anew.
        if _number_taken(pid, started) or _identity(path) != identity:
            continue
        try:
            os.unlink(path)
        except FileNotFoundError:
            continue
        removed.append(path)
    return sorted(removed)


def _number_taken(pid: int, started: int) -> bool:
    if process_state(pid) == "dead":
        return False
    return process_state(pid) != "zombie" or start_time(pid) != started


def _candidates(pid: int, uid: int, directory: str) -> dict[tuple[int, int], str]:
    found: dict[tuple[int, int], str] = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if not entry.name.startswith(f"torch_{pid}_") or not entry.is_file(follow_symlinks=False):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if status.st_uid == uid:
                found[status.st_dev, status.st_ino] = entry.path
    return found


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _files_in_use() -> Iterator[tuple[int, int]]:
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            for region in maps.read(int(name)):
                yield region.device, region.inode
            for _, identity in open_files(int(name)):
                yield identity
        except OSError:
            continue  # gone meanwhile, or none of our business
