"""What a soak found: a table for the screen, a file for whoever quotes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec
from costs.machine import Machine
from costs.report import amount
from rich.table import Table
from rich.text import Text

from endurance.crew import Found
from endurance.plan import Plan
from endurance.samples import Bin, Sample, bins
from endurance.verdict import ENOUGH, RATIO, SLOPE, Judged, judge

METHOD: Final = (
    f"What was looked at is cut into tenths, in order. Flat: the last is at most {RATIO} times the first (medians; of"
    f" calls, the 99th percentiles), and memory and files grow by at most {SLOPE} byte per command (least squares;"
    f" judged from {ENOUGH} commands on). Times are in seconds, sizes in bytes. 'floor' is a ping-pong without etha"
    " between the same calls: it says what the machine did."
)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    Attributes:
        program: what measured.
        title: what was run, in a few words.
        method: how it is judged.
        plan: what was to be run.
        commands: that the agents served in the judged time.
        machine: what it ran on.
        load_after: as in ``uptime``, at the end.
        flat: whether all was.
        verdicts: name to verdict, for those who only look.
        judged: each with its tenths.
        operations, restarts, before, after: see `endurance.crew.Found`.
        series: the run, warm-up included, in parts.
    """

    program: str
    title: str
    method: str
    plan: Plan
    commands: int
    machine: Machine
    load_after: tuple[float, float, float]
    flat: bool
    verdicts: dict[str, str]
    judged: tuple[Judged, ...]
    operations: dict[str, int]
    restarts: tuple[float, ...]
    before: Sample
    after: Sample
    series: tuple[Bin, ...]


def report(plan: Plan, machine: Machine, found: Found) -> Report:
    """Judge a run that has just ended.

    Raises:
        ValueError: it was too short to be judged.
    """
    judged = judge(found.samples, found.timed, plan.seconds)
    counted = [sample.commands for sample in found.samples if sample.moment >= 0]
    commands = counted[-1] - counted[0]
    verdicts = {each.name: each.verdict for each in judged}
    verdicts["amiss"] = amiss(found) or "nothing"
    restarts = f", {len(found.restarts)} restarts of the agent" if found.restarts else ""
    return Report(
        program="benchmarks/soak.py",
        title=(
            f"{plan.minutes:g} minutes, {plan.workers} workers, {plan.publications:,} publications,"
            f" {commands:,} commands{restarts}"
        ),
        method=METHOD,
        plan=plan,
        commands=commands,
        machine=machine,
        load_after=os.getloadavg(),
        flat=all(each.flat for each in judged) and not amiss(found),
        verdicts=verdicts,
        judged=judged,
        operations=found.operations,
        restarts=found.restarts,
        before=found.before,
        after=found.after,
        series=bins(found.samples, found.timed),
    )


def amiss(found: Found) -> str:
    """What the agent still holds when every worker has said goodbye, and its mistakes; empty for nothing."""
    left = {
        "descriptors": found.after.descriptors - found.before.descriptors,
        "claims": found.after.claims,
        "outcomes": found.after.outcomes,
    }
    wrong = [f"{count} {name} left" for name, count in left.items() if count > 0]
    if found.after.mistakes:
        wrong.append(f"{found.after.mistakes} mistakes of the agent")
    if unanswered := sum(count for name, count in found.operations.items() if name.endswith(": AgentTimeout")):
        wrong.append(f"{unanswered} calls that the agent did not answer in time")
    return ", ".join(wrong)


def write(path: Path, made: Report) -> None:
    """Write the report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n")


def read(path: Path) -> Report:
    """A report that was written before.

    Raises:
        msgspec.ValidationError: the file is none.
    """
    return msgspec.json.decode(path.read_bytes(), type=Report)


def table(made: Report) -> Table:
    """What was judged, for a terminal."""
    shown = Table(box=None, padding=(0, 1), header_style="dim", title=made.title, title_justify="left")
    for column in _COLUMNS:
        shown.add_column(column, justify="left" if column in ("what", "verdict") else "right")
    for each in made.judged:
        shown.add_row(
            each.what,
            value(each.tenths[0], each.unit),
            value(each.tenths[-1], each.unit),
            f"{each.ratio:.3f}",
            "" if each.slope is None else f"{each.slope:+.3f}",
            Text(each.verdict, "dim" if not each.judged else "green" if each.flat else "red"),
        )
    return shown


_COLUMNS: Final = ("what", "first tenth", "last tenth", "ratio", "bytes/command", "verdict")


def value(number: float, unit: str) -> str:
    """As people read it."""
    if unit == "s":
        return amount(number, unit)
    return f"{number / (1 << 20):.2f} MiB" if unit == "bytes" else f"{number:,.0f}"
