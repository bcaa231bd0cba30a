"""`benchmarks/reclaim.py`: it sees what is there of the dead, and when it has gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "reclaim.py"


def test_a_few_deaths_are_measured_and_written(tmp_path: Path, runtime: Path):
    output = tmp_path / "reclaim.json"
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), "--rounds", "3", "--output", str(output)],
        env={**os.environ, "TMPDIR": str(runtime)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert output.exists(), ran.stderr
    assert ran.returncode == (0 if all(row["met"] for row in json.loads(output.read_text())["rows"].values()) else 1)
    report = json.loads(output.read_text())
    assert report["rounds"] == 3
    assert set(report["rows"]) == {"owner", "reader", "everything"}
    for row in report["rows"].values():
        assert set(row["parts"]) == {"records", "memory", "commands", "files", "slots"}
        assert 0 < row["whole"]["median"] <= row["whole"]["worst"]
        assert row["met"] == (row["whole"]["median"] <= 0.1 and row["whole"]["worst"] <= 1.0)
    # A dead reader's slots are given up with its death, and not with the next heartbeat, which is a second.
    assert report["rows"]["reader"]["parts"]["slots"]["median"] < 0.5
    assert list(runtime.iterdir()) == []
