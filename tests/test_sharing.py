"""`etha.cli.doctor.sharing`: which step failed, by what two processes told of their steps."""

from __future__ import annotations

from etha.cli.doctor.exchange import DONE, KINDS, Step
from etha.cli.doctor.sharing import Ended, judge

WELL = Ended("ended with status 0", 0.0, "")
BEGIN = [Step("owner", None, "import torch"), Step("owner", None, "connect to the agent")]


def steps(kind: str, *, until: int = 8) -> list[Step]:
    """The steps of both sides for a kind, as far as they came."""
    owner = ("put a tensor into shared memory", "register it with the agent", "update it in place", "close it", DONE)
    reader = ("subscribe, and map its memory", "read version 0 under a lease", DONE)
    told = [Step("owner", kind, what) for what in owner] + [Step("reader", kind, what) for what in reader]
    return told[:until]


def test_both_sides_must_be_done():
    whole = [*BEGIN, *steps(KINDS[0]), *steps(KINDS[1])]
    assert [found.verdict for found in judge(whole, WELL)] == ["ok", "ok"]
    assert [found.verdict for found in judge(whole[:-1], WELL)] == ["ok", "broken"]


def test_what_fails_is_named_and_the_other_kind_is_judged_by_itself():
    failed = Step("reader", KINDS[0], "read version 0 under a lease", "ValueError: the tensor holds [0.0], not 1")
    first, second = judge([*BEGIN, failed, *steps(KINDS[1])], WELL)
    assert (first.verdict, second.verdict) == ("broken", "ok")
    assert (
        first.seen == 'the reader failed at "read version 0 under a lease": ValueError: the tensor holds [0.0], not 1'
    )


def test_a_death_is_named_with_its_step_and_its_last_words():
    found = judge([*BEGIN, *steps(KINDS[0], until=1)], Ended("died of SIGBUS", 0.0, "Fatal Python error"))
    assert found[0].seen == 'the owner failed at "put a tensor into shared memory": died of SIGBUS. Fatal Python error'
    assert found[1].seen.startswith('the owner failed at "connect to the agent": died of SIGBUS')


def test_a_step_that_hangs_is_broken_and_one_that_had_no_time_is_not_known():
    told = [*BEGIN, *steps(KINDS[0], until=2)]
    assert [found.verdict for found in judge(told, Ended(None, 5.0, ""))] == ["broken", "broken"]
    assert [found.verdict for found in judge(told, Ended(None, 0.5, ""))] == ["degraded", "degraded"]
    assert [found.verdict for found in judge(BEGIN[:1], Ended(None, 7.0, ""))] == ["degraded", "degraded"]
    assert [found.verdict for found in judge([], Ended(None, 7.0, ""))] == ["degraded", "degraded"]


def test_no_torch():
    told = [Step("owner", None, "import torch", "ModuleNotFoundError: No module named 'torch'")]
    assert {found.remedy for found in judge(told, WELL)} == {"pip install torch"}
