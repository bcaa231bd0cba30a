"""What the user sees: progress while it runs, and a summary."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from etha.cli.demo.report import Latency, Report

_PLAIN_PERIOD_S: Final = 2.0
"""Between two lines where nothing can be overwritten: a log, a pipe."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """The run so far."""

    trainer_pid: int
    bytes_shared: int
    trainer_inodes: tuple[int, ...]
    evaluator_pid: int
    evaluator_inodes: tuple[int, ...]
    version: int
    accuracy: float
    torn: int
    bytes_copied: int

    def __str__(self) -> str:
        return " · ".join(
            (
                f"trainer {self.trainer_pid} owns {size(self.bytes_shared)}, {_inodes(self.trainer_inodes)}",
                f"evaluator {self.evaluator_pid} reads {_inodes(self.evaluator_inodes)}",
                f"v {self.version}",
                f"accuracy {self.accuracy:.3f}",
                f"torn {self.torn}",
                f"copied {size(self.bytes_copied)}",
            )
        )


class Screen:
    """A context manager: one live line on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._last_plain = 0.0

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        """A line that stays."""
        self._console.print(Text(text, style), soft_wrap=True)

    def show(self, progress: Progress | str) -> None:
        """The live line, replacing the one before; a plain line only where the last is old enough."""
        if self._live is not None:
            self._live.update(Text(str(progress)), refresh=True)
            return
        now = time.monotonic()
        if isinstance(progress, str) or now - self._last_plain >= _PLAIN_PERIOD_S:
            self._last_plain = now
            self.say(str(progress))


def size(nbytes: int) -> str:
    """``0 B``, ``812 B``, ``1.2 MB``: powers of 1000, as disks and networks count."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def summarise(console: Console, report: Report) -> None:
    """The table, what it means, and what to try next."""
    table = Table(title="etha demo", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in _rows(report):
        table.add_row(name, value)
    console.print(table)
    _conclude(console, report)
    if report.ok:
        console.print(Text("Try next:", "bold"))
        for text in _NEXT:
            console.print(Text(f"  · {text}"), soft_wrap=True)


_NEXT: Final = (
    "etha demo --steps 3000, and in another terminal the `etha status` command that it prints at its start",
    "etha demo --sabotage: the same without leases, and what the stamps make of it",
    "etha agent --rank 0; then, with AGENT_RANK=0 set, examples/train_and_publish.py and"
    " examples/live_eval.py (in etha's repository) in two more terminals: change them",
)


def _rows(report: Report) -> list[tuple[str, str]]:
    return [
        ("final accuracy", f"{report.accuracy:.3f}"),
        ("versions published", f"{report.versions_published}"),
        ("versions read whole", f"{report.versions_read} in {report.reads} reads"),
        ("torn reads", f"{report.torn}"),
        ("bytes shared", size(report.bytes_shared)),
        ("bytes copied", size(report.bytes_copied)),
        ("publish (leaving update)", _latency(report.publish)),
        ("read (taking a lease)", _latency(report.read)),
        ("entering update (evaluator reads)", _latency(report.update_enter)),
    ]


def _conclude(console: Console, report: Report) -> None:
    if report.sabotage and report.ok:
        text = (
            f"SABOTAGE, as ordered: {report.torn} of {report.reads} reads without a lease were torn. That is what"
            " this run must show (exit 0): the stamps of a normal run would have seen a torn read."
        )
        console.print(Text(text, "bold yellow"), soft_wrap=True)
    for failure in report.failures:
        console.print(Text(f"FAILED: {failure}", "bold red"), soft_wrap=True)


def _latency(value: Latency | None) -> str:
    if value is None:
        return "no leases were taken"
    return f"median {value.median_us:,.0f} µs, p99 {value.p99_us:,.0f} µs"


def _inodes(inodes: tuple[int, ...]) -> str:
    """The first, which lies under the largest tensor, and how many more there are."""
    if not inodes:
        return "inode ?"
    more = f" (+{len(inodes) - 1})" if len(inodes) > 1 else ""
    return f"inode {inodes[0]}{more}"
