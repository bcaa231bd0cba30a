"""What is run on a GPU box, in this order, and what is gathered of each part."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from gpurun import outcomes

BENCHMARKS: Final = Path(__file__).parent.parent
ROOT: Final = BENCHMARKS.parent

_SEGMENTS: Final = dict.fromkeys(("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "expandable_segments:True")
_FIRST: Final = ("list-publish-read", "list-handover", "copy", "stamp", "memory", "export")
"""Groups of rows of ``bandwidth.py`` by their first row; should time run out, the last are missing."""


class Part(NamedTuple):
    """One part.

    Attributes:
        name: of it in the file.
        command: what is run.
        least: seconds that the parts before must leave it.
        most: seconds after which it has failed.
        gather: from what it said, what goes into the file.
        environment: what it has beside `environment`.
    """

    name: str
    command: tuple[str, ...]
    least: float
    most: float
    gather: Callable[[str], dict[str, Any]]
    environment: Mapping[str, str] = {}


def environment() -> dict[str, str]:
    """Of every part: a bare checkout is imported from where it lies, and pytest loads no plugins of the box's."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if name != "OUT"}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def parts(scratch: Path, scale: float) -> list[Part]:
    """All of them.

    Args:
        scratch: an empty directory, for the files of parts.
        scale: of the model in ``bandwidth.py``.

    Raises:
        ModuleNotFoundError: of what etha itself needs, something is missing.
    """
    probes = (sys.executable, str(BENCHMARKS / "probes" / "run_all.py"), "--out", str(scratch / "probes"))
    again = ("tests/contract", "tests/test_gpu_bus.py")
    return [
        Part("probes", probes, 90.0, 200.0, lambda said: _probes(scratch / "probes")),
        _tests("tests", scratch, ("tests",), 190.0, {}),
        _tests("tests, expandable segments", scratch, again, 100.0, _SEGMENTS),
        *_bandwidth(scratch, scale),
    ]


def _tests(name: str, scratch: Path, where: tuple[str, ...], least: float, changed: Mapping[str, str]) -> Part:
    report = scratch / f"{name}.xml"
    command = (
        *(sys.executable, "-m", "pytest", "-v", "-m", "cuda and not stress", "-p", "no:cacheprovider"),
        *("--continue-on-collection-errors", "--tb=short", f"--junitxml={report}", *where),
    )
    return Part(name, command, least, 280.0, lambda said: outcomes.gather(report, said), changed)


def _probes(directory: Path) -> dict[str, Any]:
    files = sorted(directory.glob("probes-*.json"))
    return json.loads(files[-1].read_text()) if files else {}


def _bandwidth(scratch: Path, scale: float) -> list[Part]:
    """A part for each group of rows, so that one which takes too long costs only itself."""
    from bandwidths.catalogue import groups

    made = []
    for group in groups("cuda:0", scale):
        if group.rows[0].endswith("-host") or "-host-" in group.rows[0]:
            continue
        report = scratch / f"bandwidth-{group.rows[0]}.json"
        command = [sys.executable, str(BENCHMARKS / "bandwidth.py"), "--device", "cuda:0", "--scale", str(scale)]
        command += ["--output", str(report), *(word for row in group.rows for word in ("--only", row))]
        rank = next((place for place, first in enumerate(_FIRST) if group.rows[0].startswith(first)), len(_FIRST))
        name = f"bandwidth, {group.rows[0]}"
        made.append((rank, Part(name, tuple(command), 10.0, 75.0, lambda said, report=report: _report(report))))
    return [part for _, part in sorted(made, key=lambda each: each[0])]


def _report(path: Path) -> dict[str, Any]:
    return {"report": json.loads(path.read_text())} if path.exists() else {}
