"""What the programs do around the measuring: the run's report, shown, written and drawn."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from costs.machine import Machine
from costs.report import METHOD, Report, table, write
from costs.row import Row


def conclude(
    program: str,
    rows: Sequence[Row],
    broken: Sequence[str],
    *,
    before: Machine,
    seconds: float,
    quick: bool,
    where: Path | None,
    plot: bool,
    setup: dict[str, str | float] | None = None,
) -> None:
    """Show what was measured, and write it.

    Args:
        program: which, from the repository's root.
        rows: in order; those that were left out say why in their note.
        broken: names of rows that could not be measured.
        before: what it ran on.
        seconds: how long it took.
        quick: the numbers mean nothing.
        where: the JSON file, or None.
        plot: a figure beside it.
        setup: what was chosen for this run, by name.

    Raises:
        typer.Exit: status 1, if a row could not be measured.
    """
    report = Report(
        program=program,
        quick=quick,
        method=METHOD,
        machine=before,
        setup=setup or {},
        load_after=os.getloadavg(),
        seconds=seconds,
        verdicts={row.name: row.note or row.verdict for row in rows},
        rows=tuple(rows),
    )
    console = Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 230)
    skipped = [row for row in rows if row.etha is None]
    console.print(table(tuple(row for row in rows if row.etha is not None)))
    for note in dict.fromkeys(row.note for row in skipped):
        console.print(Text(f"{note}: {', '.join(row.name for row in skipped if row.note == note)}", "dim"))
    if where is not None:
        write(where, report)
        console.print(Text(f"written: {where}"))
        if plot:
            from costs.plot import draw

            draw(where.with_suffix(".png"), report)
            console.print(Text(f"written: {where.with_suffix('.png')}"))
    for name in broken:
        console.print(Text(f"{name}: could not be measured; see above", "red"))
    if broken:
        raise typer.Exit(1)
