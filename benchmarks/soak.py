"""Whether etha stays flat: many workers, many publications, many commands, for hours: ``python benchmarks/soak.py``.

The agent's memory, both LMDB files and the calls of a client of its own are looked at from outside, second by second.
``benchmarks/README.md`` says what the workers do and how the result is judged.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from costs.machine import machine
from costs.tensors import raise_descriptor_limit
from endurance.crew import soak as run
from endurance.plan import Plan
from endurance.report import report, table, write
from endurance.samples import Sample
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

RESULTS = Path(__file__).parent / "results" / "soak.json"


def soak(
    minutes: Annotated[float, typer.Option(min=0.05, help="That are judged; a warm-up comes before.")] = 120.0,
    commands: Annotated[int, typer.Option(min=1, help="That the workers aim for in those minutes.")] = 1_000_000,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 64,
    publications: Annotated[int, typer.Option(help="Of all workers together; three each at least.")] = 1000,
    restart_every: Annotated[float, typer.Option(metavar="SECONDS", help="SIGKILL the agent; 0: never.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the workers' chances.")] = 0,
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS,
    plot: Annotated[bool, typer.Option("--plot", help="A PNG beside the JSON file (needs matplotlib).")] = False,
) -> None:
    """Run etha at work for a long time, and judge whether what it uses grows.

    Exit status 0: flat. 1: not flat, or a process ended that should not. 2: a wrong option.
    """
    if publications < 3 * workers:
        raise typer.BadParameter(f"{workers} workers need {3 * workers} at least", param_hint="--publications")
    plan = Plan(
        minutes=minutes,
        commands=commands,
        workers=workers,
        publications=publications,
        restart_every=restart_every,
        seed=seed,
    )
    torch.set_num_threads(1)
    raise_descriptor_limit()
    before = machine()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # No thread of its own that redraws: it would be forked, and take part in the measurement.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        bar = progress.add_task("registering", total=plan.warm + plan.seconds)
        progress.refresh()

        def told(sample: Sample) -> None:
            text = f"{sample.commands:,} commands · agent {sample.rss >> 20} MiB"
            progress.update(bar, completed=plan.warm + sample.moment, description=text, refresh=True)

        try:
            made = report(plan, before, run(plan, told))
        except (RuntimeError, TimeoutError, ValueError) as error:
            progress.console.print(Text(str(error), "red"))
            raise typer.Exit(1) from error
    console = Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 200)
    console.print(table(made))
    console.print(Text(f"amiss after the last goodbye: {made.verdicts['amiss']}"))
    write(output, made)
    console.print(Text(f"written: {output}"))
    if plot:
        from endurance.figure import draw

        draw(output.with_suffix(".png"), made)
        console.print(Text(f"written: {output.with_suffix('.png')}"))
    if not made.flat:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(soak)
