"""Numbers: quantiles of one side, and what two sides that were measured in turns say of each other.

Absolute times are not stable between two minutes of one machine. So each *round* measures both sides in turns and gives
one ratio, that of its two medians. The result is the median of the rounds' ratios; its spread is their 10th to 90th
percentile. It says how far a round's ratio is from another's, so it does not shrink as rounds are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

PERCENTILES: Final = (1, 5, 10, 25, 50, 75, 90, 95, 99)

Rounds = Sequence[Sequence[float]]
"""The samples of one side, round by round."""


class Spread(msgspec.Struct, frozen=True):
    """A median, and the 10th and 90th percentile around it."""

    median: float
    p10: float
    p90: float


def spread(values: Sequence[float]) -> Spread:
    """Median and 10th to 90th percentile of ``values`` (linear between neighbours).

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("no values: nothing was measured")
    p10, median, p90 = np.quantile(values, (0.1, 0.5, 0.9))
    return Spread(float(median), float(p10), float(p90))


def percentiles(rounds: Rounds) -> dict[str, float]:
    """The percentiles of all samples of one side, whatever their round."""
    values = [value for samples in rounds for value in samples]
    found = np.percentile(values, PERCENTILES)
    return {f"p{share}": float(value) for share, value in zip(PERCENTILES, found, strict=True)}


def medians(rounds: Rounds) -> list[float]:
    """Each round's median."""
    return [float(np.median(samples)) for samples in rounds]


def ratios(above: Rounds, below: Rounds) -> list[float]:
    """Each round's ratio of medians.

    Raises:
        ValueError: the sides do not have the same rounds.
    """
    return [a / b for a, b in zip(medians(above), medians(below), strict=True)]


def slopes(sides: Sequence[tuple[float, Rounds]]) -> list[float]:
    """Each round's slope: the least-squares line through (x, the side's median of that round).

    Args:
        sides: x and its samples, for at least two different x.
    """
    xs = [x for x, _ in sides]
    columns = zip(*(medians(rounds) for _, rounds in sides), strict=True)
    return [float(np.polyfit(xs, column, 1)[0]) for column in columns]
