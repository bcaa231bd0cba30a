"""What pytest has to say: from its JUnit file, or, where it did not come to write that, from the lines of ``-v``."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*$")
_BEGUN = re.compile(r"^(\S+::.+?) *$")
_LONGEST = 6000
"""Characters of one failure: its end, where the reason stands."""


def gather(report: Path, said: str) -> dict[str, Any]:
    """Outcomes by test, what failed and why, what was skipped and why, and what was running at the end."""
    try:
        return _of_report(ElementTree.parse(report).getroot())
    except (FileNotFoundError, ElementTree.ParseError):
        return _of_lines(said)


def _of_report(root: ElementTree.Element) -> dict[str, Any]:
    outcomes: dict[str, str] = {}
    seconds: dict[str, float] = {}
    reasons: dict[str, dict[str, str]] = {"failures": {}, "skipped": {}}
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        found = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        seconds[name] = round(float(case.get("time", 0)), 2)
        if found is None:
            outcomes.setdefault(name, "passed")
        elif found.tag == "skipped":
            outcomes[name] = "skipped"
            reasons["skipped"][name] = found.get("message", "")
        else:
            outcomes[name] = "failed" if found.tag == "failure" else "error"
            reasons["failures"][name] = f"{found.get('message', '')}\n{found.text or ''}"[-_LONGEST:]
    return {"counts": dict(Counter(outcomes.values())), "outcomes": outcomes, "seconds": seconds, **reasons}


def _of_lines(said: str) -> dict[str, Any]:
    outcomes: dict[str, str] = {}
    running = ""
    for line in said.splitlines():
        if match := _LINE.match(line):
            outcomes[match[1]] = match[2].lower()
            running = ""
        elif match := _BEGUN.match(line):
            running = match[1]
    return {"counts": dict(Counter(outcomes.values())), "outcomes": outcomes, "running at the end": running}
