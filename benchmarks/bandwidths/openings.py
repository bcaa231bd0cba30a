"""What exporting, opening and closing cost, by size and by count; beside the same without etha, of as many pieces.

Exporting is `register_tensors`, opening `subscribe` and the first lease, closing the subscription's and then the
publication's. Each case is measured in every round, so sizes and counts meet the same machine.
"""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from typing import Final, NamedTuple

import torch
from costs.pairing import Run
from costs.processes import Box, client
from costs.row import Row, compare
from costs.spread import medians, spread

from bandwidths.actors import Actor
from bandwidths.copies import named
from bandwidths.floors import Exporter, Opener
from bandwidths.memory import GIB, MIB, Memory
from bandwidths.place import Place

_STEPS: Final = {
    "export": "register_tensors()",
    "open": "subscribe() and a first lease",
    "close": "both closed",
}
_REST: Final = 0.1
"""Seconds before each sample: the agent looks, aside, at what was registered last."""

Taken = dict[str, list[list[float]]]


class Case(NamedTuple):
    """So many tensors of so many bytes."""

    count: int
    nbytes: int

    @property
    def name(self) -> str:
        return f"{self.count} x {named(self.nbytes)}"


def cases(place: Place) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """By size, and by count; each from the least on.

    On a device a tensor of 20 MiB has memory of its own; smaller ones share what torch's allocator takes at a time.
    """
    least = 2 * MIB if place.kind == "host" else 20 * MIB
    return tuple(Case(1, size) for size in (least, 64 * MIB, GIB)), tuple(Case(n, least) for n in (10, 100, 800))


def openings(place: Place, run: Run) -> list[Row]:
    """Both ways, case by case, round by round."""
    by_size, by_count = cases(place)
    if run.quick:
        by_size, by_count = (Case(1, MIB), Case(1, 2 * MIB)), (Case(2, MIB), Case(4, MIB))
    every = (*by_size, *by_count)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ExitStack() as stack:
        for entered in (ours, theirs, Box(place.device)):
            stack.enter_context(entered)
        owner = stack.enter_context(Actor(_Owner, place, ours))
        reader = stack.enter_context(Actor(_Reader, place))
        opener = stack.enter_context(Actor(Opener, place, theirs))
        if max(case.count for case in every) * every[0].nbytes + by_size[-1].nbytes > owner.call("free") // 2:
            return [
                Row(name=f"{step}-{by}-{place.kind}", what=what, note="more than half of the free memory")
                for by in ("size", "count")
                for step, what in _STEPS.items()
            ]
        owner.call("make", every)
        taken: dict[Case, dict[str, Taken]] = {
            case: {side: {step: [] for step in _STEPS} for side in ("etha", "bare")} for case in every
        }
        rounds = run.pick(7, 2)
        for number in range(-1, rounds):  # the first one warms
            for case in every if number % 2 else every[::-1]:
                sides = (("etha", lambda: _etha(owner, reader)), ("bare", lambda: _bare(owner, opener)))
                owner.call("choose", case)
                for side, measure in sides if number % 2 else sides[::-1]:
                    time.sleep(_REST)
                    for step, seconds in measure().items():
                        if number >= 0:
                            taken[case][side][step].append([seconds])
            run.step((number + 1) / rounds)
    return [*_by_size(place, by_size, taken), *_by_count(place, by_count, taken)]


def _etha(owner: Actor, reader: Actor) -> dict[str, float]:
    found = {"export": owner.call("register"), "open": reader.call("open")}
    return {**found, "close": reader.call("close") + owner.call("close")}


def _bare(owner: Actor, opener: Actor) -> dict[str, float]:
    sizes = owner.call("pieces")
    return {"export": owner.call("export"), "open": opener.call("open", sizes), "close": opener.call("close")}


def _by_size(place: Place, those: tuple[Case, ...], taken: dict[Case, dict[str, Taken]]) -> list[Row]:
    least, most = those[0], those[-1]
    return [
        compare(
            f"{step}-size-{place.kind}",
            f"{what}, {named(most.nbytes)} ({place.kind})",
            etha=taken[most]["etha"][step],
            floor=taken[least]["etha"][step],
            floor_is=f"{named(least.nbytes)}",
            more=_more(step, those, taken),
        )
        for step, what in _STEPS.items()
    ]


def _by_count(place: Place, those: tuple[Case, ...], taken: dict[Case, dict[str, Taken]]) -> list[Row]:
    most = those[-1]
    bare = "memory files" if place.kind == "host" else "the driver's calls"
    return [
        compare(
            f"{step}-count-{place.kind}",
            f"{what}, {most.count} of {named(most.nbytes)} ({place.kind})",
            etha=taken[most]["etha"][step],
            floor=taken[most]["bare"][step],
            floor_is=f"{bare}, as many",
            more=_more(step, those, taken),
        )
        for step, what in _STEPS.items()
    ]


def _more(step: str, those: tuple[Case, ...], taken: dict[Case, dict[str, Taken]]) -> dict[str, float]:
    return {
        f"{case.name}, {side}, s": spread(medians(taken[case][side][step])).median
        for case in those
        for side in ("etha", "bare")
    }


class _Owner:
    def __init__(self, place: Place, sock: socket.socket) -> None:
        self._memory = Memory(place)
        self._bus = client()
        self._floor = Exporter(place, sock)
        self._tensors: dict[Case, dict[str, torch.Tensor]] = {}

    def free(self) -> int:
        return self._memory.free()

    def make(self, every: list[tuple[int, int]]) -> int:
        """What the counts have in common is made once."""
        cases = [Case(*case) for case in every]
        least = cases[0].nbytes
        many = [self._memory.shared((least,), torch.uint8) for _ in range(max(case.count for case in cases))]
        for case in cases:
            those = many[: case.count] if case.nbytes == least else [self._memory.shared((case.nbytes,), torch.uint8)]
            self._tensors[case] = {f"tensor {number}": tensor for number, tensor in enumerate(those)}
        self._memory.wait()
        return len(many)

    def choose(self, case: tuple[int, int]) -> int:
        self._now = self._tensors[Case(*case)]
        self._sizes = self._floor.prepare(list(self._now.values()))
        return len(self._now)

    def pieces(self) -> list[int]:
        return self._sizes

    def register(self) -> float:
        started = time.perf_counter_ns()
        self._publication = self._bus.register_tensors("those", self._now)
        return (time.perf_counter_ns() - started) * 1e-9

    def close(self) -> float:
        started = time.perf_counter_ns()
        self._publication.close()
        return (time.perf_counter_ns() - started) * 1e-9

    def export(self) -> float:
        return self._floor.export()


class _Reader:
    def __init__(self, place: Place) -> None:
        self._memory = Memory(place)
        self._bus = client()

    def open(self) -> float:
        started = time.perf_counter_ns()
        self._subscription = self._bus.subscribe("those")
        with self._subscription.read() as lease:
            len(lease)
        return (time.perf_counter_ns() - started) * 1e-9

    def close(self) -> float:
        started = time.perf_counter_ns()
        self._subscription.close()
        return (time.perf_counter_ns() - started) * 1e-9
