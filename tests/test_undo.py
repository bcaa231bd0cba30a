"""`etha.tensor_bus.ipc.undo`: last first, and what fails stays with all that came before it."""

from __future__ import annotations

import pytest

from etha.tensor_bus.ipc.undo import Undo


def test_last_first_and_once():
    done: list[str] = []
    undo = Undo()
    for step in ("first", "second", "third"):
        undo.push(lambda step=step: done.append(step))
    undo.run()
    undo.run()
    assert done == ["third", "second", "first"]


def test_a_step_that_fails_stays_and_is_taken_again():
    done: list[str] = []
    broken = [True]

    def step() -> None:
        if broken:
            broken.clear()
            raise OSError("not now")
        done.append("second")

    undo = Undo()
    undo.push(lambda: done.append("first"))
    undo.push(step)
    undo.push(lambda: done.append("third"))
    with pytest.raises(OSError, match="not now"):
        undo.run()
    assert done == ["third"]
    undo.run()
    assert done == ["third", "second", "first"]
