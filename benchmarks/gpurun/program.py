"""The run: one part after the other, each with its share of the time, into one file that is true after each of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gpurun.child import Ran, become_reaper, run
from gpurun.parts import BENCHMARKS, ROOT, Part, environment

_TAIL: Final = 60
"""Lines of what a part said that go into the file if it went wrong."""

_ANSWER_SECONDS: Final = 60.0
"""``cuInit`` takes long where the driver must be woken."""


def machine() -> dict[str, Any]:
    """Device, driver, kernel and versions, asked in a child: this process touches no device.

    Where there is no GPU, ``device`` is None and ``reason`` says why.
    """
    code = "import json, rig; print(json.dumps(rig.machine()))"
    try:
        ran = subprocess.run(
            [sys.executable, "-c", code],
            cwd=BENCHMARKS / "probes",
            env=environment(),
            capture_output=True,
            text=True,
            timeout=_ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"device": None, "reason": f"the driver did not answer within {_ANSWER_SECONDS:.0f} s"}
    try:
        found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = (ran.stderr or ran.stdout).strip().splitlines()
        return {"device": None, "reason": f"asking for it ended with {ran.returncode}: {said[-1] if said else ''}"}
    return found


def name_of(about: dict[str, Any]) -> str:
    """Of the files, without suffix: ``gpu-nvidia-h100-80gb-hbm3-20261125``."""
    device = re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower()).strip("-")
    return f"gpu-{device}-{time.strftime('%Y%m%d', time.gmtime())}"


def run_all(these: Sequence[Part], about: dict[str, Any], out: Path, limit: float, scratch: Path) -> bool:
    """Run the parts and write what they showed; whether all went well.

    Args:
        these: in order. One gets what is left of the time, less what those after it need at least.
        about: the machine, from `machine`.
        out: directory for the file; made if it is missing.
        limit: seconds for all of it.
        scratch: for the logs.
    """
    become_reaper()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name_of(about)}.json"
    began = time.monotonic()
    found: dict[str, Any] = {"program": "benchmarks/gpu.py", "machine": about, "seconds": 0.0, "parts": {}}
    well = True
    for number, part in enumerate(these):
        later = sum(each.least for each in these[number + 1 :])
        left = limit - (time.monotonic() - began)
        seconds = min(part.most, max(left - later, min(part.least, left)))
        if seconds < 2:
            record: dict[str, Any] = {"status": "not run: no time was left", "exit_status": None}
        else:
            log = scratch / f"part-{number}.log"
            ran = run(part.command, seconds, log, {**environment(), **part.environment}, ROOT)
            record = _record(part, ran)
        good = record["status"] == "ended" and record["exit_status"] == 0
        well = well and good
        found["parts"][part.name] = record
        found["seconds"] = round(time.monotonic() - began, 1)
        path.write_text(json.dumps(found, indent=1) + "\n")
        _tell(part.name, record, good)
    print(f"written: {path}", flush=True)
    _draw(found, path.with_suffix(".png"))
    return well


def _record(part: Part, ran: Ran) -> dict[str, Any]:
    record: dict[str, Any] = {"status": ran.status, "exit_status": ran.exit_status, "seconds": ran.seconds}
    if ran.status != "ended" or ran.exit_status != 0:
        record["tail"] = ran.said.splitlines()[-_TAIL:]
    try:
        record["found"] = part.gather(ran.said)
    except (OSError, ValueError) as error:  # it was stopped while it wrote its file
        record["gathering"] = f"{type(error).__name__}: {error}"
    return record


def _tell(name: str, record: dict[str, Any], good: bool) -> None:
    found = record.get("found", {})
    counts = ", ".join(f"{count} {outcome}" for outcome, count in found.get("counts", {}).items())
    took = f"{record.get('seconds', 0):.0f} s"
    print(f"{name}: {record['status']}, exit status {record['exit_status']}, {took} {counts}".rstrip(), flush=True)
    for test, why in found.get("failures", {}).items():
        print(f"  {test}: {why.strip().splitlines()[0] if why.strip() else 'no reason'}", flush=True)
    for probe in found.get("probes", []):
        print(f"  {probe.get('probe')}: {probe.get('status')}: {probe.get('answer')}", flush=True)
    if not good and "failures" not in found:
        for line in record.get("tail", [])[-15:]:
            print(f"  | {line}", flush=True)


def _draw(found: dict[str, Any], path: Path) -> None:
    """One figure of all rows of ``bandwidth.py`` that were measured."""
    each = [record.get("found", {}) for record in found["parts"].values()]
    reports = [one["report"] for one in each if "report" in one]
    if not reports:
        return
    try:
        import msgspec
        from costs.plot import draw
        from costs.report import Report
    except ModuleNotFoundError as error:
        print(f"no figure: {error.name} is missing", flush=True)
        return
    read = [msgspec.convert(report, Report) for report in reports]
    rows = tuple(row for report in read for row in report.rows)
    verdicts = {name: verdict for report in read for name, verdict in report.verdicts.items()}
    draw(path, msgspec.structs.replace(read[0], rows=rows, verdicts=verdicts))
    print(f"written: {path}", flush=True)


def scratch_directory() -> tempfile.TemporaryDirectory[str]:
    """For logs and the files of parts."""
    return tempfile.TemporaryDirectory(prefix="etha-gpu-")
