"""Which memory of another process holds a publication, as the kernel shows it; or which gate forbids the look.

Host memory only: /proc does not say which memory of a device a process has mapped.

For `inspect`: who maps what, under which descriptor. The look needs the right to *read* a process by ptrace(2)'s rules
("Ptrace access mode checking"), and costs a report where it is not given, never the service. Yama restricts attaching
only, so its scope is no gate here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from etha.tensor_bus.ipc import maps
from etha.tensor_bus.ipc.manifest import rows_by_file
from etha.tensor_bus.ipc.process import open_files, permitted_capabilities, process_gids, process_uids

if TYPE_CHECKING:
    from etha.tensor_bus.ipc.manifest import Manifest
    from etha.tensor_bus.ipc.peer import Peer


class Observation(msgspec.Struct, frozen=True):
    """What was seen of a process at one moment.

    Attributes:
        mappings: per allocation of the manifest, the address ranges ``(start, end)`` that map its file.
        descriptors: per allocation, the descriptor numbers that are its file, ascending.
        gate: None if the look was permitted, else what forbade it, and both tables are empty of entries: ``"dead"``;
            ``"hidepid"``, /proc does not show the process; ``"uid"`` or ``"gid"``, it runs as another;
            ``"dumpable"``, it has made itself unreadable (prctl(2), ``PR_SET_DUMPABLE``);
            ``"capabilities"``, it may use some that we may not; ``"lsm"``, none of these, so a security module.
    """

    mappings: tuple[tuple[tuple[int, int], ...], ...]
    descriptors: tuple[tuple[int, ...], ...]
    gate: str | None


def observe(peer: Peer, manifest: Manifest) -> Observation:
    """Look at which of a living process's memory holds the allocations of a manifest.

    Takes as long as the process has mappings and descriptors, and may wait for a file system that one of them lies on:
    not for a control loop.

    Args:
        peer: whose pidfd is open.
        manifest: has passed `validate`.
    """
    rows = rows_by_file(manifest)
    mappings: list[list[tuple[int, int]]] = [[] for _ in manifest.allocations]
    descriptors: list[list[int]] = [[] for _ in manifest.allocations]
    try:
        for region in maps.read(peer.pid):
            row = rows.get((region.device, region.inode))
            if row is not None:
                mappings[row].append((region.start, region.end))
        for number, identity in open_files(peer.pid):
            row = rows.get(identity)
            if row is not None:
                descriptors[row].append(number)
    except OSError as error:
        return _forbidden(manifest, _gate(peer, error))
    # Asked last: only while the peer is not dead did its pid, and so its files of /proc, belong to it.
    if _is_dead(peer):
        return _forbidden(manifest, "dead")
    return Observation(tuple(map(tuple, mappings)), tuple(tuple(sorted(numbers)) for numbers in descriptors), None)


def _forbidden(manifest: Manifest, gate: str) -> Observation:
    nothing = ((),) * len(manifest.allocations)
    return Observation(nothing, nothing, gate)


def _is_dead(peer: Peer) -> bool:
    try:
        return not peer.alive()
    except ValueError:
        return True  # or as good as dead: the control loop has closed its pidfd meanwhile


def _gate(peer: Peer, error: OSError) -> str:
    if _is_dead(peer):
        return "dead"
    uids, gids = process_uids(peer.pid), process_gids(peer.pid)
    if not isinstance(error, PermissionError) or not uids or not gids:
        return "hidepid"
    if set(uids[:3]) != {os.geteuid()}:
        return "uid"
    if set(gids[:3]) != {os.getegid()}:
        return "gid"
    if _owner_of_maps(peer.pid) != os.geteuid():
        return "dumpable"
    if permitted_capabilities(peer.pid) & ~permitted_capabilities(os.getpid()):
        return "capabilities"
    return "lsm"


def _owner_of_maps(pid: int) -> int | None:
    """Its owner is root's uid, not the process's, once the process is not dumpable (proc(5))."""
    try:
        return os.stat(f"/proc/{pid}/maps").st_uid
    except OSError:
        return None
