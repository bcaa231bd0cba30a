"""How often: a few times every day, all of the table's with ``-m stress``."""

from __future__ import annotations

import pytest


def counts(few: int, full: int) -> list:
    """Values for a parameter of a test that is played so many times."""
    return [few, pytest.param(full, marks=pytest.mark.stress)]
