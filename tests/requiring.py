"""`require`, for what runs outside of pytest: there an ``assert`` is gone under ``-O``, and nothing is checked.

pytest gives the asserts of test modules a code of its own, which stays. So helpers, programs of child processes and
code in strings say `require`; `test_optimized` finds those that do not.
"""

from __future__ import annotations


def require(truth: object, story: object = "it is not so") -> None:
    """Fail, as a test does, unless something is true; ``story`` says what was found."""
    if not truth:
        raise AssertionError(story)
