"""All checks in their order, and the report of what they found.

The order is that of causes: what stands first explains what fails later. So the first problem of a report is the gate,
not its consequence.
"""

from __future__ import annotations

import time

from etha.cli.doctor import (
    agents,
    calls,
    files,
    gpu,
    limits,
    passing,
    runner,
    shared_memory,
    sharing,
    surroundings,
    tracing,
    versions,
)
from etha.cli.doctor.finding import Finding, Report, headline, in_order
from etha.cli.doctor.runner import Check


def examine(rank: int | None, device: str) -> Report:
    """Try everything; takes seconds, most of them for importing torch in a child.

    Args:
        rank: of the one agent to look at; None for all that are found, and the one that the environment names.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
    """
    began = time.monotonic()
    longest, others = sharing.checks(), gates(rank, device)
    found = runner.run([*longest, *others])  # the longest starts first, and is told last
    findings = in_order(sorted(found, key=lambda each: each.section == sharing.SECTION))
    return Report(
        verdict=findings[0].verdict,
        headline=headline(findings),
        seconds=round(time.monotonic() - began, 2),
        surroundings=surroundings.surroundings(),
        versions=versions.versions(),
        variables=surroundings.shown_variables(),
        findings=findings,
    )


def gates(rank: int | None, device: str) -> list[Check]:
    """All checks but the end-to-end one, in the order of causes: a second's work."""
    return [
        *versions.checks(),
        *shared_memory.checks(),
        *limits.checks(),
        *passing.checks(),
        *calls.checks(),
        *tracing.checks(),
        Check(files.directory_gate(), lambda: _places(rank), seconds=8.0),
        *gpu.checks(device),
    ]


def _places(rank: int | None) -> list[Finding]:
    """What stands in the runtime directory. In a child as a whole: a file system may hang already when it is listed."""
    ranks = agents.ranks(rank)
    return runner.run([*files.checks(ranks), *agents.checks(ranks, rank)])
