"""A first look at the files that a dead agent left, in a child that may die of it.

LMDB maps its file: where that is cut short or damaged, a look at it can end the process that looks (SIGBUS), or lead it
round in circles. A write can end it by an assertion of LMDB's (seen: ``mp->mp_pgno != pgno``), or overwrite what is in
use, where its list of free pages is damaged. So a child goes through every record of both files, with a deadline,
rehearses writing in a copy of each, and says in one line what it found. What the records say is tried as well: it
rehearses a recovery from them (`recovery`), so that what would end every agent that starts ends the child. Only then
does the agent open the files itself.

Of two files one may have gone: somebody tidied up. The other is read all the same, for its schema, and for whoever
counts on it.

Used by the agent, before it has any other thread, and by ``etha status`` and ``etha inspect``.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
from collections.abc import Callable
from typing import Final

import lmdb
import msgspec

from etha.errors import EthaError, InvalidRecord
from etha.tensor_bus import clock
from etha.tensor_bus.command_queue import CommandQueue
from etha.tensor_bus.ipc.peer import Peer
from etha.tensor_bus.ipc.process import boot_id
from etha.tensor_bus.paths import AgentPaths
from etha.tensor_bus.records import SCHEMA
from etha.tensor_bus.recovery import rehearse
from etha.tensor_bus.state import ClientRecord, StateReader

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
        InvalidRecord: who reads it dies of it, or does not come to an end.
    """
    damage = _apart(lambda: _whole(path)).damage
    if damage is not None:
        raise InvalidRecord(
            f"{path} is damaged: {damage}.", resource=path, remedy="Restart its agent, which makes a new one."
        )


def _whole(path: str) -> Finding:
    try:
        StateReader(path).everything()
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
        found, workers = _look_at_state(paths) if os.path.lexists(paths.state) else (Finding(), 0)
        if found.schema not in (0, SCHEMA):
            return found
        commands = _look_at_queue(paths) if os.path.lexists(paths.command) else 0
        for path in (paths.command, paths.state):
            if os.path.lexists(path):
                _rehearse_writing(path)
    except (EthaError, lmdb.Error, OSError) as error:
        return Finding(damage=str(error))
    if workers and not os.path.lexists(paths.command):
        return Finding(damage=f"{paths.command} has gone, and {workers} workers that live are on record")
    if commands and not os.path.lexists(paths.state):
        return Finding(damage=f"{paths.state} has gone, and {commands} commands stand in the queue")
    return found


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


def _rehearse_writing(path: str) -> None:
    """Write every record anew and use every page that is free, in a copy in memory; all must still be there then.

    Raises:
        lmdb.Error, InvalidRecord: it is not.
    """
    copy = os.memfd_create("etha-examination", os.MFD_CLOEXEC)
    with open(path, "rb") as source, open(copy, "wb", closefd=False) as target:
        shutil.copyfileobj(source, target, 1 << 20)
    room = 4 * os.fstat(copy).st_size + _LEAST_ROOM
    env = lmdb.open(f"/proc/self/fd/{copy}", subdir=False, create=False, lock=False, sync=False, map_size=room)
    before = _records(env)
    expected = dict(before)
    stat = env.stat()
    free = env.info()["last_pgno"] - stat["branch_pages"] - stat["leaf_pages"] - stat["overflow_pages"]
    # What the last transaction freed is not given out again before the next but one.
    for turn in range(3):
        with env.begin(write=True) as transaction:
            for key, value in before:
                transaction.put(key, value)
            for number in range(free if turn else 0):
                key = b"\xff%d %d" % (turn, number)
                expected[key] = key.ljust(_ONE_PAGE, b"\xff")
                transaction.put(key, expected[key])
    if _records(env) != sorted(expected.items()):
        raise InvalidRecord(f"{path} has pages that are free and in use.", resource=path)
    with env.begin(write=True) as transaction:
        for key in expected:
            transaction.delete(key)
    env.close()


def _records(env: lmdb.Environment) -> list[tuple[bytes, bytes]]:
    with env.begin() as transaction, transaction.cursor() as cursor:
        return [(bytes(key), bytes(value)) for key, value in cursor]


_ONE_PAGE: Final = 3000
"""Bytes of a value that gets a page of its own: too long for a leaf, and with its header not longer than a page."""

_LEAST_ROOM: Final = 1 << 24


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
