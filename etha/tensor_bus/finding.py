"""Find the agent that serves a device, among those of the path convention. For launchers without ranks.

Only lock files are read: nothing is connected, and no LMDB file is touched. An agent that lives, and is of this boot,
user, PID namespace and schema, can be talked to; of those that serve the device, the lowest rank is taken. The others
are named where none is found.

`serves` alone decides what "serves the device" means: that it is the same device, whatever either process calls it.
"""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Final

from etha.errors import EthaError, InvalidArgument, NoAgent
from etha.tensor_bus import clock
from etha.tensor_bus.ipc import devices, process
from etha.tensor_bus.lockfile import LockState, LockText, read_lock
from etha.tensor_bus.paths import AgentPaths, agent_paths, locks_by_convention, runtime_directory
from etha.tensor_bus.records import SCHEMA

if TYPE_CHECKING:
    import torch

_PAUSE_SECONDS: Final = 0.02
_DEVICE: Final = re.compile(r"[a-z][a-z0-9_]*(:\d{1,4})?")


def device_name(device: str | torch.device) -> str:
    """The name of a device: ``"cpu"``, ``"cuda:1"``. The host is one device, whatever its index.

    Raises:
        InvalidArgument: it is neither the name of a device nor a `torch.device`.
    """
    # A torch.device is known by its fields: to ask for its class would load torch for a string.
    text = device if isinstance(device, str) else _text(device)
    if text is None or not _DEVICE.fullmatch(text):
        raise InvalidArgument(
            f"{device!r:.80} is no device.", resource="device", remedy='Give "cpu", or a torch.device.'
        )
    return "cpu" if text.partition(":")[0] == "cpu" else text


def serves(agent: LockText, identity: str) -> bool:
    """Whether an agent serves this device."""
    return agent.device == identity


def find_agent(device: str, deadline: float) -> tuple[int, AgentPaths]:
    """The lowest rank whose agent lives and serves ``device``; waits for one until ``deadline``.

    Args:
        device: as from `device_name`.
        deadline: `clock` seconds.

    Raises:
        NoAgent: there is none; ``resource`` is the device, and the text says which agents there are.
        InvalidArgument: this process sees no such device.
        DriverError: it is a CUDA device, and there is no driver.
    """
    identity = devices.identity_of(device)
    while True:
        others: list[str] = []
        for rank in locks_by_convention():
            paths = agent_paths(rank)
            try:
                lock = read_lock(paths.lock)
            except EthaError as error:
                others.append(f"rank {rank} (unreadable: {error.message})")
                continue
            if lock is None:
                continue  # it has ended since the directory was listed
            hindrance = _hindrance(lock)
            if hindrance is None and lock.text is not None and serves(lock.text, identity):
                return rank, paths
            others.append(f"rank {rank} ({hindrance or 'serves ' + (lock.text.device if lock.text else '?')})")
        if clock.now() + _PAUSE_SECONDS >= deadline:
            raise NoAgent(
                f"no agent in {runtime_directory()} serves {device}. There {_enumerate(others)}.",
                resource=device,
                remedy=f"Start one: etha agent --device {device}",
            )
        time.sleep(_PAUSE_SECONDS)


def _hindrance(lock: LockState) -> str | None:
    """Why this agent cannot be talked to, or None."""
    text = lock.text
    if lock.uid != os.geteuid():
        return f"of uid {lock.uid}"
    if text is None:
        return "starting" if lock.held else "dead"
    if not lock.held or text.boot != process.boot_id():
        return "dead"
    if text.namespace != process.pid_namespace():
        return "in another PID namespace"
    return None if text.schema == SCHEMA else f"of record schema {text.schema}, this etha's is {SCHEMA}"


def _enumerate(agents: list[str]) -> str:
    return f"are: {', '.join(agents)}" if agents else "is none at all"


def _text(device: object) -> str | None:
    kind, index = getattr(device, "type", None), getattr(device, "index", None)
    if not isinstance(kind, str):
        return None
    return kind if index is None else f"{kind}:{index}"
