"""`etha.tensor_bus.fencing`: an agent's slots, or none."""

from __future__ import annotations

import pytest

from etha.errors import InvalidRecord
from etha.tensor_bus.fencing import Fencing


def test_the_hosts_agent_has_none():
    fencing = Fencing(device=False)
    assert (fencing.needed, fencing.fds(), fencing.take(), fencing.given) == (False, [], 0, 0)
    fencing.inherit(5, [3])
    fencing.release(3)
    assert fencing.reached(3, 9)
    with pytest.raises(InvalidRecord):
        fencing.adopt([])
    fencing.close()


def test_a_successor_gives_out_other_slots_and_lets_go_of_the_dead():
    before, after = Fencing(device=True), Fencing(device=True)
    slots = [before.take() for _ in range(3)]
    after.inherit(before.given, slots[:1])
    after.adopt(before.fds())
    assert after.take() == 3
    assert not before.reached(slots[0], 1)
    assert before.reached(slots[1], 1)
    before.close()
    after.close()
