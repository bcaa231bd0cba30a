"""``--plot``: accuracy by version, and how the two latencies are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from etha.cli.demo.report import ACCURACY_GOAL, Curves


def draw(path: Path, curves: Curves, title: str) -> None:
    """Writes the figure to ``path``, in the format that its suffix names."""
    with mpl.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        figure.suptitle(title)
        left, right = figure.subplots(1, 2)
        _accuracy(left, curves.accuracy)
        _latencies(right, {"publish (leaving update)": curves.publish_us, "read (taking a lease)": curves.read_us})
        figure.savefig(path, dpi=150)


def _accuracy(axes: Axes, points: Sequence[tuple[int, float]]) -> None:
    versions, scores = zip(*points, strict=True) if points else ((), ())
    axes.plot(versions, scores, linewidth=1.2)
    axes.axhline(ACCURACY_GOAL, linestyle="--", color="tab:gray", linewidth=1, label=f"goal {ACCURACY_GOAL}")
    axes.set(xlabel="version", ylabel="test accuracy", title="Accuracy by version", ylim=(0, 1.02))
    axes.legend(loc="lower right")


def _latencies(axes: Axes, samples: dict[str, Sequence[float]]) -> None:
    """The share of operations that took no longer than x."""
    for name, values in samples.items():
        if not values:
            continue
        ordered = np.sort(np.asarray(values))
        median = float(np.median(ordered))
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        axes.step(ordered, share, where="post", label=f"{name}: median {median:,.0f} µs")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="time (µs, log)", ylabel="share of operations done", title="Latency", ylim=(0, 1.02))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
