"""`etha.tensor_bus.bell`: a descriptor that outlives the agents that ring it."""

from __future__ import annotations

import os
import select

import pytest

from etha.tensor_bus.bell import Bell


def descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")


def test_each_agent_rings_through_a_pipe_of_its_own():
    before = len(descriptors())
    bell = Bell(0)
    for _ in range(3):
        ringing = os.dup(bell.renew())
        bell.hand_over()
        assert not select.select([bell], [], [], 0)[0]
        os.write(ringing, b"1")
        assert select.select([bell], [], [], 0)[0]
        bell.silence()
        assert not select.select([bell], [], [], 0)[0]
        os.close(ringing)
        assert select.select([bell], [], [], 0)[0]  # its agent has died
    bell.close()
    assert len(descriptors()) == before


def test_one_that_was_closed_makes_no_pipe():
    """A thread that looks for a successor may come to it after the thread that closed it."""
    before = len(descriptors())
    bell = Bell(0)
    bell.close()
    with pytest.raises(ValueError, match="closed"):
        bell.renew()
    assert len(descriptors()) == before
