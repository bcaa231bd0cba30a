"""`etha.cli.doctor.tracing`: which gate forbids to look into a process, where this machine cannot shut it."""

from __future__ import annotations

import pytest

from etha.cli.doctor.finding import in_order
from etha.cli.doctor.tracing import State, Trial, judge

OPEN = Trial(None, None)
NO_DESCRIPTOR = Trial(None, "Operation not permitted from pidfd_getfd")
NOTHING = Trial("Permission denied on /proc/PID/maps", "Operation not permitted from pidfd_getfd")


@pytest.mark.parametrize(
    ("state", "trial"),
    [
        (State(None, 1, False), OPEN),
        (State(0, 1, False), OPEN),
        (State(1, 1, False), OPEN),
        (State(2, 1, True), OPEN),
        (State(2, 1, False), OPEN),
        (State(1, 0, True), OPEN),
        (State(None, 1, False), NO_DESCRIPTOR),  # a filter: the check of the call says so
    ],
)
def test_open(state: State, trial: Trial):
    assert [found.verdict for found in judge(state, trial)] == ["ok"] * 3


@pytest.mark.parametrize(
    ("state", "trial", "name", "remedy"),
    [
        (State(2, 1, False), NO_DESCRIPTOR, "Yama", "ptrace_scope=1"),
        (State(3, 1, True), NO_DESCRIPTOR, "Yama", "reboot"),
        (State(None, 0, False), NOTHING, "dumpable", "prctl(PR_SET_DUMPABLE, 1)"),
        (State(1, 2, False), NOTHING, "dumpable", "prctl(PR_SET_DUMPABLE, 1)"),
        (State(1, 1, False), NOTHING, "ptrace", "PTRACE"),
    ],
)
def test_shut(state: State, trial: Trial, name: str, remedy: str):
    first, *others = in_order(judge(state, trial))
    assert (first.name, first.verdict) == (name, "degraded")
    assert remedy.lower() in first.remedy.lower()
    assert [found.verdict for found in others] == ["ok"] * 2
