"""``--plot``: each budget and what was found of it; the latencies beside their floors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from costs.report import Report, amount
from costs.row import Row
from costs.spread import Spread


def draw(path: Path, report: Report) -> None:
    """Writes the figure to ``path``, in the format that its suffix names."""
    budgets = [row for row in report.rows if row.budget is not None and row.measured is not None]
    times = [row for row in report.rows if row.unit == "s" and row.etha is not None and row.floor is not None]
    machine = report.machine
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(14, 2 + 0.3 * max(len(budgets), len(times))), layout="constrained")
        figure.suptitle(
            f"etha {machine.etha} · {machine.cpu}, {machine.cores} cores · torch {machine.torch}"
            f" · Python {machine.python} · {machine.date} · {machine.commit[:10]}"
        )
        left, right = figure.subplots(1, 2)
        _budgets(left, budgets)
        _times(right, times)
        figure.savefig(path, dpi=130)


def _budgets(axes: Axes, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        found = row.etha if row.budget.kind == "value" else row.ratio  # type: ignore[union-attr]
        if found is not None:
            limit = row.budget.limit  # type: ignore[union-attr]
            _bar(axes, place, [each / limit for each in _three(found)], "tab:green" if row.met else "tab:red")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="found ÷ budget (median, p10-p90; left of the line: met)", title="Budgets")
    axes.set_xlim(left=1e-2)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()


def _three(found: Spread) -> tuple[float, float, float]:
    return found.p10, found.median, found.p90


def _bar(axes: Axes, place: float, three: Sequence[float], colour: str) -> None:
    low, middle, high = (max(value, 1e-7) for value in three)
    axes.plot([low, high], [place, place], color=colour, linewidth=2, alpha=0.6)
    axes.plot([middle], [place], "o", color=colour, markersize=5)


def _times(axes: Axes, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        if row.etha is not None and row.floor is not None:
            _bar(axes, place - 0.15, _three(row.etha), "tab:blue")
            _bar(axes, place + 0.15, _three(row.floor), "tab:gray")
    axes.set(xscale="log", xlabel="time (blue: etha, grey: its floor)", title="Times")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value, "s")))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
