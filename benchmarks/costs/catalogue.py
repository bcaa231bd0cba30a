"""Every row's name, in the order of the report. A group of rows is measured together, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from costs import calls, commandline, endings, growth, handover, reading, registering, resting
from costs.pairing import Run
from costs.row import Row


class Group(NamedTuple):
    """Rows that one function measures."""

    measure: Callable[[Run], list[Row]]
    rows: tuple[str, ...]


GROUPS: Final = (
    Group(calls.publish, ("publish",)),
    Group(calls.publish_storages, ("publish-storages",)),
    Group(calls.publish_bytes, ("publish-bytes",)),
    Group(calls.lease, ("lease", "release")),
    Group(calls.update, ("update",)),
    Group(calls.command, ("command-register", "command-close")),
    Group(handover.register_beside_torch, ("register-500-named", "register-500-kept")),
    Group(registering.count, ("register-count",)),
    Group(registering.nbytes, ("register-bytes",)),
    Group(handover.warm, ("handover-warm-file_descriptor", "handover-warm-file_system")),
    Group(handover.cold, ("handover-cold-file_descriptor", "handover-cold-file_system")),
    Group(reading.read, ("read", "read-private")),
    Group(reading.copy_into, ("copy-into",)),
    Group(reading.memory, ("memory",)),
    Group(endings.reclaim, ("reclaim-reader", "reclaim-owner")),
    Group(endings.restart, ("restart",)),
    Group(resting.idle, ("idle-cpu", "idle-writes")),
    Group(commandline.command_line, ("help", "status", "status-10000")),
    Group(
        growth.ten_thousand,
        ("register-10000", "subscribe-10000", "read-10000", "publish-10000", "status-10000-survey"),
    ),
)


def chosen(only: list[str]) -> list[Group]:
    """The groups that these rows are of; all, for no rows.

    Raises:
        LookupError: there is no such row; its text names those that there are.
    """
    known = [name for group in GROUPS for name in group.rows]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise LookupError(f"{unknown[0]!r} is none of: {', '.join(known)}")
    return [group for group in GROUPS if not only or set(group.rows) & set(only)]
