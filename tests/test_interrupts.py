"""Row 25: interrupts, timeouts and exceptions at every point of a request and its grant leave nothing behind.

See `interrupting` for how a point is reached, `interrupt_rig` for what is interrupted and what must hold afterwards.
"""

from __future__ import annotations

import os
import random

import pytest
from box import Box, until


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    box = Box("interrupts", tmp_path_factory.mktemp("interrupts"))
    yield box
    assert box.close() == ""


@pytest.fixture(scope="module")
def rig(box):
    worker = box.worker("from interrupt_rig import Rig\nrig = Rig()")
    before = box.open_descriptors()
    yield worker
    until(lambda: box.open_descriptors() <= before)
    worker.do("rig.end(); client.close()")
    until(lambda: box.publications() == set())


@pytest.fixture
def chance():
    seed = int(os.environ.get("ETHA_SEED", 1))
    print("ETHA_SEED =", seed)
    return random.Random(seed)


OPERATIONS = [
    "close",
    "connect",
    "iterate",
    "publish",
    "read",
    "read_that_times_out",
    "rebind",
    "register",
    "subscribe",
    "suspend_and_resume",
    "update",
    "update_that_fails",
]


def test_the_list_of_operations_is_whole(rig):
    assert rig.do("list(rig.operations)") == OPERATIONS


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_at_a_point(rig, chance, name):
    points = rig.do(f"rig.points({name!r})")
    chosen = sorted(chance.sample(range(1, points + 1), 6))
    assert rig.do(f"rig.sweep({name!r}, {chosen})") > 0


@pytest.mark.stress
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_at_every_point(rig, name):
    points = rig.do(f"rig.points({name!r})")
    reached = rig.do(f"rig.sweep({name!r}, range(1, {points} + 1))", 600)
    print(f"{name}: {reached} of {points} points")
    assert reached > points // 2


def test_an_interrupted_thread_loses_nobody_elses_reply(rig, chance):
    points = rig.do("rig.points('read')")
    rig.do(f"rig.bystanders({sorted(chance.sample(range(1, points + 1), 12))})")


@pytest.mark.stress
def test_an_interrupt_at_every_point_loses_nobody_elses_reply(rig):
    points = rig.do("rig.points('read')")
    rig.do(f"rig.bystanders(range(1, {points} + 1))", 600)


def test_signals_at_random_moments(rig, chance):
    assert rig.do(f"rig.at_random(50, {chance.random()})") > 0


@pytest.mark.stress
def test_a_thousand_signals_at_random_moments(rig, chance):
    cut = rig.do(f"rig.at_random(1000, {chance.random()})", 900)
    print(f"1000 rounds, {cut} of them cut short")
    assert cut > 100
