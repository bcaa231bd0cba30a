"""`etha.cli.doctor.runner` and `throwaway`: checks that hang, die or fail are results, and leave nothing."""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import time
from pathlib import Path

import pytest
from box import until

from etha.cli.doctor import throwaway
from etha.cli.doctor.finding import Finding, Gate
from etha.cli.doctor.runner import Check, run
from etha.tensor_bus.ipc.process import process_state

GATE = Gate("gates", "planted", "planted in a test")


def well(seen: str = "as it should be") -> list[Finding]:
    return [GATE.ok(seen, "nothing")]


def hang() -> list[Finding]:
    select.poll().poll()
    return well()


def children() -> set[str]:
    """Pids of this process's children, zombies aside: pytest may have some, and adopts what a check left."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {pid for pid in listed if process_state(int(pid)) not in ("zombie", "dead")}


def one(check: Check) -> Finding:
    """What one check found; no child of it is left, and no descriptor."""
    before = os.listdir("/proc/self/fd"), children()
    (found,) = run([check])
    assert (os.listdir("/proc/self/fd"), children()) == before
    return found


def test_findings_come_in_the_order_of_the_checks():
    checks = [Check(GATE, lambda number=number: well(str(number))) for number in range(20)]
    assert [found.seen for found in run(checks)] == [str(number) for number in range(20)]


def test_a_check_runs_in_a_child_without_a_terminal():
    (found,) = run([Check(GATE, lambda: well(f"{os.getpid()} {os.read(0, 1)!r} {os.getpgid(0)}"))])
    pid, read, group = found.seen.split()
    assert pid == group != str(os.getpid())
    assert read == "b''"


def test_one_that_hangs_is_a_result_at_its_deadline():
    began = time.monotonic()
    found = one(Check(GATE, hang, seconds=0.2))
    assert (found.name, found.verdict) == ("planted", "broken")
    assert 0.2 <= time.monotonic() - began < 2.0


def test_one_that_cannot_be_asked_to_end_is_made_to():
    def stubborn() -> list[Finding]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return hang()

    assert one(Check(GATE, stubborn, seconds=0.1)).verdict == "broken"


def test_one_that_is_late_tidies_up(tmp_path: Path):
    file = tmp_path / "left"

    def untidy() -> list[Finding]:
        file.touch()
        try:
            return hang()
        finally:
            file.unlink()

    assert one(Check(GATE, untidy, seconds=0.3)).verdict == "broken"
    assert not file.exists()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGSYS])
def test_one_that_dies_is_a_result(number: int):
    def die() -> list[Finding]:
        faulthandler.disable()
        os.kill(os.getpid(), number)
        return hang()

    found = one(Check(GATE, die))
    assert found.verdict == "broken"
    assert signal.Signals(number).name in found.seen


def test_a_death_that_means_something_says_it():
    def die() -> list[Finding]:
        os.kill(os.getpid(), signal.SIGKILL)
        return hang()

    meaning = Check(GATE, die, if_dead=lambda how: GATE.degraded(how, "m", "r"))
    assert one(meaning).seen == "died of SIGKILL"


def test_one_that_raises_is_a_result():
    found = one(Check(GATE, lambda: {}["nothing"]))
    assert (found.verdict, found.seen) == ("broken", "KeyError: 'nothing'")


def test_a_grandchild_does_not_outlive_its_check(tmp_path: Path):
    told = tmp_path / "pid"

    def leave() -> list[Finding]:
        told.write_text(str(throwaway.fork(hang)))
        return well()

    assert [found.verdict for found in run([Check(GATE, leave)])] == ["ok"]
    until(lambda: process_state(int(told.read_text())) in ("dead", "zombie"))


def test_the_others_are_done_while_one_hangs():
    found = run([Check(GATE, hang, seconds=0.5), *(Check(GATE, well) for _ in range(8))])
    assert [each.verdict for each in found] == ["broken"] + ["ok"] * 8


def test_a_child_dies_with_its_parent():
    reading, writing = os.pipe()

    def middle() -> None:
        os.write(writing, str(throwaway.fork(hang)).encode())
        hang()

    parent = throwaway.fork(middle)
    child = int(os.read(reading, 16))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        until(lambda: process_state(child) in ("dead", "zombie"), 10)
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reading)
        os.close(writing)
