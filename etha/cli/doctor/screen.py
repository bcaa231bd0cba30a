"""The report for people: what is wrong in the first line, then how to mend it, then everything that was tried."""

from __future__ import annotations

from itertools import groupby
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from etha.cli.doctor.finding import Finding, Report, Verdict

_MARKS: Final[dict[Verdict, tuple[str, str]]] = {
    "ok": ("✓", "green"),
    "degraded": ("!", "yellow"),
    "broken": ("✗", "red"),
}


def show(console: Console, report: Report) -> None:
    """Print it. Everything is text of the report's, never markup."""
    mark, colour = _MARKS[report.verdict]
    console.print(Text(f"{mark} {report.headline}", f"bold {colour}"))
    problems = [_problem(finding) for finding in report.findings if finding.verdict != "ok"]
    well = [finding for finding in report.findings if finding.verdict == "ok"]
    sections = [_well(section, list(found)) for section, found in groupby(well, key=lambda finding: finding.section)]
    for part in (*problems, *sections, _box(report)):
        console.print()
        console.print(part)


def _problem(finding: Finding) -> RenderableType:
    mark, colour = _MARKS[finding.verdict]
    title = Text.assemble((f"{mark} {finding.name}", f"bold {colour}"), (f"  {finding.verdict}", colour))
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    rows.add_row("  tried", Text(finding.tried))
    rows.add_row("  seen", Text(finding.seen))
    rows.add_row("  means", Text(finding.means))
    rows.add_row("  remedy", Text(finding.remedy or "", "bold"))
    return Group(title, rows)


def _well(section: str, findings: list[Finding]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(Text.assemble(("  ✓ ", "green"), finding.name), Text(finding.seen, "dim"))
    return Group(Text(section, "bold"), table)


def _box(report: Report) -> RenderableType:
    told = " · ".join(f"{name} {version}" for name, version in report.versions.items() if version)
    absent = ", ".join(name for name, version in report.versions.items() if not version)
    lines = [Text(told), Text(f"not here: {absent}", "dim")]
    if report.surroundings:
        lines.append(Text(f"inside {', '.join(report.surroundings)}"))
    lines += [Text(f"{name}={value!r}") for name, value in report.variables.items()]
    lines.append(Text(f"{len(report.findings)} checks in {report.seconds:.1f} s"))
    return Group(Rule(style="dim"), *lines)
