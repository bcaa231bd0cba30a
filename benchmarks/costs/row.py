"""One result: an operation, its bare floor, what it may cost, and whether it does.

Three kinds of budget, and one more that is none:

* ``ratio``: the median ratio to the floor is at most ``limit``;
* ``value``: the median itself is at most ``limit``, in the row's unit;
* ``even``: as fast as the floor "within the run's spread": 1 lies above the ratio's 10th percentile, or the median
  ratio is at most ``limit`` (which keeps a small spread from failing what no one could tell apart);
* none: the row is there to be known.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from costs.spread import Rounds, Spread, percentiles, ratios, spread

Kind = Literal["ratio", "value", "even"]


class Budget(msgspec.Struct, frozen=True):
    """What a row may cost; ``text`` is how the design says it."""

    kind: Kind
    limit: float
    text: str


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the report. Times are in seconds, whatever the screen says.

    Attributes:
        name: for ``--only``.
        what: the operation, in a few words.
        unit: of ``etha`` and ``floor``: ``"s"``, ``"bytes"``, ``"bytes/s"``, ``"share"``.
        etha, floor: medians and spreads of all samples; None where there was nothing to measure.
        floor_is: what stands below, in a few words.
        ratio: of etha to floor, by rounds.
        budget: None for a row that is only to be known.
        samples: of each side, in all.
        rounds: how many ratios the spread is that of.
        percentiles: of each side.
        more: other numbers that belong to it, by name.
        note: one sentence, or empty; for a row without numbers, why.
    """

    name: str
    what: str
    unit: str = "s"
    etha: Spread | None = None
    floor: Spread | None = None
    floor_is: str = ""
    ratio: Spread | None = None
    budget: Budget | None = None
    samples: int = 0
    rounds: int = 0
    percentiles: dict[str, dict[str, float]] = {}
    more: dict[str, float] = {}
    note: str = ""

    @property
    def measured(self) -> float | None:
        """The number that the budget is about."""
        if self.budget is not None and self.budget.kind == "value":
            return self.etha.median if self.etha is not None else None
        return self.ratio.median if self.ratio is not None else None

    @property
    def met(self) -> bool | None:
        """Whether the budget is kept; None without a budget or a number."""
        if self.budget is None or self.measured is None:
            return None
        if self.measured <= self.budget.limit:
            return True
        return self.budget.kind == "even" and self.ratio is not None and self.ratio.p10 <= 1.0

    @property
    def verdict(self) -> str:
        """For people: ``"met"``, or by how much it is missed."""
        if self.measured is None:
            return "not measured"
        if self.met is None or self.budget is None:
            return "no budget"
        return "met" if self.met else f"missed by {self.measured / self.budget.limit - 1:.0%}"


def compare(
    name: str,
    what: str,
    *,
    etha: Rounds,
    floor: Rounds,
    floor_is: str,
    budget: Budget | None = None,
    unit: str = "s",
    more: dict[str, float] | None = None,
    note: str = "",
) -> Row:
    """The row of two sides that were measured in turns."""
    found = ratios(etha, floor)
    return Row(
        name=name,
        what=what,
        unit=unit,
        etha=spread([value for samples in etha for value in samples]),
        floor=spread([value for samples in floor for value in samples]),
        floor_is=floor_is,
        ratio=spread(found),
        budget=budget,
        samples=sum(map(len, etha)),
        rounds=len(found),
        percentiles={"etha": percentiles(etha), "floor": percentiles(floor)},
        more=more or {},
        note=note,
    )
