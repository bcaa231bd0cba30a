"""From the environment that a launcher sets to a connected client.

The environment is read at the call, never at import. ``AGENT_RANK`` says the agent's rank; else it is ``LOCAL_RANK``
plus ``AGENT_RANK_OFFSET`` (0 if unset), for several launches on one box. Rank 0 is a rank, not "unset".
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Literal

from etha.errors import InvalidArgument
from etha.tensor_bus import tracer
from etha.tensor_bus.client import TensorBusClient
from etha.tensor_bus.paths import PathNaming, default_paths

logger = logging.getLogger(__name__)

_MAX_DIGITS = 18
"""Of a rank: 64 bits."""


@dataclass(frozen=True)
class BootstrapInfo:
    """What `bootstrap_client` found.

    Attributes:
        agent_rank: rank of the agent.
        global_rank: ``RANK``, else ``LOCAL_RANK``, else 0.
        rank_offset: the offset that was added; None with the ``"direct"`` method.
        device: this process's name for the agent's device: ``"cpu"``, ``"cuda:0"``.
        command_queue_path: the command LMDB.
        state_path: the state LMDB.
        method: ``"direct"`` by ``AGENT_RANK``, ``"offset"`` by ``LOCAL_RANK``.
    """

    agent_rank: int
    global_rank: int
    rank_offset: int | None
    device: str
    command_queue_path: str
    state_path: str
    method: Literal["direct", "offset"]


def bootstrap_client(
    path_naming_fn: PathNaming | None = None, connection_timeout: float = 30.0
) -> tuple[TensorBusClient, BootstrapInfo]:
    """Connect to the agent that the environment names, and let it (and no other process) trace this one.

    Args:
        path_naming_fn: agent rank to (command queue path, state path); None for the convention.
        connection_timeout: seconds to wait for the agent.

    Raises:
        InvalidArgument: (a `ValueError`) a variable is missing, or is not an integer >= 0; it is named.
        ConnectionError: no agent answered in time; the text says which of absent, dead, stopped, other user, other
            version, other PID namespace.
    """
    rank, offset = agent_rank()
    global_rank = next((value for value in map(_optional_rank, ("RANK", "LOCAL_RANK")) if value is not None), 0)
    command, state = (path_naming_fn or default_paths)(rank)
    client = TensorBusClient(rank, command, state, connection_timeout)
    try:
        client.tracer_slot = tracer.authorise(client.agent_pid)
    except BaseException:
        client.close()
        raise
    info = BootstrapInfo(
        agent_rank=rank,
        global_rank=global_rank,
        rank_offset=offset,
        device=client.device,
        command_queue_path=client.command_queue_path,
        state_path=client.state_path,
        method="direct" if offset is None else "offset",
    )
    return client, info


def setup_ptrace(tracer_pid: int | None = None) -> None:
    """Authorise one tracer, and its descendants, under the Yama security module.

    The kernel has one such slot per process: the last call wins. Where there is no Yama, nothing needs to be done.

    Args:
        tracer_pid: the tracer; None means any process of this user, which is said in a warning.

    Source: prctl(2), ``PR_SET_PTRACER``.
    """
    if tracer_pid is None:
        logger.warning("any process of this user may now trace pid %d; name one: setup_ptrace(pid)", os.getpid())
    tracer.authorise(tracer_pid)


def agent_rank() -> tuple[int, int | None]:
    """The rank of the agent that the environment names, and the offset that was added, if one was.

    Raises:
        InvalidArgument: a variable is missing, or is not an integer >= 0; ``resource`` is its name.
    """
    direct = _optional_rank("AGENT_RANK")
    if direct is not None:
        return direct, None
    local = _optional_rank("LOCAL_RANK")
    if local is None:
        raise InvalidArgument(
            "neither AGENT_RANK nor LOCAL_RANK is set.",
            resource="AGENT_RANK",
            remedy="Set AGENT_RANK to the agent's rank, or start under torchrun.",
        )
    offset = _optional_rank("AGENT_RANK_OFFSET") or 0
    return local + offset, offset


def _optional_rank(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > _MAX_DIGITS:
        raise InvalidArgument(
            f"{variable}={text[:64]!r} is not an integer >= 0.",
            resource=variable,
            remedy="Set it to a rank, or unset it.",
        )
    return int(text)
