"""What a check found, and the report of them all.

These structs are the form of ``etha doctor --json``. Its JSON schema stands in ``docs/doctor.schema.json``; a
test holds the two together. Pure.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

import msgspec

Verdict = Literal["ok", "degraded", "broken"]
"""``degraded``: etha works, and something of it does not, or will not for a large model. ``broken``: it does not."""

EXIT_STATUS: Final[dict[Verdict, int]] = {"ok": 0, "degraded": 1, "broken": 2}


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The result of one check.

    Attributes:
        section: what it belongs to: ``"versions"``, ``"gates"``, ``"paths"``, ``"agents"``, ``"gpu"``, ``"processes"``.
        name: of the gate.
        verdict: how it stands.
        tried: what was done.
        seen: what came of it.
        means: what that is to etha.
        remedy: a command or a line of configuration; null exactly where the verdict is ok.
    """

    section: str
    name: str
    verdict: Verdict
    tried: str
    seen: str
    means: str
    remedy: str | None = None


class Gate(NamedTuple):
    """What is being looked at; makes findings about it."""

    section: str
    name: str
    tried: str

    def ok(self, seen: str, means: str) -> Finding:
        """It is open."""
        return Finding(*self[:2], "ok", self.tried, seen, means)

    def degraded(self, seen: str, means: str, remedy: str) -> Finding:
        """It costs a part of what etha does, or will cost it."""
        return Finding(*self[:2], "degraded", self.tried, seen, means, remedy)

    def broken(self, seen: str, means: str, remedy: str) -> Finding:
        """It is shut."""
        return Finding(*self[:2], "broken", self.tried, seen, means, remedy)


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that was found.

    Attributes:
        verdict: the worst of all findings.
        headline: what is wrong, in one line.
        seconds: that the examination took.
        surroundings: containers and launchers that were recognised, such as ``"docker"``.
        versions: of what etha works with; null for what is not installed.
        variables: the environment variables that etha, torch and CUDA go by, where they are set. No others.
        findings: problems first, the worst and the most basic first.
    """

    verdict: Verdict
    headline: str
    seconds: float
    surroundings: tuple[str, ...]
    versions: dict[str, str | None]
    variables: dict[str, str]
    findings: tuple[Finding, ...]


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Problems first, the worst first; among equals, the order given, in which causes come before what they cause."""
    return tuple(sorted(findings, key=lambda finding: -EXIT_STATUS[finding.verdict]))


def headline(findings: tuple[Finding, ...]) -> str:
    """What the first line of the screen says of findings that are `in_order`."""
    problems = [finding for finding in findings if finding.verdict != "ok"]
    if not problems:
        return f"well: {len(findings)} checks, nothing stands in the way"
    first, more = problems[0], len(problems) - 1
    rest = f" (and {more} more)" if more else ""
    return f"{first.verdict}: {first.name}: {first.seen}{rest}"


def schema() -> bytes:
    """The JSON schema of a `Report`, as it stands in ``docs/doctor.schema.json``."""
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(Report)}
    for each in described["$defs"].values():
        each["description"] = inspect.cleandoc(each["description"])  # Python 3.13 does so by itself
    return msgspec.json.format(msgspec.json.encode(described), indent=2) + b"\n"
