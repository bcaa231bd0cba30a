"""A first look at the files that a dead agent left, in a child that may die of it.

LMDB maps its file: where that is cut short or damaged, a look at it can end the process that looks (SIGBUS), or lead it
round in circles; a write can do worse (`pages`). So a child goes through every page and every record of both files,
with a deadline, and says in one line what it found. What the records say is tried as well: it rehearses a recovery
from them (`recovery`), so that what would end every agent that starts ends the child. Only then does the agent open the
files itself.

Of two files one may have gone: somebody tidied up. The other is read all the same, for its schema, and for whoever
counts on it.

Used by the agent, before it has any other thread, and by ``etha status`` and ``etha inspect``.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from typing import Final

import lmdb
import msgspec

from etha.errors import EthaError, InvalidRecord
from etha.tensor_bus import clock, pages
from etha.tensor_bus.command_queue import CommandQueue
from etha.tensor_bus.environments import open_environment
from etha.tensor_bus.ipc.peer import Peer
from etha.tensor_bus.ipc.process import boot_id
from etha.tensor_bus.paths import AgentPaths
from etha.tensor_bus.records import SCHEMA
from etha.tensor_bus.recovery import rehearse
from etha.tensor_bus.state import MAP_SIZE, ClientRecord, StateReader

_SECONDS: Final = 30.0
"""A gigabyte of records takes some three."""


class Finding(msgspec.Struct, frozen=True):
    """What the child saw.

    Attributes:
        damage: why the files cannot be used although somebody may count on them, or None.
        boot: boot id of the agent that wrote them; empty if it wrote nothing.
        schema: its record schema.
        clients: workers that it knew.
    """

    damage: str | None = None
    boot: str = ""
    schema: int = 0
    clients: int = 0


def examine(paths: AgentPaths) -> Finding:
    """Read everything at ``paths`` in a child. Never raises for what it finds there."""
    return _apart(lambda: _look(paths))


def require_readable(path: str) -> None:
    """Read a state LMDB in a child, if its agent is dead: what a living agent serves from has been read before.

    Raises:
        InvalidRecord: a page is damaged, or who reads it dies of it or does not come to an end.
    """
    damage = _apart(lambda: _whole(path)).damage
    if damage is not None:
        raise InvalidRecord(
            f"{path} is damaged: {damage}.", resource=path, remedy="Restart its agent, which makes a new one."
        )


def _whole(path: str) -> Finding:
    try:
        _check_pages(path)
        StateReader(path).everything()
    except pages.Damage as damage:
        return Finding(damage=str(damage))
    except (EthaError, lmdb.Error, OSError):
        pass  # which the reader itself will meet, and tell better
    return Finding()


def _apart(look: Callable[[], Finding]) -> Finding:
    """What ``look`` finds in a child, or that this died of it."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, msgspec.json.encode(look()))
        finally:
            os._exit(0)
    os.close(writing)
    try:
        return _hear(reading, child)
    finally:
        os.close(reading)


def _look(paths: AgentPaths) -> Finding:
    try:
        for path in (paths.command, paths.state):
            if os.path.lexists(path):
                _check_pages(path)
        found, workers = _look_at_state(paths) if os.path.lexists(paths.state) else (Finding(), 0)
        if found.schema not in (0, SCHEMA):
            return found
        commands = _look_at_queue(paths) if os.path.lexists(paths.command) else 0
    except (EthaError, lmdb.Error, pages.Damage, OSError) as error:
        return Finding(damage=str(error))
    if workers and not os.path.lexists(paths.command):
        return Finding(damage=f"{paths.command} has gone, and {workers} workers that live are on record")
    if commands and not os.path.lexists(paths.state):
        return Finding(damage=f"{paths.state} has gone, and {commands} commands stand in the queue")
    return found


def _check_pages(path: str) -> None:
    """Within a read transaction, as workers may write to the queue while there is no agent."""
    environment = open_environment(path, map_size=MAP_SIZE, readonly=True)
    try:
        with environment, environment.env.begin():
            pages.check(path)
    finally:
        environment.close()


def _look_at_state(paths: AgentPaths) -> tuple[Finding, int]:
    """What is found there, and how many workers are on record whose process lives."""
    state = StateReader(paths.state)
    agent = state.agent()
    if agent is not None and agent.schema != SCHEMA:
        return Finding(None, agent.boot, agent.schema), 0
    records = state.everything()
    rehearse(records, clock.now())
    clients = [record for record in records.values() if isinstance(record, ClientRecord)]
    found = Finding(None, agent.boot if agent else "", agent.schema if agent else 0, len(clients))
    return found, sum(map(_lives, clients)) if found.boot == boot_id() else 0


def _lives(client: ClientRecord) -> bool:
    try:
        Peer.known(client.pid, client.started).close()
    except ProcessLookupError:
        return False
    return True


def _look_at_queue(paths: AgentPaths) -> int:
    """How many commands stand in it."""
    queue = CommandQueue(paths)
    return sum(len(queue.commands_of(client, 0)) for client in queue.clients())


def _hear(reading: int, child: int) -> Finding:
    deadline = clock.now() + _SECONDS
    said = b""
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    while poll.poll(clock.remaining(deadline) * 1000):
        data = os.read(reading, 1 << 16)
        if not data:
            break
        said += data
    else:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    try:
        return msgspec.json.decode(said, type=Finding)
    except msgspec.DecodeError:
        return Finding(damage=f"a process that read them ended with {os.waitstatus_to_exitcode(status)}")
