"""20 threads and 8 processes at random, under a checker that knows every legal outcome; and that checker, sabotaged.

See `chaos` for what they do and what is checked. ``ETHA_SEED`` repeats a run, as far as the scheduler lets it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import chaos
import pytest
from box import Box, until

PROGRAM = Path(__file__).with_name("chaos.py")


@pytest.fixture
def box(tmp_path):
    box = Box("chaos", tmp_path)
    yield box
    assert box.close() == ""


def run(box: Box, seconds: float, sabotage: str = "none") -> tuple[Counter[str], list[str]]:
    """How often each thing happened, and every fault."""
    seed = int(os.environ.get("ETHA_SEED", random.randrange(1 << 20)))
    print("ETHA_SEED =", seed)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(seed), str(seconds), sabotage],
        env=box.environment,
        capture_output=True,
        text=True,
        timeout=seconds + 200,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    count: Counter[str] = sum((Counter(result["count"]) for result in results), Counter())
    faults = [fault for result in results for fault in result["faults"]]
    if done.returncode or done.stderr or len(results) != chaos.PROCESSES + 1:
        faults.append(f"{len(results)} processes ended well, status {done.returncode}:\n{done.stderr[-6000:]}")
    overshoot = max(result["overshoot"] for result in results)
    print(f"torn {count['torn']} of {count['looks']} looks, {len(faults)} faults, overshoot {overshoot:.2f} s")
    print(json.dumps(dict(sorted(count.items())), indent=1), *faults, sep="\n")
    return count, faults


def check(box: Box, seconds: float) -> None:
    before = box.open_descriptors()
    count, faults = run(box, seconds)
    assert faults == []
    assert count["torn"] == 0
    # What was to be tried was tried.
    wanted = ("leave update", "publish", "read", "looks", "revoked", "close publication", "close client")
    assert [what for what in wanted if not count[what]] == []
    # Everybody closed what was theirs: the agent holds nothing any more.
    assert box.publications() == set()
    until(lambda: box.open_descriptors() <= before)


def test_chaos(box):
    check(box, 8)


@pytest.mark.stress
def test_two_minutes_of_chaos(box):
    check(box, 120)


@pytest.mark.parametrize("sabotage", ["late", "wild"])
def test_the_checker_sees_what_sabotage_does(box, sabotage):
    count, faults = run(box, 3, sabotage)
    assert count["torn"] > 0
    assert faults == []
