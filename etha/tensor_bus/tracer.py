"""Who may trace this process, where Yama restricts it. The kernel keeps one such slot per process.

The last to authorise wins. Whoever withdraws clears the slot only while it is still their own. Tracing is
what ``pidfd_getfd`` needs; the bus works without.
"""

from __future__ import annotations

import logging
import os
import threading

from etha.tensor_bus.ipc import peer

logger = logging.getLogger(__name__)


class Slot:
    """One authorisation; compared by identity."""


_lock = threading.Lock()
_current: Slot | None = None


def authorise(pid: int | None) -> Slot:
    """Let ``pid`` and its descendants trace this process, or any process when None."""
    global _current
    slot = Slot()
    with _lock:
        _current = slot
        known = peer.authorise_tracer(pid)
    logger.debug(
        "pid %s may trace pid %d" if known else "no Yama: pid %s needs no leave to trace pid %d", pid, os.getpid()
    )
    return slot


def hand_on(slot: Slot, pid: int) -> Slot:
    """Let ``pid`` trace this process instead of the one before, if ``slot`` is the last authorisation.

    Returns:
        The slot that is the caller's now.
    """
    with _lock:
        if _current is not slot:
            return slot
    try:
        return authorise(pid)
    except ProcessLookupError:
        return slot  # it is dead again, and another will follow


def withdraw(slot: Slot) -> None:
    """Let no one trace this process, if ``slot`` is the last authorisation."""
    global _current
    with _lock:
        if _current is slot:
            _current = None
            peer.authorise_tracer(0)
