"""How long after a process's death everything of its is free: ``python benchmarks/reclaim.py``.

A process is killed that owns a publication, that holds leases, or that is and has all there is. Then its records, the
agent's mappings and descriptors, its commands, its files in /dev/shm and its slots in LMDB's tables are looked for,
until none is left. ``benchmarks/README.md`` says how to read the result.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import msgspec
import typer
from costs.machine import Machine, machine
from costs.reclaim import KINDS, PARTS, Death, measure
from costs.report import amount
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

RESULTS = Path(__file__).parent / "results" / "reclaim.json"
FULL = 1000
MEDIAN_SECONDS = 0.1
WORST_SECONDS = 1.0


class Spread(msgspec.Struct, frozen=True):
    """Seconds."""

    median: float
    p99: float
    worst: float


class Row(msgspec.Struct, frozen=True):
    """One kind of process: the whole, and each part; ``met`` is of the whole."""

    whole: Spread
    parts: dict[str, Spread]
    met: bool


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run. ``budget``: seconds of the whole."""

    program: str
    rounds: int
    machine: Machine
    load_after: tuple[float, float, float]
    seconds: float
    budget: dict[str, float]
    rows: dict[str, Row]


def reclaim(
    rounds: Annotated[int, typer.Option(min=1, help="Deaths of each kind.")] = FULL,
    output: Annotated[
        Path | None, typer.Option(help=f"JSON file. [default: results/reclaim.json, for {FULL} rounds and more]")
    ] = None,
) -> None:
    """Kill processes, and see when everything of theirs is free.

    Exit status 0: within the budget. 1: not.
    """
    where = output or (RESULTS if rounds >= FULL else None)
    before, started = machine(), time.monotonic()
    columns = (BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn())
    # No thread of its own that redraws: it would be forked, and take part in the measurement.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        bar = progress.add_task("", total=1.0)
        found = measure(rounds, lambda share: progress.update(bar, completed=share, refresh=True))
    report = Report(
        program="benchmarks/reclaim.py",
        rounds=rounds,
        machine=before,
        load_after=os.getloadavg(),
        seconds=time.monotonic() - started,
        budget={"median": MEDIAN_SECONDS, "worst": WORST_SECONDS},
        rows={kind: _row(deaths) for kind, deaths in found.items()},
    )
    console = Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 120)
    console.print(_table(report))
    if where is not None:
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        console.print(Text(f"written: {where}"))
    if not all(row.met for row in report.rows.values()):
        raise typer.Exit(1)


def _row(deaths: list[Death]) -> Row:
    whole = _spread([death.whole for death in deaths])
    parts = {name: _spread([death.parts[name] for death in deaths]) for name in PARTS}
    return Row(whole, parts, whole.median <= MEDIAN_SECONDS and whole.worst <= WORST_SECONDS)


def _spread(seconds: list[float]) -> Spread:
    ordered = sorted(seconds)
    return Spread(median(ordered), ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], ordered[-1])


def _table(report: Report) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("who dies", "what of its", "median", "p99", "worst", "verdict"):
        table.add_column(column, justify="right" if column in ("median", "p99", "worst") else "left")
    for kind in KINDS:
        row = report.rows[kind]
        verdict = Text("met" if row.met else "missed", style="green" if row.met else "red")
        for name, spread in {"everything": row.whole, **row.parts}.items():
            first = name == "everything"
            times = [amount(value, "seconds") for value in (spread.median, spread.p99, spread.worst)]
            table.add_row(kind if first else "", name, *times, verdict if first else "")
    return table


if __name__ == "__main__":
    typer.run(reclaim)
