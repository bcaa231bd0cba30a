"""``etha status``: who publishes, who reads, who waits for whom."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from etha.cli.survey import AgentView, survey
from etha.tensor_bus.paths import runtime_directory

_PIPED_WIDTH: Final = 200
_COLOURS: Final = {"serving": "green", "busy": "yellow", "stopped": "yellow"}


def status(
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    state: Annotated[str | None, typer.Option(metavar="PATH", help="Only the agent with this state LMDB.")] = None,
) -> None:
    """Show the agents of this box, their workers, publications, leases and waits.

    Reads their state files alone, so it answers while an agent is busy, stopped or dead. Exit status 0: every agent
    found serves. 1: there is none, or one does not.
    """
    agents = survey(state)
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    if json:
        console.print(Text(msgspec.json.encode({"agents": agents}).decode()))
    elif not agents:
        console.print(Text(f"no agent in {runtime_directory()}. Start one: etha agent"))
    for agent in agents if not json else ():
        _show(console, agent)
    if not agents or any(agent.condition != "serving" for agent in agents):
        raise typer.Exit(1)


def _show(console: Console, agent: AgentView) -> None:
    rank = "?" if agent.rank is None else agent.rank
    console.print(
        Text.assemble(
            (f"agent rank {rank}", "bold"),
            f" · pid {agent.pid} · {agent.device} · ",
            (agent.condition, _COLOURS.get(agent.condition, "red")),
            "" if agent.heartbeat_age_s is None else f" · heartbeat {agent.heartbeat_age_s:.1f} s ago",
            f" · {agent.state_path}",
        )
    )
    if agent.problem is not None:
        console.print(Text(f"  {agent.problem}", "red"))
    for table in (_workers(agent), _publications(agent), _leases(agent), _waits(agent)):
        if table.row_count:
            console.print(table)
    if agent.counters:
        console.print(Text("  " + " · ".join(f"{name} {count}" for name, count in sorted(agent.counters.items()))))


def _workers(agent: AgentView) -> Table:
    table = _table("worker", "connection", "age")
    for worker in agent.workers:
        table.add_row(
            Text(worker.label), "open" if worker.connected else "ended, process lives", f"{worker.age_s:.0f} s"
        )
    return table


def _publications(agent: AgentView) -> Table:
    table = _table("publication")  # two lines for each, not nine columns: a terminal has 80 characters
    for each in agent.publications:
        table.add_row(
            Text(
                f"{each.name} · version {each.version} · {each.phase} · {each.tensors} tensors, {decimal(each.nbytes)}"
                f" · readers {each.readers}\n  {each.kind} · {each.owner} · {each.memory}"
            )
        )
    return table


def _leases(agent: AgentView) -> Table:
    table = _table("held", "of", "version", "by", "age")
    for each in agent.leases:
        version = "" if each.version is None else str(each.version)
        table.add_row(each.kind, Text(each.publication), version, Text(each.holder), f"{each.age_s:.1f} s")
    return table


def _waits(agent: AgentView) -> Table:
    table = _table("who waits", "for a", "of", "held up by", "age")
    for each in agent.waits:
        blockers = Text(", ".join(each.waits_for) or "nobody: for it to come")
        table.add_row(Text(each.who), each.wants, Text(each.publication), blockers, f"{each.age_s:.1f} s")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in columns:
        table.add_column(column)
    return table
