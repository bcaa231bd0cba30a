"""Find the agent of a path and get an authenticated connection to it, or say exactly why there is none.

The lock file is read first: it says who serves, and whether the kernel still holds the lock for it. Only then is the
socket connected, and the peer's credentials are the kernel's, not the file's. An agent that is absent or still
starting is waited for; one that can never be talked to (another user, another schema, another PID namespace) is
reported at once.
"""

from __future__ import annotations

import os
import select
import socket
import time
from typing import Final

from etha.errors import (
    AgentGone,
    AgentStopped,
    EthaError,
    InvalidRecord,
    NoAgent,
    OtherNamespace,
    OtherUser,
    VersionMismatch,
)
from etha.tensor_bus import clock, packets, wire
from etha.tensor_bus.channel import Channel
from etha.tensor_bus.client_device import ClientDevice
from etha.tensor_bus.connection import Connection
from etha.tensor_bus.ipc import peer, process
from etha.tensor_bus.lockfile import LockText, read_lock
from etha.tensor_bus.paths import AgentPaths, cannot_open
from etha.tensor_bus.records import SCHEMA, encode

_PAUSE_SECONDS: Final = 0.02


def reach(paths: AgentPaths, rank: int, timeout: float) -> tuple[Connection, LockText]:
    """Connect to the agent that serves ``paths``. The connection will find that agent's successors by itself.

    Raises:
        NoAgent: nothing serves there: there never was an agent, or it is dead.
        AgentStopped: it is alive and did not answer in time.
        OtherUser, OtherNamespace, VersionMismatch: it can never be talked to. Raised at once.
        InvalidArgument: it serves a device that this process does not see.
        DriverError: it serves a device, and there is no CUDA driver here.
    """
    deadline = clock.deadline_after(timeout)
    while True:
        try:
            return _try(paths, rank, deadline)
        except (NoAgent, AgentStopped, AgentGone, InvalidRecord):
            if clock.now() + _PAUSE_SECONDS >= deadline:
                raise
        time.sleep(_PAUSE_SECONDS)


def dial(paths: AgentPaths, rank: int, client: bytes) -> tuple[Channel, LockText]:
    """Connect and say hello. Waits for nothing: the agent's welcome is the first packet that will come.

    Args:
        paths: of the agent.
        rank: for messages.
        client: the client id that this connection goes on as; empty for a new client.

    Raises:
        NoAgent, AgentStopped: there is none at this moment, or it takes no connection.
        OtherUser, OtherNamespace, VersionMismatch: it can never be talked to.
        SystemLimit: no descriptor is left.
    """
    text = _who_serves(paths, rank)
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise cannot_open(paths.socket, error) from error
    try:
        sock.setblocking(False)
        try:
            sock.connect(paths.socket)
        except PermissionError as error:
            raise _other_user(paths.socket, os.lstat(paths.socket).st_uid) from error
        except OSError as error:
            raise _not_answering(text) from error
        try:
            agent = peer.Peer.of(sock)
        except ProcessLookupError as error:
            raise _not_answering(text) from error
        try:
            if agent.uid != os.geteuid():
                raise _other_user(paths.socket, agent.uid)
            hello = packets.Hello(SCHEMA, process.boot_id(), process.pid_namespace(), client)
            try:
                wire.send(sock, encode(hello))
            except OSError as error:
                raise _not_answering(text) from error
            return Channel(sock, agent), text
        except BaseException:
            agent.close()
            raise
    except BaseException:
        sock.close()
        raise


def _try(paths: AgentPaths, rank: int, deadline: float) -> tuple[Connection, LockText]:
    channel, text = dial(paths, rank, b"")
    try:
        welcome, fds = _hear_welcome(channel.sock, text, deadline)
        try:
            if welcome.epoch != text.epoch:
                raise _not_answering(text)  # one agent has just followed another: look again
            device = ClientDevice(text.device, welcome, fds)
        finally:
            wire.close_all(fds)
        return Connection(channel, welcome, lambda client: dial(paths, rank, client)[0], device), text
    except BaseException:
        channel.close()
        raise


def _who_serves(paths: AgentPaths, rank: int) -> LockText:
    start = f"Start one: etha agent --rank {rank}"
    lock = read_lock(paths.lock)
    if lock is None:
        raise NoAgent(
            f"nothing serves rank {rank} ({paths.command} does not exist).", resource=paths.command, remedy=start
        )
    if lock.uid != os.geteuid():
        raise _other_user(paths.lock, lock.uid)
    text = lock.text
    if text is None:
        raise NoAgent(f"the agent of rank {rank} is starting.", resource=paths.command, remedy="Try again.")
    if not lock.held or text.boot != process.boot_id():
        raise NoAgent(
            f"the agent of rank {rank}, pid {text.pid}, is dead.",
            resource=paths.command,
            holder=f"pid {text.pid}",
            remedy=start,
        )
    if text.namespace != process.pid_namespace():
        raise OtherNamespace(
            f"the agent of rank {rank} lives in another PID namespace: neither side could watch the other die.",
            resource=paths.command,
            holder=f"pid {text.pid} there",
            remedy="Share the PID namespace (docker run --pid), or run an agent inside; run: etha doctor",
        )
    if text.schema != SCHEMA:
        raise VersionMismatch(
            f"the agent of rank {rank} speaks record schema {text.schema}, this etha {SCHEMA}.",
            resource=paths.command,
            holder=f"pid {text.pid}",
            remedy="Install the same etha on both sides; run: etha doctor",
        )
    return text


def _hear_welcome(sock: socket.socket, text: LockText, deadline: float) -> tuple[packets.Welcome, list[int]]:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if not poll.poll(clock.remaining(deadline) * 1000):
        raise _not_answering(text)
    try:
        data, fds = wire.receive(sock)
    except OSError as error:
        raise _not_answering(text) from error
    try:
        if not data:
            raise _not_answering(text)
        reply = packets.FROM_AGENT.decode(data)
        if isinstance(reply, packets.Refused):
            raise reply.failure.error()
        if not isinstance(reply, packets.Welcome):
            raise InvalidRecord("the agent did not answer the greeting with a welcome.", resource="packet")
        return reply, fds
    except BaseException:
        wire.close_all(fds)
        raise


def _not_answering(text: LockText) -> EthaError:
    state = process.process_state(text.pid)
    label = process.process_label(text.pid)
    return AgentStopped(
        f"the agent of rank {text.rank}, {label} ({state}), does not answer.",
        resource=f"rank {text.rank}",
        holder=label,
        remedy=f"Let it go on: kill -CONT {text.pid}"
        if state == "stopped"
        else "Is it still starting? Try again, or run: etha doctor",
    )


def _other_user(path: str, uid: int) -> OtherUser:
    return OtherUser(
        f"{path} belongs to uid {uid}.",
        resource=path,
        holder=f"uid {uid}",
        remedy="Set ETHA_RUNTIME_DIR to a directory of your own, and start an agent there; run: etha doctor",
    )
