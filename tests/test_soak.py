"""The soak: that it runs, and that its verdict can be red. How flat etha stays is no test: seconds do not show it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from endurance.crew import Found
from endurance.plan import MOVING, Plan
from endurance.report import Report, amiss, read
from endurance.samples import Sample, Timed, bins
from endurance.verdict import ENOUGH, RATIO, SLOPE, TENTHS, Judged, judge

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "benchmarks" / "soak.py"
SECONDS = 100.0
MIB = 1 << 20
COMMANDS = 10_000
"""A second: a run of a million."""


def sample(moment: float, **fields: float) -> Sample:
    flat = Sample(
        moment=moment,
        commands=int((moment + 10) * COMMANDS),
        rss=40 * MIB,
        private=25 * MIB,
        descriptors=2000,
        mappings=2300,
        command_file=MIB,
        state_file=2 * MIB,
        claims=250,
        outcomes=4160,
        cpu=moment,
        load=1.0,
    )
    return msgspec.structs.replace(flat, **fields)


def run(grown: Callable[[float], dict[str, int]] = lambda _: {}) -> list[Sample]:
    """A warm-up of 10 s that is not flat at all, and 100 s."""
    warm = [sample(moment, rss=MIB, state_file=0, outcomes=0) for moment in range(-10, 0)]
    return warm + [sample(moment, **grown(moment)) for moment in range(int(SECONDS))]


def calls(**last: float) -> list[Timed]:
    """Of each kind, a hundred a second of 1 ms; in the last tenth, 2 % of what ``last`` says."""
    slow = {"lease": 1e-3, "command": 1e-3, "floor": 1e-3, **last}
    return [
        Timed(number / 100, kind, slow[kind] if number >= 9000 and number % 50 == 0 else 1e-3)
        for kind in slow
        for number in range(-1000, 10_000)
    ]


def reds(samples: list[Sample], timed: list[Timed]) -> set[str]:
    return {each.name for each in judge(samples, timed, SECONDS) if not each.flat}


# -- verdicts -----------------------------------------------------------------------------------------


def test_what_is_flat_is_flat_whatever_the_warm_up_was():
    assert reds(run(), calls()) == set()


@pytest.mark.parametrize("name", ["rss", "private", "command_file", "state_file"])
def test_two_bytes_a_command_are_seen_in_what_has_bytes(name: str):
    """Two million bytes of forty: no tenth would tell."""
    base = getattr(sample(0), name)
    (found,) = (
        each
        for each in judge(run(lambda moment: {name: base + int(moment * COMMANDS * 2)}), calls(), SECONDS)
        if not each.flat
    )
    assert found.name == name
    assert found.slope == pytest.approx(2.0, rel=1e-3)


def test_half_a_byte_a_command_is_allowed():
    assert reds(run(lambda moment: {"rss": 40 * MIB + int(moment * COMMANDS / 2)}), calls()) == set()


def test_a_slope_of_few_commands_is_not_judged():
    def grown(moment: float) -> dict[str, int]:
        return {"rss": 40 * MIB + int(moment * 4096), "commands": int(moment * ENOUGH / SECONDS / 2)}

    assert reds(run(grown), calls()) == set()


@pytest.mark.parametrize("name", ["descriptors", "mappings", "claims", "outcomes", "rss", "state_file"])
def test_a_quarter_more_in_the_last_tenth_is_seen(name: str):
    base = getattr(sample(0), name)
    assert reds(run(lambda moment: {name: base * 5 // 4} if moment >= 90 else {}), calls()) == {name}


def test_what_comes_from_nothing_is_seen():
    assert reds(run(lambda moment: {"claims": 0 if moment < 90 else 2}), calls()) == {"claims"}


@pytest.mark.parametrize("kind", ["lease", "command"])
def test_a_tail_that_grows_is_seen(kind: str):
    assert reds(run(), calls(**{kind: 1.3e-3})) == {kind}
    assert reds(run(), calls(**{kind: 1.1e-3})) == set()


def test_the_floor_is_told_and_not_judged():
    (floor,) = (each for each in judge(run(), calls(floor=9e-3), SECONDS) if each.name == "floor")
    assert (floor.ratio, floor.verdict) == (pytest.approx(9.0), "not judged")


def test_a_verdict_says_by_how_much():
    found = Judged(name="rss", what="", unit="bytes", tenths=(100.0,) * 9 + (130.0,), slope=1.5)
    assert found.verdict == "grew: 1.30 times the first tenth, 1.50 bytes per command"
    assert (RATIO, SLOPE, TENTHS) == (1.2, 1.0, 10)


def test_fewer_than_ten_samples_are_no_evidence():
    with pytest.raises(ValueError, match="tenth"):
        judge([each for each in run() if each.moment < 9], calls(), SECONDS)


def test_what_an_agent_holds_after_the_last_goodbye_and_its_mistakes_are_seen():
    def found(**fields: int) -> Found:
        none = {"claims": 0, "outcomes": 0}
        return Found(
            samples=(),
            timed=(),
            operations={},
            restarts=(),
            before=sample(0, **none),
            after=sample(0, **{**none, **fields}),
        )

    assert amiss(found()) == ""
    for name, count in {"descriptors": 2001, "claims": 1, "outcomes": 1}.items():
        assert amiss(found(**{name: count})) == f"1 {name} left"
    assert amiss(found(mistakes=2)) == "2 mistakes of the agent"


# -- plan and parts -----------------------------------------------------------------------------------


def test_every_publication_has_one_owner_and_stays_or_moves():
    plan = Plan(minutes=120, commands=1_000_000, workers=64, publications=1000, restart_every=0, seed=0)
    owned = [name for worker in range(64) for name in plan.names(worker)]
    assert len(owned) == len(set(owned)) == 1000
    assert sorted(plan.staying() + plan.moving()) == sorted(owned)
    assert len(plan.moving()) == 64 * MOVING
    assert plan.warm == 60


def test_parts_cover_the_run_and_keep_its_last_sample():
    parts = bins(run(), calls(), 11)
    assert len(parts) == 11
    assert parts[-1].last.moment == 99
    assert sum(part.calls["lease"] for part in parts) == 11_000


# -- documents ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_what_was_run_is_said_where_it_is_quoted(name: str):
    """After another run that is kept: say in both what it was, in the words of its title."""
    text = " ".join((ROOT / name).read_text().split())
    assert read(PROGRAM.parent / "results" / "soak.json").title in text


# -- the program --------------------------------------------------------------------------------------


def soak(tmp_path: Path, *options: str) -> Report:
    """A run of some seconds; its status says what its file says."""
    output = tmp_path / "soak.json"
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), "--output", str(output), "--plot", *options],
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode in (0, 1), ran.stderr
    assert ran.stderr.strip() == ""
    report = read(output)
    assert ran.returncode == (0 if report.flat else 1)
    assert report.title in ran.stdout
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert report.machine.torch
    return report


@pytest.mark.parametrize(
    "restarts", [False, pytest.param(True, marks=pytest.mark.stress)], ids=["one agent", "an agent that is killed"]
)
def test_some_seconds_of_it(tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch, restarts: bool):
    monkeypatch.setenv("TMPDIR", str(runtime))
    options = ["--workers", "3", "--publications", "12", "--commands", "600"]
    time = ["--minutes", "0.2", "--restart-every", "4"] if restarts else ["--minutes", "0.08"]
    report = soak(tmp_path, *options, *time)
    assert report.commands > 100
    assert bool(report.restarts) == restarts
    assert report.verdicts["amiss"] == "nothing"
    done = {name for name in report.operations if ": " not in name}
    assert {"update", "publish", "look"} <= done
    used = report.series[-1].last
    assert used.descriptors > 24
    assert used.mappings > 24
    assert used.claims >= 3
    assert {each.name for each in report.judged} >= {"rss", "private", "command_file", "state_file", "lease", "command"}
    assert list(runtime.iterdir()) == []


def test_a_worker_that_ends_ends_the_run(tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch):
    """Its publications need more descriptors than it may have."""
    monkeypatch.setenv("TMPDIR", str(runtime))
    options = ["--workers", "1", "--publications", "300", "--output", str(tmp_path / "no")]
    ran = subprocess.run(
        ["bash", "-c", 'ulimit -n 300; exec "$@"', "bash", sys.executable, str(PROGRAM), *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 1
    assert "worker 0" in ran.stderr
    assert not (tmp_path / "no").exists()
    assert list(runtime.iterdir()) == []


def test_too_few_publications_are_refused():
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), "--publications", "100"], capture_output=True, timeout=60, check=False
    )
    assert ran.returncode == 2
