"""Every row's name, in the order of the report. A group of rows is measured together, in a process of its own."""

from __future__ import annotations

from typing import Final

from costs import calls, commandline, endings, growth, handover, reading, registering, resting
from costs.groups import Group

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
    Group(reading.copy_into, ("copy-into", "copy-into-small")),
    Group(reading.memory, ("memory",)),
    Group(endings.reclaim, ("reclaim-reader", "reclaim-owner")),
    Group(endings.restart, ("restart",)),
    Group(resting.idle, ("idle-cpu", "idle-writes")),
    Group(commandline.command_line, ("help", "status", "status-10000")),
    Group(
        growth.ten_thousand,
        (
            "register-10000",
            "subscribe-10000",
            "read-10000",
            "publish-10000",
            "status-10000-survey",
            "inspect-10000",
        ),
    ),
)
