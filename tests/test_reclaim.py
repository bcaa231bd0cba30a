"""`benchmarks/reclaim.py`: it sees what is there of the dead, and when it has gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "reclaim.py"


def test_a_few_deaths_are_measured_and_written(tmp_path: Path):
    output = tmp_path / "reclaim.json"
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), "--rounds", "3", "--output", str(output)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode in (0, 1), ran.stderr
    report = json.loads(output.read_text())
    assert report["rounds"] == 3
    assert set(report["rows"]) == {"owner", "reader", "everything"}
    for row in report["rows"].values():
        assert set(row["parts"]) == {"records", "memory", "commands", "files", "slots"}
        assert 0 < row["whole"]["median"] <= row["whole"]["worst"]
        assert row["met"] == (row["whole"]["median"] <= 0.1 and row["whole"]["worst"] <= 1.0)
    # A dead reader's slots are given up with its death, and not with the next heartbeat, which is a second.
    assert report["rows"]["reader"]["parts"]["slots"]["median"] < 0.5
    assert list(tmp_path.iterdir()) == [output]
