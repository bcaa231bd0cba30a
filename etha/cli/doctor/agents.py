"""The agents of this box: each one found, how it stands, and whether this process could bootstrap to it: tried.

Who is looked at: every agent that the path convention finds, and the rank that the command line or the environment
names. Connecting is done by a real client. A state file may be damaged, and then kill who maps it: so each is read in
a child of its own, and only if it begins as LMDB's do.

An agent that is dead is no loss while its files are whole: what it kept for its workers is its successor's. Which of
them live is told, and where no successor can take over, why.
"""

from __future__ import annotations

import os
import re
import shlex
from functools import partial
from typing import Final

from etha.cli.doctor.files import is_lmdb, own_directory
from etha.cli.doctor.finding import Finding, Gate
from etha.cli.doctor.runner import Check, run
from etha.cli.doctor.surroundings import fitting
from etha.cli.survey import AgentView, look
from etha.errors import (
    AgentStopped,
    EthaError,
    InvalidArgument,
    InvalidRecord,
    NoAgent,
    OtherNamespace,
    OtherUser,
    UnsafePath,
    VersionMismatch,
)
from etha.tensor_bus.bootstrap import agent_rank
from etha.tensor_bus.client import TensorBusClient
from etha.tensor_bus.ipc.peer import Peer
from etha.tensor_bus.ipc.process import boot_id, pid_namespace
from etha.tensor_bus.lockfile import LockState, LockText, another_schema, read_lock
from etha.tensor_bus.paths import AgentPaths, agent_paths, runtime_directory
from etha.tensor_bus.records import SCHEMA
from etha.tensor_bus.state import ClientRecord, StateReader

_FILE: Final = re.compile(r"agent_rank(\d{1,9})_(?:state\.lmdb|command\.lmdb\.agent)")
_CONNECT_SECONDS: Final = 1.5
_MOST: Final = 16
"""Agents that are looked at: as many as a box has GPUs."""

_NAMES: Final[dict[type[EthaError], str]] = {
    OtherUser: "other user",
    OtherNamespace: "PID namespace",
    VersionMismatch: "schema",
    AgentStopped: "stopped agent",
    InvalidRecord: "lock file",
    UnsafePath: "lock file",
}
_LAUNCHED: Final = frozenset({"AGENT_RANK", "LOCAL_RANK"})
_RANK: Final = Gate("agents", "AGENT_RANK", "finding the rank in the environment, as bootstrap_client() does")
_NOBODY: Final = Gate("agents", "agents", "looking for agent_rank*_state.lmdb in the runtime directory")


def ranks(asked: int | None) -> list[int]:
    """The ranks to look at: the one asked for, or those found and the one that the environment names."""
    if asked is not None:
        return [asked]
    found = {int(match[1]) for name in _listing() if (match := _FILE.fullmatch(name))}
    return sorted({*found, *_named()})[:_MOST]


def checks(chosen: list[int], asked: int | None) -> list[Check]:
    """What the environment says; then one for each rank, or one that says that there is nobody."""
    found = [Check(_RANK, _look_at_environment)]
    if not chosen:
        return [*found, Check(_NOBODY, lambda: [_NOBODY.ok("there is none", "etha agent --rank 0 starts one")])]
    expected = {asked} if asked is not None else set(_named())
    for rank in chosen:
        gate = Gate("agents", f"agent of rank {rank}", f"connecting to it as a client, within {_CONNECT_SECONDS} s")
        found.append(Check(gate, partial(_examine, gate, rank, rank in expected), seconds=5.0))
    return found


def _look_at_environment() -> list[Finding]:
    if not _LAUNCHED & os.environ.keys():
        return [_RANK.ok("not set", "a worker that calls bootstrap_client() needs AGENT_RANK, or LOCAL_RANK")]
    try:
        rank, _ = agent_rank()
    except InvalidArgument as error:
        return [
            _RANK.broken(error.message, "bootstrap_client() refuses it", f"unset {error.resource}, or set it to a rank")
        ]
    return [_RANK.ok(f"rank {rank}", "bootstrap_client() goes to this agent")]


def _examine(gate: Gate, rank: int, expected: bool) -> list[Finding]:
    try:
        paths = agent_paths(rank)
        lock = read_lock(paths.lock)
    except EthaError as error:
        return [_refused(gate, rank, error)]
    if lock is None and not os.path.lexists(paths.state):
        if not expected:
            return [gate.ok("there is none", "its files are gone: it has just ended")]
        start = f"etha agent --rank {rank}"
        return [gate.degraded(f"nothing serves rank {rank}", "bootstrap_client() would wait for it in vain", start)]
    state = Gate("agents", f"state of rank {rank}", f"reading {paths.state}")
    text = None if lock is None else lock.text
    read: list[Finding] = []
    if _is_ours(paths) and (text is None or (text.boot, text.schema) == (boot_id(), SCHEMA)):
        look = Check(state, lambda: _look(state, rank, paths, lock), 2.0, lambda how: _damaged(state, rank, lock, how))
        read = run([look])
    damaged = any(each.name == state.name and each.verdict != "ok" for each in read)
    return [_connect(gate, rank, paths, lock, damaged), *read]


def _connect(gate: Gate, rank: int, paths: AgentPaths, lock: LockState | None, damaged: bool) -> Finding:
    held = lock is not None and lock.held
    try:
        with TensorBusClient(rank, paths.command, paths.state, _CONNECT_SECONDS if held else 0.0) as client:
            seen = f"pid {client.agent_pid}, alive, serves {client.device}; connected"
            return gate.ok(seen, "this process could bootstrap to it")
    except NoAgent as error:
        if held:
            return gate.degraded(error.message, "workers wait for it", "Run etha doctor again: it may be there by now.")
        return _dead(gate, rank, paths, error, None if lock is None else lock.text, damaged)
    except EthaError as error:
        return _refused(gate, rank, error)


def _dead(gate: Gate, rank: int, paths: AgentPaths, error: NoAgent, text: LockText | None, damaged: bool) -> Finding:
    """What its successor can do with what it left."""
    seen = f"{error.message.rstrip('.')} (NoAgent)"
    start = f"etha agent --rank {rank}"
    if text is not None and text.boot != boot_id():
        means = "it is of an earlier boot, and what its files name went with that"
        return gate._replace(name="dead agent").broken(seen, means, f"{start}  # which deletes them")
    if text is not None and text.schema != SCHEMA:
        seen = f"{another_schema(paths.command, text.schema).message.rstrip('.')} (VersionMismatch)"
        means = "an agent of this etha does not start here: workers of that version may live, and wait for theirs"
        files = f"{shlex.quote(paths.command)}* {shlex.quote(paths.state)}*"
        remedy = f"Start an agent of that version; or, once its workers have ended: rm {files}"
        return gate._replace(name="schema").broken(seen, means, remedy)
    means = (
        "a successor starts from nothing: workers that live get StaleHandle, and must make new clients"
        if damaged
        else "calls of its workers wait for a successor, each to its timeout; publications, leases and versions survive"
    )
    return gate._replace(name="dead agent").broken(seen, means, f"Start it again: {start}")


def _refused(gate: Gate, rank: int, error: EthaError) -> Finding:
    gate = gate._replace(name=_NAMES.get(type(error), gate.name))
    seen = f"{error.message.rstrip('.')} ({type(error).__name__})"
    return gate.broken(seen, _means(error), _remedy(rank, error))


def _means(error: EthaError) -> str:
    if isinstance(error, AgentStopped):
        return "its workers wait to their deadlines; nothing is lost"
    return "this process cannot use this agent"


def _remedy(rank: int, error: EthaError) -> str:
    match error:
        case AgentStopped():
            return error.remedy or "See: etha status"
        case OtherUser():
            return f"{own_directory()} && etha agent --rank {rank}"
        case OtherNamespace():
            return fitting(
                f"{own_directory()} && etha agent --rank {rank}  # or start both in one PID namespace",
                docker="docker run --pid=container:AGENTS_CONTAINER  # or --pid=host for both",
                kubernetes="shareProcessNamespace: true, with agent and workers in one pod",
            )
        case VersionMismatch():
            return "Run the same etha on both sides: install it for the agent's Python, and start the agent again."
        case InvalidRecord():
            return f"rm {error.resource}  # if no agent of yours runs there"
        case _:
            return "Mend first what is said of its files."


def _is_ours(paths: AgentPaths) -> bool:
    try:
        return is_lmdb(paths.state) and os.path.exists(paths.state + "-lock")
    except OSError:
        return False


def _look(gate: Gate, rank: int, paths: AgentPaths, lock: LockState | None) -> list[Finding]:
    view = look(rank, paths.state)
    if view.condition == "unreadable":
        return [_damaged(gate, rank, lock, f"{view.problem}")]
    hidden = sorted({each.memory for each in view.publications if each.memory.startswith("hidden by ")})
    seen = f"{view.condition}, schema {view.schema}, {len(view.workers)} workers, {len(view.publications)} publications"
    if view.condition == "dead":
        return [_left(gate, seen, paths, lock)]
    if hidden:
        return [_hidden(gate, view, hidden[0])]
    return [gate.ok(seen, "etha status shows it")]


def _left(gate: Gate, seen: str, paths: AgentPaths, lock: LockState | None) -> Finding:
    """What a dead agent left, whole; who of its workers would go on with a successor."""
    if lock is None or lock.text is None or lock.text.namespace != pid_namespace():
        return gate.ok(seen, "a successor takes it over")
    living = _living(paths)
    if not living:
        return gate.ok(f"{seen}; none of the workers lives", "none of them waits for a successor")
    return gate.ok(f"{seen}; of the workers live: {', '.join(living)}", "a successor takes over what is theirs")


def _living(paths: AgentPaths) -> list[str]:
    """The recorded workers that live, as a successor would find them."""
    reader = StateReader(paths.state)
    try:
        records: list[ClientRecord] = list(reader.snapshot((ClientRecord,))[ClientRecord].values())
    finally:
        reader.close()
    living = []
    for record in records:
        try:
            Peer.known(record.pid, record.started).close()
        except ProcessLookupError:
            continue
        living.append(record.label)
    return living


def _hidden(gate: Gate, view: AgentView, memory: str) -> Finding:
    which = memory.removeprefix("hidden by ").partition(";")[0]
    owners = ", ".join(sorted({each.owner for each in view.publications if each.memory == memory}))
    return gate._replace(name=which).degraded(
        f"{owners}: the agent may not look into it ({which})",
        "etha status cannot say where it holds its memory; sharing itself works",
        "In that program, after it has changed its user: prctl(PR_SET_DUMPABLE, 1)"
        if which == "dumpable"
        else "Run the agent and its workers as the same user, with the same groups and capabilities.",
    )


def _damaged(gate: Gate, rank: int, lock: LockState | None, how: str) -> Finding:
    start = f"etha agent --rank {rank}"
    lives = lock is not None and lock.held
    return gate.degraded(
        f"it cannot be read: {how}",
        "etha status cannot show it, and a reader of it may die; a new agent sets it aside and starts from nothing",
        f"End its agent, and start it again: {start}" if lives else f"Start its agent again: {start}",
    )


def _listing() -> list[str]:
    try:
        return os.listdir(runtime_directory())
    except OSError:
        return []  # the check of the directory says why


def _named() -> list[int]:
    """The rank that a worker with this environment would bootstrap to, if any."""
    try:
        return [agent_rank()[0]]
    except InvalidArgument:
        return []
