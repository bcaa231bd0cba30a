"""The benchmark's own arithmetic, and that it runs. What it measures is no test: no machine has a fixed speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from costs.catalogue import GROUPS
from costs.groups import chosen
from costs.pairing import Run
from costs.report import Report, amount, quotation, read
from costs.row import Budget, Row, compare
from costs.spread import medians, percentiles, ratios, slopes, spread

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "latency.py"
NAMES = [name for group in GROUPS for name in group.rows]


# -- numbers ------------------------------------------------------------------------------------------


def test_a_ratio_is_that_of_a_rounds_medians():
    slow, fast = [[2.0, 2.0, 50.0], [9.0, 3.0, 3.0]], [[1.0, 1.0, 0.1], [1.0, 2.0, 2.0]]
    assert ratios(slow, fast) == [2.0, 1.5]


def test_rounds_that_do_not_pair_are_refused():
    with pytest.raises(ValueError):  # noqa: PT011 - the builtin is what zip() raises
        ratios([[1.0], [1.0]], [[1.0]])


def test_a_spread_is_the_middle_four_fifths():
    found = spread([float(value) for value in range(101)])
    assert (found.p10, found.median, found.p90) == (10.0, 50.0, 90.0)


def test_nothing_has_no_spread():
    with pytest.raises(ValueError, match="nothing was measured"):
        spread([])


def test_percentiles_are_of_all_samples_whatever_their_round():
    found = percentiles([[float(value) for value in range(50)], [float(value) for value in range(50, 101)]])
    assert (found["p1"], found["p50"], found["p99"]) == (1.0, 50.0, 99.0)


def test_a_slope_is_found_in_each_round():
    fixed, each = 80e-6, 0.2e-6
    sides = [(count, [[fixed + count * each] * 3, [fixed + 2 * count * each] * 3]) for count in (1, 100, 1000)]
    assert slopes(sides) == pytest.approx([each, 2 * each])


# -- verdicts -----------------------------------------------------------------------------------------


def row(etha: list[float], floor: list[float], budget: Budget | None) -> Row:
    return compare(
        "row", "", etha=[[value] for value in etha], floor=[[value] for value in floor], floor_is="", budget=budget
    )


@pytest.mark.parametrize(
    ("etha", "budget", "verdict"),
    [
        ([2.0, 2.5, 3.0], Budget("ratio", 2.5, ""), "met"),
        ([2.0, 2.75, 3.0], Budget("ratio", 2.5, ""), "missed by 10%"),
        ([0.1, 0.1, 0.1], Budget("value", 0.1, ""), "met"),
        ([0.1, 0.2, 0.2], Budget("value", 0.1, ""), "missed by 100%"),
        ([0.9, 1.2, 1.4], Budget("even", 1.05, ""), "met"),
        ([1.01, 1.04, 1.3], Budget("even", 1.05, ""), "met"),
        ([1.1, 1.26, 1.3], Budget("even", 1.05, ""), "missed by 20%"),
        ([9.0, 9.0, 9.0], None, "no budget"),
    ],
)
def test_a_verdict(etha: list[float], budget: Budget | None, verdict: str):
    assert row(etha, [1.0, 1.0, 1.0], budget).verdict == verdict


def test_a_row_that_was_not_measured_is_not_met():
    found = Row(name="restart", what="", budget=Budget("value", 2.0, ""), note="not supported by this build")
    assert (found.met, found.verdict) == (None, "not measured")


# -- measuring ----------------------------------------------------------------------------------------


def test_sides_take_turns_and_none_always_comes_first():
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    taken = Run().interleave({"a": lambda: side("a"), "b": lambda: side("b")}, rounds=2, turns=2, warm=0)
    assert "".join(order) == "abbaabba"
    assert taken == {"a": [[1.0, 4.0], [5.0, 8.0]], "b": [[2.0, 3.0], [6.0, 7.0]]}
    assert medians(taken["a"]) == [2.5, 6.5]


def test_what_only_warms_does_not_count():
    calls: list[int] = []
    taken = Run().interleave({"a": lambda: calls.append(1) or 1.0}, rounds=1, turns=1, warm=3)
    assert (len(calls), taken) == (4, {"a": [[1.0]]})


def test_the_share_done_is_told():
    told: list[float] = []
    Run(step=told.append).interleave({"a": lambda: 1.0}, rounds=4)
    assert told == [0.25, 0.5, 0.75, 1.0]


# -- rows and report ----------------------------------------------------------------------------------


def test_no_row_has_the_name_of_another():
    assert len(NAMES) == len(set(NAMES))


def test_rows_are_chosen_by_name():
    assert [group.rows for group in chosen(GROUPS, ["release", "status"])] == [
        ("lease", "release"),
        ("help", "status", "status-10000"),
    ]
    assert len(chosen(GROUPS, [])) == len(GROUPS)
    with pytest.raises(LookupError):
        chosen(GROUPS, ["no such row"])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (86.4e-6, "s", "86.4 µs"),
        (0.18e-6, "s", "180 ns"),
        (0.0724, "s", "72.4 ms"),
        (2.5, "s", "2.5 s"),
        (0.0012, "share", "0.12%"),
        (12390.4, "bytes/s", "12.1 KiB/s"),
    ],
)
def test_amounts_as_people_read_them(value: float, unit: str, text: str):
    assert amount(value, unit) == text


def test_the_readme_quotes_the_file():
    """After another `make bench`: put what ``python benchmarks/latency.py --quote`` prints into the README."""
    root = PROGRAM.parent.parent
    assert quotation(read(PROGRAM.parent / "results" / "latency.json")) in (root / "README.md").read_text()


# -- the program --------------------------------------------------------------------------------------


def measure(tmp_path: Path, *rows: str, only: bool = True) -> Report:
    """What a quick run of these rows wrote."""
    output = tmp_path / "latency.json"
    wanted = [word for name in rows for word in ("--only", name)] if only else []
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), "--quick", "--plot", "--output", str(output), *wanted],
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert all(name in ran.stdout for name in rows)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report = read(output)
    assert report.quick
    assert json.loads(output.read_text())["machine"]["torch"]
    assert [found.name for found in report.rows] == list(rows)
    return report


def test_a_quick_run_measures_shows_and_writes(tmp_path: Path):
    report = measure(tmp_path, "publish", "lease", "register-500-kept", "read", "memory", "reclaim-owner", "restart")
    for found in report.rows:
        if found.name == "restart" and found.note:
            assert found.etha is None
        else:
            assert found.etha is not None
            assert found.etha.median >= 0


@pytest.mark.stress
def test_a_quick_run_measures_every_row_that_the_catalogue_names(tmp_path: Path):
    measure(tmp_path, *NAMES, only=False)


def test_an_unknown_row_is_refused(tmp_path: Path):
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), "--only", "nothing"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 2


def test_every_step_up_to_ten_thousand_tensors_is_measured(tmp_path: Path):
    names = next(group.rows for group in GROUPS if "inspect-10000" in group.rows)
    for found in measure(tmp_path, *names).rows:
        assert found.ratio is not None
        assert found.budget is not None
        assert len(found.more) == 3


def test_nothing_is_left_behind(tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch):
    def of_the_dead() -> set[str]:
        named = (path.name for path in Path("/dev/shm").glob("torch_*_*"))
        return {name for name in named if not Path("/proc", name.split("_")[1]).exists()}

    monkeypatch.setenv("TMPDIR", str(runtime))
    before = of_the_dead()
    measure(tmp_path, "publish", "handover-cold-file_system", "reclaim-owner")
    assert list(runtime.iterdir()) == []
    assert of_the_dead() <= before
