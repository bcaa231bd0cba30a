"""What a run found: a table for the screen, a file for whoever quotes it."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.table import Table
from rich.text import Text

from costs.machine import Machine
from costs.row import Row
from costs.spread import Spread


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    Attributes:
        program: what measured.
        quick: a run whose numbers mean nothing.
        method: how ratios and spreads are made.
        machine: what it ran on.
        setup: what was chosen for this run, by name.
        load_after: as in ``uptime``, at the end.
        seconds: how long it took.
        rows: in order.
        verdicts: row to verdict, for those who only look.
    """

    program: str
    quick: bool
    method: str
    machine: Machine
    setup: dict[str, str | float] = {}
    load_after: tuple[float, float, float]
    seconds: float
    verdicts: dict[str, str]
    rows: tuple[Row, ...]


METHOD = (
    "Both sides are measured in turns. A round's ratio is that of its two medians; 'ratio' holds the median over the"
    " rounds and their 10th and 90th percentile. 'etha' and 'floor' hold those of all samples. Times are in seconds."
)


def write(path: Path, report: Report) -> None:
    """Write the report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def read(path: Path) -> Report:
    """A report that was written before.

    Raises:
        msgspec.ValidationError: the file is none.
    """
    return msgspec.json.decode(path.read_bytes(), type=Report)


def quotation(report: Report) -> str:
    """The rows with a verdict, as a Markdown table: what the README quotes."""
    lines = ["| operation | beside | found (p10-p90) | budget | verdict |", "|---|---|---|---|---|"]
    for row in report.rows:
        if row.budget is None:
            continue
        if row.budget.kind != "value" and row.ratio is not None:
            found = f"{ratio(row.ratio)} ×"
        else:
            found = "" if row.etha is None else f"{amount(row.etha.median, row.unit)} {around(row.etha, row.unit)}"
        cells = (f"{row.what} (`{row.name}`)", row.floor_is, found, row.budget.text, row.note or row.verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table(rows: tuple[Row, ...]) -> Table:
    """The rows, for a terminal."""
    made = Table(box=None, padding=(0, 1), header_style="dim")
    for column, justify in _COLUMNS:
        made.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        made.add_row(
            row.name,
            row.what,
            "" if row.etha is None else amount(row.etha.median, row.unit),
            "" if row.floor is None else amount(row.floor.median, row.unit),
            row.floor_is,
            ratio(row.ratio) if row.ratio is not None else around(row.etha, row.unit),
            "" if row.budget is None else row.budget.text,
            Text(row.note or row.verdict, style=_style(row)),
        )
    return made


_COLUMNS = (
    ("row", "left"),
    ("what", "left"),
    ("etha", "right"),
    ("floor", "right"),
    ("which floor", "left"),
    ("ratio (p10-p90)", "right"),
    ("budget", "left"),
    ("verdict", "left"),
)


def _style(row: Row) -> str:
    return {True: "green", False: "red", None: "dim"}[row.met]


def ratio(found: Spread) -> str:
    """``"2.31 (2.20-2.44)"``."""
    return f"{found.median:.2f} ({found.p10:.2f}-{found.p90:.2f})"


def around(found: Spread | None, unit: str) -> str:
    """The spread of a row that has no ratio."""
    return "" if found is None else f"({amount(found.p10, unit)}-{amount(found.p90, unit)})"


def amount(value: float, unit: str) -> str:
    """A number as people read it: ``"86.4 µs"``, ``"0.3 %"``, ``"12.1 KiB/s"``."""
    if unit == "share":
        return f"{value:.2%}"
    if unit == "bytes/s":
        return f"{value / 1024:.1f} KiB/s"
    for name, factor in (("ns", 1e9), ("µs", 1e6), ("ms", 1e3)):
        if abs(value) * factor < 1000:
            return f"{value * factor:.3g} {name}"
    return f"{value:.3g} s"
