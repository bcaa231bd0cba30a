"""``--plot``: the run in four panels: the agent's memory, both files, the probe's calls, the load."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
from costs.report import amount
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from endurance.report import Report

_MIB = 1 << 20


def draw(path: Path, made: Report) -> None:
    """Writes the figure to ``path``, in the format that its suffix names."""
    machine = made.machine
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(13, 7.5), layout="constrained")
        figure.suptitle(
            f"{made.title}\netha {machine.etha} · {machine.cpu}, {machine.cores} cores · Python {machine.python}"
            f" · {machine.date} · {machine.commit[:10]} · load {machine.load_before[0]:.1f} before,"
            f" {made.load_after[0]:.1f} after"
        )
        panels = figure.subplots(2, 2, sharex=True)
        _memory(panels[0][0], made)
        _files(panels[0][1], made)
        _calls(panels[1][0], made)
        _load(panels[1][1], made)
        for axes in panels.flat:
            axes.axvspan(-made.plan.warm / 60, 0, color="black", alpha=0.06)
            axes.margins(x=0.01)
        for axes in panels[1]:
            axes.set_xlabel("minutes (grey: the warm-up, which is not judged)")
        figure.savefig(path, dpi=110)


def _minutes(made: Report) -> list[float]:
    return [each.last.moment / 60 for each in made.series]


def _memory(axes: Axes, made: Report) -> None:
    axes.plot(_minutes(made), [each.last.rss / _MIB for each in made.series], label="resident")
    axes.plot(_minutes(made), [each.last.private / _MIB for each in made.series], label="private")
    axes.set(title="Agent's memory", ylabel="MiB")
    axes.set_ylim(bottom=0)
    axes.legend()


def _files(axes: Axes, made: Report) -> None:
    axes.plot(_minutes(made), [each.last.state_file / _MIB for each in made.series], label="state LMDB")
    axes.plot(_minutes(made), [each.last.command_file / _MIB for each in made.series], label="command LMDB")
    axes.set(title="Files", ylabel="MiB allocated")
    axes.set_ylim(bottom=0)
    axes.legend()


def _calls(axes: Axes, made: Report) -> None:
    names = {"lease": "a lease", "command": "a registration and its close", "floor": "a ping-pong without etha"}
    for colour, (kind, name) in zip(("tab:blue", "tab:orange", "tab:gray"), names.items(), strict=True):
        seen = [(each.last.moment / 60, each.p50[kind], each.p99[kind]) for each in made.series if kind in each.p50]
        minutes, p50, p99 = zip(*seen, strict=True)
        axes.plot(minutes, p99, color=colour, label=f"{name}, p99")
        axes.plot(minutes, p50, color=colour, linestyle=":", label=f"{name}, p50")
    axes.set(title="The probe's calls", yscale="log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: amount(seconds, "s")))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=7, ncols=3)


def _load(axes: Axes, made: Report) -> None:
    last = [each.last for each in made.series]
    spans = [(early, late, late.moment - early.moment) for early, late in pairwise(last)]
    minutes = [late.moment / 60 for _, late, _ in spans]
    axes.plot(minutes, [(late.commands - early.commands) / span for early, late, span in spans], label="commands/s")
    axes.set(title="Load", ylabel="commands/s")
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    right.grid(visible=False)
    right.plot(
        minutes,
        [100 * (late.cpu - early.cpu) / span for early, late, span in spans],
        color="tab:red",
        label="agent, % of a core",
    )
    right.plot(minutes, [100 * late.load for _, late, _ in spans], color="tab:gray", label="load average × 100")
    right.set_ylim(bottom=0)
    right.set_ylabel("%")
    axes.legend(handles=[*axes.lines, *right.lines], fontsize=7)
