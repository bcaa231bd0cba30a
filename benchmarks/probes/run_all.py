"""Run every probe, one after the other, and put their answers into one file.

    python benchmarks/probes/run_all.py --out benchmarks/results

Ends within `LIMIT`. A probe that hangs or crashes costs its own answer only. Without a GPU each says that it skips, and
nothing is written. ``ETHA_GPU_FAULTS=1`` lets the last one make the device fault.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROBES = (
    "fence_or_event",
    "exporter_dies",
    "torch_handles",
    "other_user",
    "costs",
    "ping_pong",
    "read_only_fault",
)
"""In the order of docs/cuda-ipc.md; the one that makes the device fault comes last."""

EACH = 62.0
"""Seconds for one: a little more than it gives itself."""

LIMIT = 470.0
"""Seconds for all."""


def run_one(name: str, seconds: float) -> dict[str, Any]:
    """One probe in a process group of its own, which is ended with it."""
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py"))]
    environment = {key: value for key, value in os.environ.items() if key != "OUT"}
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True, stdin=subprocess.DEVNULL
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        said = None
    try:
        os.killpg(process.pid, signal.SIGKILL)  # children that it left, or itself
    except ProcessLookupError:
        pass
    process.wait(30)
    lines = (said or "").strip().splitlines()
    try:
        record: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        record = {"probe": name, "status": "failed", "answer": f"no answer; exit status {process.returncode}"}
        if said is None:
            record.update(status="out of time", answer=f"ended after {seconds:.0f} s")
    record["exit_status"] = process.returncode
    record["wall_seconds"] = round(time.monotonic() - start, 2)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for the file of answers; $OUT if that is set")
    parser.add_argument("only", nargs="*", choices=[[], *PROBES], help="probes to run; all if none is named")
    arguments = parser.parse_args()
    out = arguments.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    began = time.monotonic()
    records = []
    for name in arguments.only or PROBES:
        left = LIMIT - (time.monotonic() - began)
        if left < 5:
            records.append({"probe": name, "status": "out of time", "answer": "no time was left for it"})
        else:
            records.append(run_one(name, min(EACH, left)))
        print(f"{records[-1]['probe']}: {records[-1]['status']}: {records[-1]['answer']}", flush=True)
    about = about_machine()
    answered = [record for record in records if record["status"] == "answered"]
    if out is not None and answered:
        out.mkdir(parents=True, exist_ok=True)
        device = re.sub(r"[^a-z0-9]+", "-", str(about.get("device") or "unknown").lower()).strip("-")
        path = out / f"probes-{device}-{time.strftime('%Y%m%d', time.gmtime())}.json"
        path.write_text(json.dumps({"machine": about, "probes": records}, indent=1) + "\n")
        print(f"written: {path}")
    print(json.dumps({"machine": about, "statuses": {record["probe"]: record["status"] for record in records}}))
    return 0 if all(record["status"] in ("answered", "skipped") for record in records) else 1


def about_machine() -> dict[str, Any]:
    """Asked in a process of its own: a device that a probe has upset must not take the answers with it."""
    code = "import json, rig; print(json.dumps(rig.machine()))"
    try:
        ran = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            cwd=Path(__file__).parent,
        )
        found: dict[str, Any] = json.loads(ran.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return found


if __name__ == "__main__":
    sys.exit(main())
