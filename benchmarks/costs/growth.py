"""Whether a step grows faster than the number of tensors: each at three sizes, up to 10,000.

A row compares what a tensor costs among 10,000 with what it costs among 1,000; the smallest size is in the file.
"""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack
from functools import partial
from typing import Final

import torch

from costs.pairing import Run, Side, clocked
from costs.processes import Box, Helper, Talk, client
from costs.row import Budget, Row, compare
from costs.spread import medians, spread
from costs.tensors import parameters
from etha import TensorBusClient
from etha.cli.inspect import look_up
from etha.cli.survey import survey

_SIZES: Final = (100, 1_000, 10_000)
_BUDGET: Final = Budget("ratio", 1.2, "not faster than linear (≤ 1.2 × per tensor)")
_REST: Final = 0.2
"""Seconds before each sample: the agent looks, aside, at what was registered last, and closes what went."""

_REPEATS: Final = 5


def ten_thousand(run: Run) -> list[Row]:
    """Register, subscribe, read, publish, status and inspect, each with one publication of so many tensors."""
    sizes = [run.pick(size, 5 * (place + 1)) for place, size in enumerate(_SIZES)]
    taken: dict[str, dict[int, list[list[float]]]] = {step: {size: [] for size in sizes} for step in _WHAT}
    rounds = run.pick(5, 1)
    with ExitStack() as stack:
        box = stack.enter_context(Box())
        state = str(box.directory / "agent_rank0_state.lmdb")
        surveyor = stack.enter_context(Helper(_survey, state))
        onlooker = Onlooker(
            stack.enter_context(Helper(_inspect, state)),
            {size: stack.enter_context(Helper(_own, size)) for size in sizes},
            stack.enter_context(Helper(_subscribe)),
        )
        bus = client()
        sets = {size: parameters(size, 64, strategy="file_system") for size in sizes}
        names = (f"number {number}" for number in itertools.count())
        for number in range(-1, rounds):  # the first round warms
            for size in sizes if number % 2 else sizes[::-1]:
                time.sleep(_REST)
                for step, seconds in _steps(bus, surveyor, next(names), sets[size]).items():
                    if number >= 0:
                        taken[step][size].append([seconds])
                seconds = onlooker.inspect(next(names), size)
                if number >= 0:
                    taken["inspect"][size].append([seconds])
            run.step((number + 1) / rounds)
    return [_row(step, sizes, taken[step]) for step in _WHAT]


_WHAT: Final = {
    "register": "register_tensors()",
    "subscribe": "subscribe()",
    "read": "a lease, every tensor looked at, released",
    "publish": "publish()",
    "status": "the survey behind etha status",
    "inspect": "what etha inspect gathers",
}
"""Step to what it is. A further step is a line here and one in `_steps`; or, as ``inspect``, an actor of its own."""


class Onlooker:
    """`etha inspect` of a publication whose owner and reader have mapped nothing else.

    Not of one of the process that takes the other steps: that keeps every size's tensors mapped, so the look at its
    /proc/PID/maps would cost as much for 100 of them as for 10,000, and hide what grows.
    """

    def __init__(self, inspector: Helper, owners: dict[int, Helper], reader: Helper) -> None:
        self._inspector = inspector
        self._owners = owners
        self._reader = reader

    def inspect(self, name: str, size: int) -> float:
        """Seconds, with a publication of so many tensors, which is gone afterwards."""
        self._owners[size].ask(name)
        self._reader.ask(name)
        time.sleep(_REST)
        seconds: float = self._inspector.ask([name, size])
        self._reader.ask(None)
        self._owners[size].ask(None)
        return seconds


def _steps(bus: TensorBusClient, surveyor: Helper, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds of each step with one publication, which is gone afterwards."""
    started = time.perf_counter_ns()
    publication = bus.register_tensors(name, tensors)
    registered = time.perf_counter_ns()
    subscription = bus.subscribe(name)
    subscribed = time.perf_counter_ns()

    def read() -> None:
        with subscription.read() as lease:
            for tensor in lease.values():
                tensor.data_ptr()

    time.sleep(_REST)
    found = {
        "register": (registered - started) * 1e-9,
        "subscribe": (subscribed - registered) * 1e-9,
        "read": _undisturbed(clocked(read)),
        "publish": _undisturbed(clocked(publication.publish)),
        "status": surveyor.ask(),
    }
    subscription.close()
    publication.close()
    return found


def _undisturbed(side: Side) -> float:
    """The least of a few, for steps that leave nothing behind.

    On a busy machine the scheduler interrupts a step of milliseconds, and not one of microseconds: that is no growth.
    """
    return min(side() for _ in range(_REPEATS))


def _survey(talk: Talk, state: str) -> None:
    """In a process without tensors, as the command's own is."""
    while True:
        talk.hear()
        talk.say(_undisturbed(clocked(lambda: survey(state))))


def _inspect(talk: Talk, state: str) -> None:
    """The same for the other command; who looked at nothing would be fast."""
    while True:
        name, size = talk.hear()
        (view,) = look_up(name, state_path=state).publications
        seen = [view.owner.mapped, *(reader.mapped for reader in view.readers)]
        if len(view.tensors) != size or seen != [size, size]:
            raise RuntimeError(f"of {size} tensors, {len(view.tensors)} were found, and mapped: {seen}")
        talk.say(_undisturbed(clocked(partial(look_up, name, state_path=state))))


def _own(talk: Talk, size: int) -> None:
    """Registers its tensors under the name that it hears, and closes them at None."""
    tensors = parameters(size, 64, strategy="file_system")
    bus = client()
    while True:
        publication = bus.register_tensors(talk.hear(), tensors)
        talk.say(publication.version)
        talk.hear()
        publication.close()
        talk.say("closed")


def _subscribe(talk: Talk) -> None:
    """Subscribes to the name that it hears, until None."""
    bus = client()
    while True:
        subscription = bus.subscribe(talk.hear())
        talk.say(subscription.generation)
        talk.hear()
        subscription.close()
        talk.say("closed")


def _row(step: str, sizes: list[int], taken: dict[int, list[list[float]]]) -> Row:
    _, middle, last = sizes
    per_tensor = {size: [[value / size for value in samples] for samples in taken[size]] for size in (middle, last)}
    return compare(
        "status-10000-survey" if step == "status" else f"{step}-10000",
        f"{_WHAT[step]}, 10,000 tensors, per tensor",
        etha=per_tensor[last],
        floor=per_tensor[middle],
        floor_is="1,000 tensors, per tensor",
        budget=_BUDGET,
        more={f"{size} tensors, s": spread(medians(rounds)).median for size, rounds in taken.items()},
    )
