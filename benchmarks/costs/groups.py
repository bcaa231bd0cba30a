"""Groups of rows: each is measured in a process of its own, one after the other, behind a bar of progress.

A program's catalogue is a list of them. The process is forked from one that has done nothing yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from costs.pairing import Run
from costs.processes import Helper, Talk
from costs.row import Row


class Group(NamedTuple):
    """Rows that one function measures."""

    measure: Callable[[Run], list[Row]]
    rows: tuple[str, ...]


def chosen(groups: Sequence[Group], only: Sequence[str]) -> list[Group]:
    """The groups that these rows are of; all, for no rows.

    Raises:
        LookupError: there is no such row; its text names those that there are.
    """
    known = [name for group in groups for name in group.rows]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise LookupError(f"{unknown[0]!r} is none of: {', '.join(known)}")
    return [group for group in groups if not only or set(group.rows) & set(only)]


def measure(groups: Sequence[Group], quick: bool) -> tuple[list[Row], list[str]]:
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
            with Helper(_run, group, quick) as helper:
                try:
                    while isinstance(said := helper.hear(), float):
                        progress.update(whole, completed=number + said, refresh=True)
                    rows += msgspec.convert(said, list[Row])
                except (EOFError, TimeoutError) as error:
                    broken += group.rows
                    progress.console.print(Text(f"{group.rows[0]}: {error}", "red"))
        progress.update(whole, completed=len(groups), refresh=True)
    return rows, broken


def _run(talk: Talk, group: Group, quick: bool) -> None:
    rows = group.measure(Run(quick, lambda share: talk.say(float(share))))
    talk.say(rows)
