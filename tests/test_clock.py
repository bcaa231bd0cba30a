"""`etha.tensor_bus.clock`: one clock, finite waits."""

from __future__ import annotations

import ast
import math
import select
import threading
import time
from pathlib import Path

import pytest

import etha.tensor_bus
from etha.errors import InvalidArgument
from etha.tensor_bus import clock


def test_now_is_the_time_since_boot():
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    now = clock.now()
    assert before <= now <= time.clock_gettime(time.CLOCK_BOOTTIME)


@pytest.mark.parametrize("timeout", [0, 0.0, 0.25, 30, clock.MAX_TIMEOUT])
def test_a_deadline_is_its_timeout_from_now(timeout: float):
    before = clock.now()
    deadline = clock.deadline_after(timeout)
    assert before + timeout <= deadline <= clock.now() + timeout


@pytest.mark.parametrize(
    "timeout",
    [-1, -1e-9, math.nan, math.inf, -math.inf, 1e300, 10**400, -(10**400), "1", None, [1], clock.MAX_TIMEOUT + 1],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_finite_wait_is_refused(timeout: object):
    with pytest.raises(InvalidArgument) as caught:
        clock.deadline_after(timeout)
    assert caught.value.resource == "timeout"


def test_the_longest_wait_is_one_that_the_system_takes():
    longest = clock.MAX_TIMEOUT + clock.grace(clock.MAX_TIMEOUT)
    poll = select.poll()
    with Path("/dev/null").open("rb") as ready:
        poll.register(ready, select.POLLIN)
        assert poll.poll(longest * 1000)
    assert threading.Lock().acquire(timeout=longest)


def test_what_remains_never_goes_below_zero():
    assert clock.remaining(clock.now() - 5) == 0.0
    deadline = clock.now() + 100
    assert 0 < clock.remaining(deadline) <= 100


@pytest.mark.parametrize(("timeout", "grace"), [(0, 0.5), (1, 0.1), (30, 3.0)])
def test_grace_is_a_tenth(timeout: float, grace: float):
    assert clock.grace(timeout) == pytest.approx(grace)


def test_the_bus_never_looks_at_the_wall_clock():
    """So no verdict can change when it is set."""
    wall = {"CLOCK_REALTIME", "datetime", "time_ns", "localtime", "gmtime", "ctime", "utcnow"}
    found = []
    for path in Path(etha.tensor_bus.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                bare = node.attr == "time" and isinstance(node.value, ast.Name) and node.value.id == "time"
                if bare or node.attr in wall:
                    found.append(f"{path.name}:{node.lineno}")
            elif isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []
