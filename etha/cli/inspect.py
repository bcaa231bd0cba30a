"""``etha inspect``: every allocation and tensor of one publication, and who holds them."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from etha.cli.anatomy import Anatomy, Owner, Reader, anatomy
from etha.cli.looking import Eyes, remembered
from etha.cli.sheet import lines, printable
from etha.cli.survey import condition_of, lock_beside
from etha.errors import EthaError, InvalidArgument, NoAgent, NoPublication, VersionMismatch
from etha.tensor_bus import clock
from etha.tensor_bus.examination import require_readable
from etha.tensor_bus.ipc.manifest import validate
from etha.tensor_bus.ipc.process import boot_id
from etha.tensor_bus.lockfile import read_lock
from etha.tensor_bus.paths import agents_by_convention, default_paths, runtime_directory
from etha.tensor_bus.records import SCHEMA
from etha.tensor_bus.state import (
    AgentRecord,
    ClaimRecord,
    ClientRecord,
    MemoryRecord,
    PublicationRecord,
    StateReader,
    VersionRecord,
    client_key,
    key_number,
    memory_key,
    version_key,
)

_NAMES_SHOWN: Final = 20
_CLIENT: Final = slice(1, -8)
"""Where a claim's key has the client id."""


class AgentBrief(msgspec.Struct, frozen=True):
    """Whose books these are; ``condition`` is as in `etha.cli.survey.AgentView`."""

    rank: int
    pid: int
    condition: str
    device: str
    epoch: int
    state_path: str
    heartbeat_age_s: float


class Report(msgspec.Struct, frozen=True):
    """What ``--json`` says: the agent, and its publications of the name, the newest first.

    There are several while readers still map one whose owner has closed it, or has died.
    """

    agent: AgentBrief
    publications: tuple[Anatomy, ...]


class Books(NamedTuple):
    """What one agent has recorded, as one transaction shows it."""

    agent: AgentBrief
    namespace: int
    now: float
    records: dict[type[Any], dict[bytes, Any]]

    @property
    def names(self) -> set[str]:
        return {record.name for record in self.records[PublicationRecord].values()}


def inspect(
    name: Annotated[str, typer.Argument(help="Of the publication.", show_default=False)],
    rank: Annotated[int | None, typer.Option(min=0, help="Rank of its agent, if several have one of the name.")] = None,
    state: Annotated[str | None, typer.Option(metavar="PATH", help="State LMDB of its agent, wherever it is.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show every allocation and tensor of a publication, its owner, and who reads it.

    Reads the agent's state file alone, so it answers while the agent is busy, stopped or dead; what /proc permits is
    added, and what it forbids is named. Exit status 0: shown, and the agent serves. 1: shown, but the agent does not
    serve. 2: nothing to show (no agent, no such publication, an unreadable file), or wrong usage.
    """
    try:
        if rank is not None and state is not None:
            raise InvalidArgument("--rank and --state both name an agent.", resource="--rank", remedy="Give one.")
        report = look_up(name, rank, state)
    except EthaError as error:
        text = Text(f"etha inspect: {type(error).__name__}: {error}", "red")
        Console(stderr=True, soft_wrap=True).print(text)
        raise typer.Exit(2) from error
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name need not fit into the terminal's encoding
    if json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in _text(report))
    if report.agent.condition != "serving":
        raise typer.Exit(1)


def look_up(name: str, rank: int | None = None, state_path: str | None = None) -> Report:
    """Find a publication, and look at it.

    Raises:
        NoAgent: there is no agent, dead or alive, that could have it.
        NoPublication: none of the name is recorded; the text names those that are.
        InvalidArgument: several agents have one of the name.
        EthaError: the only agent's files cannot be read; see `StateReader`.
    """
    books = _having(name, *_open(rank, state_path))
    return Report(books.agent, tuple(_anatomies(name, books)))


def _open(rank: int | None, state_path: str | None) -> tuple[list[Books], list[EthaError]]:
    """The books of every agent that is meant, and why others cannot be read."""
    if state_path is not None:
        paths = [state_path]
    elif rank is not None:
        paths = [default_paths(rank)[1]]
    else:
        paths = [path for _, path in agents_by_convention()]
    books: list[Books] = []
    failures: list[EthaError] = []
    for path in paths:
        try:
            books.append(_read(path))
        except EthaError as error:
            failures.append(error)
    if failures and not books:
        raise failures[0]
    return books, failures


def _read(state_path: str) -> Books:
    lock = lock_beside(state_path)
    if lock is not None and lock.text is not None:  # before LMDB opens anything
        _require_current(state_path, lock.text.boot, lock.text.schema)
    if lock is None or not lock.held:
        require_readable(state_path)
    reader = StateReader(state_path)
    try:
        records = reader.snapshot(
            (AgentRecord, ClientRecord, PublicationRecord, VersionRecord, MemoryRecord, ClaimRecord)
        )
        now = clock.now()
    finally:
        reader.close()
    agent: AgentRecord | None = next(iter(records[AgentRecord].values()), None)
    if agent is None:
        raise NoAgent(f"the agent of {state_path} has recorded nothing yet.", resource=state_path, remedy="Try again.")
    _require_current(state_path, agent.boot, agent.schema)
    condition = condition_of(agent, lock or read_lock(agent.command + ".agent"), now)
    view = AgentBrief(
        agent.rank, agent.pid, condition, agent.device, agent.epoch, os.path.abspath(state_path), now - agent.heartbeat
    )
    return Books(view, agent.namespace, now, records)


def _require_current(state_path: str, boot: str, schema: int) -> None:
    """Refuse what means nothing any more, and what another etha wrote.

    Raises:
        NoAgent, VersionMismatch: so it is.
    """
    if boot != boot_id():
        raise NoAgent(
            f"{state_path} is of another boot: what it names is gone.", resource=state_path, remedy="Start: etha agent"
        )
    if schema != SCHEMA:
        raise VersionMismatch(
            f"{state_path} has record schema {schema}, this etha {SCHEMA}.",
            resource=state_path,
            remedy="Use the etha that its agent is of; run: etha doctor",
        )


def _having(name: str, books: list[Books], failures: list[EthaError]) -> Books:
    """The one agent that has a publication of the name; where several have, the one that is not dead."""
    if not books:
        where = runtime_directory()
        raise NoAgent(f"there is no agent in {where}.", resource=where, remedy="Start one: etha agent")
    having = [each for each in books if name in each.names]
    alive = [each for each in having if each.agent.condition != "dead"]
    if len(alive or having) > 1:
        ranks = ", ".join(str(each.agent.rank) for each in alive or having)
        raise InvalidArgument(
            f'the agents of ranks {ranks} each have "{name}".',
            resource=name,
            holder=f"ranks {ranks}",
            remedy="Say --rank.",
        )
    if not having:
        unread = "".join(f" Not read: {failure.message}" for failure in failures)
        raise NoPublication(
            f'nothing is published as "{printable(name)}".{unread}', resource=name, remedy=_there_are(books)
        )
    return (alive or having)[0]


def _there_are(books: Iterable[Books]) -> str:
    known = [f'"{printable(name)}" (rank {each.agent.rank})' for each in books for name in sorted(each.names)]
    if not known:
        return "Nothing else is, either."
    more = f" and {len(known) - _NAMES_SHOWN} more: etha status" if len(known) > _NAMES_SHOWN else ""
    return f"There are: {', '.join(known[:_NAMES_SHOWN])}{more}."


def _anatomies(name: str, books: Books) -> Iterator[Anatomy]:
    records, eyes = books.records, Eyes(books.namespace)
    clients: dict[bytes, ClientRecord] = records[ClientRecord]
    claims: dict[int, list[tuple[ClientRecord | None, ClaimRecord]]] = {}
    for key, claim in records[ClaimRecord].items():
        if claim.name == name:
            claims.setdefault(claim.generation, []).append((clients.get(client_key(key[_CLIENT])), claim))
    found = [(key_number(key), each) for key, each in records[PublicationRecord].items() if each.name == name]
    for newest, (generation, record) in enumerate(sorted(found, reverse=True)):
        validate(record.manifest)
        waiting = claims.get(0, []) if newest == 0 else []
        those = claims.get(generation, [])
        memory = records[MemoryRecord].get(memory_key(generation))
        look = eyes.look(record.pid, record.since, generation, record.manifest)
        yield anatomy(
            generation,
            record,
            records[VersionRecord].get(version_key(generation)),
            Owner(clients.get(client_key(record.owner)), remembered(look, memory)),
            [
                Reader(claim, client, eyes.look(claim.pid, claim.since, generation, record.manifest))
                for client, claim in those
                if claim.kind == "import" and claim.granted
            ],
            [claim for _, claim in (*those, *waiting) if claim.kind != "import" or not claim.granted],
            books.agent.device,
            books.now,
        )


def _text(report: Report) -> Iterator[str]:
    agent = report.agent
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    yield (
        f"agent rank {agent.rank} · pid {agent.pid} · {agent.device} · {agent.condition}"
        f" · heartbeat {agent.heartbeat_age_s:.1f} s ago"
    )
    for view in report.publications:
        yield ""
        yield from lines(view, width)
