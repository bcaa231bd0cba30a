"""`benchmarks/counts.py`: that its numbers are those of one operation, whatever else the machine does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PROGRAM = "import json, counts; print(json.dumps([counts.calls(20), counts.calls(40)]))"


def functions() -> list[dict[str, dict[str, float]]]:
    """Operation to side to functions called, each operation done 20 times, and 40 times."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=BENCHMARKS, timeout=120, check=True
    )
    return [
        {name: {side: kinds[0] for side, kinds in sides.items()} for name, sides in found.items()}
        for found in json.loads(ran.stdout)
    ]


def test_twice_as_many_operations_cost_the_same_each():
    few, many = functions()
    for name in ("lease", "publish", "update"):
        # What tells the worker to begin, and hears that it has ended, is counted once for all of them.
        assert 0 <= few[name]["worker"] - many[name]["worker"] < 1
    assert many["lease"]["worker"] < many["update"]["worker"]
    assert all(sides["agent"] > 1 for sides in many.values())
