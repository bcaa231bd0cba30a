"""What each operation of etha costs, beside its bare floor, in one run: ``python benchmarks/latency.py``.

The rows are those of the design's budgets that need no GPU. Each group of them is measured in a process of its own,
forked from this one, with an agent and a runtime directory of its own: no row finds what another left behind.
``benchmarks/README.md`` says how to read the result.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from costs.catalogue import GROUPS
from costs.groups import chosen, measure
from costs.machine import machine
from costs.program import conclude
from costs.report import quotation, read

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
        groups = chosen(GROUPS, only or [])
    except LookupError as error:
        raise typer.BadParameter(str(error.args[0]), param_hint="--only") from error
    where = output or (None if quick or only else RESULTS)
    if plot and where is None:
        raise typer.BadParameter("a partial run has no file of its own: say --output too", param_hint="--plot")
    torch.set_num_threads(1)
    before = machine()
    started = time.monotonic()
    rows, broken = measure(groups, quick)
    rows = [row for row in rows if not only or row.name in only]
    conclude(
        "benchmarks/latency.py",
        rows,
        broken,
        before=before,
        seconds=time.monotonic() - started,
        quick=quick,
        where=where,
        plot=plot,
    )


if __name__ == "__main__":
    typer.run(latency)
