"""The codecs and `validate`, alone: a million hostile records in every run. Row 13 of what etha survives.

``ETHA_FUZZ_SEED`` gives another seed, ``ETHA_FUZZ_CASES`` another count; ``ETHA_FUZZ_ONLY=4711`` shows and runs one.

Why this stands beside ``tests/faults`` and not in it: it needs no strace and a minute, so ``make test`` runs it.
"""

from __future__ import annotations

import os

import codec_cases
import pytest
from codec_cases import Toll, case, run

from etha.errors import InvalidRecord
from etha.tensor_bus import records
from etha.tensor_bus.ipc import manifest

SEED = int(os.environ.get("ETHA_FUZZ_SEED", "1"))
COUNT = int(os.environ.get("ETHA_FUZZ_CASES", "1_000_000"))
ONLY = os.environ.get("ETHA_FUZZ_ONLY")


def judged(seed: int, numbers: range) -> Toll:
    print(f"ETHA_FUZZ_SEED={seed}; ETHA_FUZZ_ONLY=NUMBER runs one of {numbers.start} to {numbers.stop - 1}")
    toll = run(seed, numbers)
    print(toll)
    return toll


@pytest.mark.skipif(ONLY is None, reason="for one case: ETHA_FUZZ_ONLY=NUMBER, and ETHA_FUZZ_SEED")
def test_one_case():
    number = int(ONLY)
    found = case(SEED, number)
    print(f"{found.kind}, {len(found.data)} bytes: {found.data[:200].hex(' ')}")
    try:
        print(f"it is {found.judge()}")
    except InvalidRecord as error:
        print(f"{type(error).__name__}: {error}")
    assert judged(SEED, range(number, number + 1)).failed == []


@pytest.mark.skipif(ONLY is not None, reason="one case is asked for")
def test_a_million_hostile_records_raise_only_our_errors_and_cost_little():
    toll = judged(SEED, range(COUNT))
    assert toll.failed == []
    assert toll.slow <= toll.count / 1000
    for kind in ("damaged", "structured", "manifest"):
        assert 0.01 < toll.accepted[kind] / toll.made[kind] < 0.9
    assert toll.weighed > toll.count / codec_cases.SAMPLED


@pytest.mark.stress
def test_ten_million_of_them():
    toll = judged(SEED + 1, range(10_000_000))
    assert toll.failed == []
    assert toll.slow <= toll.count / 1000


def test_a_case_is_its_seed_and_number():
    first, again, other, next_ = case(7, 41), case(7, 41), case(8, 41), case(7, 42)
    assert (first.kind, first.data) == (again.kind, again.data)
    assert first.data not in (other.data, next_.data)


# -- the test of the test ------------------------------------------------------------------------------------------


def test_an_error_that_is_not_ours_is_seen(monkeypatch: pytest.MonkeyPatch):
    """msgspec's own errors, let through."""
    monkeypatch.setattr(records.Codec, "decode", lambda self, data: self._decoder.decode(data[4:]))
    assert any("Error" in story for _, story in judged(SEED, range(2000)).failed)


def test_a_bound_that_is_missing_is_seen(monkeypatch: pytest.MonkeyPatch):
    """No bound on the number of dimensions is no error of another kind; a name that cannot be encoded is."""
    monkeypatch.setattr(manifest, "name_fault", lambda name: None if name.encode() else "is empty")
    assert any("UnicodeEncodeError" in story for _, story in judged(SEED, range(20_000)).failed)


def test_what_takes_too_much_is_seen(monkeypatch: pytest.MonkeyPatch):
    def wasteful(record: object) -> None:
        if len(bytearray(3 << 20)):
            raise InvalidRecord("no")

    monkeypatch.setattr(codec_cases, "validate", wasteful)
    assert any("bytes for a record" in story for _, story in judged(SEED, range(5000)).failed)
