"""8 workers at full speed while their agent is killed and started again, under a checker; and that checker, sabotaged.

See `restarts` for what they do. ``ETHA_SEED`` repeats a run, as far as the scheduler lets it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("restarts.py")
SERVING_SECONDS = 2.0


def run(rounds: int, sabotage: str = "none") -> dict:
    seed = int(os.environ.get("ETHA_SEED", random.randrange(1 << 20)))
    print("ETHA_SEED =", seed)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(seed), str(rounds), sabotage],
        capture_output=True,
        text=True,
        timeout=300 + 10 * rounds,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-6000:] + done.stdout
    result = json.loads(done.stdout)
    print(json.dumps(result, indent=1))
    return result


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=pytest.mark.stress)])
def test_no_worker_notices(runtime: Path, rounds: int):
    result = run(rounds)
    assert result["torn"] == 0
    assert result["legal"] == 0
    assert min(result["steps"]) > rounds
    assert result["serving_s"]["median"] <= SERVING_SECONDS
    assert os.listdir(runtime) == []


def test_the_checker_sees_a_look_that_comes_too_late(runtime: Path):
    assert run(1, "late")["torn"] > 0
