"""Steps that undo what was done, last first, each until it has succeeded.

`contextlib.ExitStack` will not do: it goes on after a step that failed, and forgets it. Here a step that fails stays,
and those before it, which may depend on it, wait for it.
"""

from __future__ import annotations

from collections.abc import Callable


class Undo:
    """A stack of steps. Not safe to run in two threads at once."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def push(self, step: Callable[[], object]) -> None:
        """Add a step, to be taken before those that are there."""
        self._steps.append(step)

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return not self._steps

    def run(self) -> None:
        """Take what steps are left; one that raises stays, and `run` can be called again."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()
