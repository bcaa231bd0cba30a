"""Looks at the processes that hold a publication's memory, as far as /proc permits.

A pid in the state LMDB is only a number: the process may have died since, and another may bear its number. One that
started after its claim was recorded is such another, and is not looked at. What forbids a look is reported by its gate.
"""

from __future__ import annotations

import os
from typing import Final

from etha.cli.anatomy import Look
from etha.tensor_bus.ipc.manifest import Manifest
from etha.tensor_bus.ipc.observation import observe
from etha.tensor_bus.ipc.peer import Peer
from etha.tensor_bus.ipc.process import pid_namespace, process_gids, process_state, process_uids
from etha.tensor_bus.state import MemoryRecord

_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")


class Eyes:
    """Looks at each process once, whatever it is asked for. For the pids of one agent."""

    def __init__(self, namespace: int) -> None:
        """The agent's PID namespace, in which its pids mean something."""
        self._foreign = namespace != pid_namespace()
        self._seen: dict[tuple[int, int], Look] = {}

    def look(self, pid: int, since: float, generation: int, manifest: Manifest) -> Look:
        """What a process has of a publication, now.

        Args:
            pid: by the agent's word.
            since: ``CLOCK_BOOTTIME`` seconds of a moment when the pid was that process's.
            generation: of the publication.
            manifest: its manifest, which has passed `validate`.
        """
        key = (pid, generation)
        if key not in self._seen:
            self._seen[key] = self._look(pid, since, manifest)
        return self._seen[key]

    def _look(self, pid: int, since: float, manifest: Manifest) -> Look:
        if self._foreign:
            return Look("never", "unknown", "PID namespace")
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return Look("never", "dead", "dead")
        except OSError as error:
            return Look("never", process_state(pid), error.strerror)
        uids, gids = process_uids(pid), process_gids(pid)
        peer = Peer(pidfd, pid, uids[1] if uids else -1, gids[1] if gids else -1)
        try:
            if peer.started / _TICKS_PER_SECOND > since:
                return Look("never", "dead", "dead")
            seen = observe(peer, manifest)
            state = peer.state()
        finally:
            peer.close()
        if seen.gate is not None:  # behind hidepid, a living process reads as dead
            return Look("never", "unknown" if state == "dead" and seen.gate != "dead" else state, seen.gate)
        return Look("now", state, None, seen.mappings, seen.descriptors)


def remembered(look: Look, record: MemoryRecord | None) -> Look:
    """The look at an owner, or, where it is forbidden, what the agent saw when it opened the memory.

    The dead hold nothing, whatever was seen before.
    """
    if look.gate in (None, "dead") or record is None or record.gate is not None:
        return look
    return look._replace(taken="at registration", mappings=record.mappings, descriptors=record.descriptors)
