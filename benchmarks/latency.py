"""What each operation of etha costs, beside its bare floor, in one run: ``python benchmarks/latency.py``.

The rows are those of the design's budgets that need no GPU. Each group of them is measured in a process of its own,
forked from this one, with an agent and a runtime directory of its own: no row finds what another left behind.
``benchmarks/README.md`` says how to read the result.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
import torch
import typer
from costs.catalogue import Group, chosen
from costs.machine import machine
from costs.pairing import Run
from costs.processes import Helper, Talk
from costs.report import METHOD, Report, quotation, read, table, write
from costs.row import Row
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

RESULTS = Path(__file__).parent / "results" / "latency.json"


def latency(
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run: seconds, and numbers that mean nothing.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(metavar="ROW", help="Only this row; repeatable.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file. [default: results/latency.json, if every row is measured in full]")
    ] = None,
    quote: Annotated[
        bool, typer.Option("--quote", help="Measure nothing: print the file's rows as the README quotes them.")
    ] = False,
    plot: Annotated[bool, typer.Option("--plot", help="A PNG beside the JSON file (needs matplotlib).")] = False,
) -> None:
    """Measure what etha costs, beside the bare floor of each operation.

    Exit status 0: every row was measured, whatever it showed. 1: one could not be. 2: no such row.
    """
    if quote:
        sys.stdout.write(quotation(read(output or RESULTS)))
        return
    try:
        groups = chosen(only or [])
    except LookupError as error:
        raise typer.BadParameter(str(error.args[0]), param_hint="--only") from error
    where = output or (None if quick or only else RESULTS)
    if plot and where is None:
        raise typer.BadParameter("a partial run has no file of its own: say --output too", param_hint="--plot")
    torch.set_num_threads(1)
    before = machine()
    started = time.monotonic()
    rows, broken = _measure(groups, quick)
    rows = [row for row in rows if not only or row.name in only]
    report = Report(
        program="benchmarks/latency.py",
        quick=quick,
        method=METHOD,
        machine=before,
        load_after=os.getloadavg(),
        seconds=time.monotonic() - started,
        verdicts={row.name: row.note or row.verdict for row in rows},
        rows=tuple(rows),
    )
    console = Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 230)
    console.print(table(report.rows))
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


def _measure(groups: list[Group], quick: bool) -> tuple[list[Row], list[str]]:
    """The rows, and the names of those that could not be measured."""
    rows: list[Row] = []
    broken: list[str] = []
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    # No thread of its own that redraws: it would take part in the measurement.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        whole = progress.add_task("", total=len(groups))
        for number, group in enumerate(groups):
            progress.update(whole, description=group.rows[0], refresh=True)
            with Helper(_run_group, group, quick) as helper:
                try:
                    while isinstance(said := helper.hear(), float):
                        progress.update(whole, completed=number + said, refresh=True)
                    rows += msgspec.convert(said, list[Row])
                except (EOFError, TimeoutError) as error:
                    broken += group.rows
                    progress.console.print(Text(f"{group.rows[0]}: {error}", "red"))
        progress.update(whole, completed=len(groups), refresh=True)
    return rows, broken


def _run_group(talk: Talk, group: Group, quick: bool) -> None:
    rows = group.measure(Run(quick, lambda share: talk.say(float(share))))
    talk.say(rows)


if __name__ == "__main__":
    typer.run(latency)
