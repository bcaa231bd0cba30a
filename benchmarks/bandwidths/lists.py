"""The parameters of a published model, step by step: what a hand-over costs its hosts, and what its bytes take.

The owner writes the version into the last tensor before each step; the reader finds it in what it has copied.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection, Pipe
from typing import Final

import torch
from costs.pairing import Run, Side
from costs.processes import Box, client
from costs.row import Budget, Row, compare
from costs.spread import percentiles, spread

from bandwidths import model
from bandwidths.actors import Actor, now
from bandwidths.memory import GIB, Memory
from bandwidths.place import Place
from bandwidths.ways import Bucket, Etha, Handles, Pinned, Way
from etha import setup_ptrace

_PACE: Final = 2e-3
"""Seconds for the reader to begin to wait, before the owner hands over."""

_ONE_COPY: Final = 8 * GIB
_MARKS: Final = 128
"""Integers below that are themselves in bfloat16."""

_OTHERS: Final = {
    "handles": "a handle per tensor, torch.multiprocessing",
    "bucket": "one flattened bucket",
    "pinned": "staged through pinned host memory",
}


def buffer_bytes(scale: float) -> int:
    """Of a bucket: an eighth of the list, and at least its largest tensor."""
    return max(model.nbytes(scale) // 8, *(_nbytes(shape) for shape in model.shapes(scale).values()))


def alone(place: Place, scale: float, run: Run) -> list[Row]:
    """Publish and read as their hosts see it, and `copy_into` beside one large `copy_()`."""
    with ExitStack() as stack:
        owner, reader = _actors(stack, place, scale, ())
        versions = itertools.count(1)
        turn = Run(run.quick, lambda share: run.step(share / 2))

        def publish_and_read() -> float:
            version = next(versions)
            published = owner.call("publish", version)
            time.sleep(_PACE)
            return float(published + reader.call("read", version))

        steps = turn.interleave({"etha": publish_and_read}, rounds=20, turns=5, pause=1e-3, warm=5)["etha"]
        turn = Run(run.quick, lambda share: run.step((1 + share) / 2))
        sides: dict[str, Side] = {side: partial(reader.call, "copy", side) for side in ("etha", "floor")}
        taken = turn.interleave(sides, rounds=10, warm=1)
        about = {**_about(scale), "register_tensors(), s": owner.call("registered"), "copied at once": _half(scale)}
    every = [value for samples in steps for value in samples]
    return [
        Row(
            name=f"list-publish-read-{place.kind}",
            what=f"publish() and read() of the list, host time ({place.kind})",
            etha=spread(every),
            floor_is="nothing: a value",
            budget=Budget("value", 1e-3, "≤ 1 ms of host time, whatever the bytes"),
            samples=len(every),
            rounds=len(steps),
            percentiles={"etha": percentiles(steps)},
            more=about,
        ),
        compare(
            f"list-copy-into-{place.kind}",
            f"copy_into() of the list, per GiB ({place.kind})",
            **taken,
            floor_is="one copy_() of half of it, at most 8 GiB, per GiB",
            budget=Budget("ratio", 1 / 0.9, "≥ 0.9 of one 8 GiB copy_()"),
            more=about,
        ),
    ]


def beside(place: Place, scale: float, run: Run) -> list[Row]:
    """The hand-over and the whole step, beside the other ways."""
    others = [way for way in _OTHERS if way != "pinned" or place.kind != "host"]
    with ExitStack() as stack:
        owner, reader = _actors(stack, place, scale, others)
        versions = itertools.count(1)

        def step(way: str, copy: bool) -> float:
            version = next(versions)
            reader.say("receive", way, version, copy)
            time.sleep(_PACE)
            began = owner.call("send", way, version)
            return float(reader.hear()[copy] - began) * 1e-9

        turn = Run(run.quick, lambda share: run.step(share / 3))
        sides = {way: partial(step, way, False) for way in ("etha", "handles")}
        handed = turn.interleave(sides, rounds=10, turns=3, warm=2)
        turn = Run(run.quick, lambda share: run.step((1 + 2 * share) / 3))
        copied = turn.interleave({way: partial(step, way, True) for way in ("etha", *others)}, rounds=7, warm=1)
    about = {**_about(scale), "bytes of the bucket": float(buffer_bytes(scale))}
    return [
        compare(
            f"list-handover-{place.kind}",
            f"a step's hand-over, its bytes left out ({place.kind})",
            etha=handed["etha"],
            floor=handed["handles"],
            floor_is=_OTHERS["handles"],
            budget=Budget("ratio", 0.1, "≥ 10 × cheaper than handles per tensor"),
            more=about,
        ),
        *(
            compare(
                f"step-{way}-{place.kind}",
                f"a whole step: handed over and copied ({place.kind})",
                etha=copied["etha"],
                floor=copied[way],
                floor_is=_OTHERS[way],
                more=about,
            )
            if way in others
            else Row(name=f"step-{way}-{place.kind}", what=f"a whole step ({place.kind})", note="needs a GPU")
            for way in _OTHERS
        ),
    ]


def _actors(stack: ExitStack, place: Place, scale: float, ways: tuple[str, ...] | list[str]) -> tuple[Actor, Actor]:
    """Owner and reader; what they share but etha is made before they are forked."""
    stack.enter_context(Box(place.device))
    ours, theirs = Pipe()
    stack.enter_context(ours)
    stack.enter_context(theirs)
    staged = None
    if "pinned" in ways:
        staged = torch.zeros(buffer_bytes(scale), dtype=torch.uint8).share_memory_()
    owner = stack.enter_context(Actor(_Owner, place, scale, ways, ours, staged))
    reader = stack.enter_context(Actor(_Reader, place, scale, ways, theirs, staged))
    if place.kind == "fd" and ways:
        owner.call("trust", reader.pid)
    return owner, reader


def _about(scale: float) -> dict[str, float]:
    shapes = model.shapes(scale)
    return {"scale": scale, "bytes": float(model.nbytes(scale)), "tensors": float(len(shapes))}


def _half(scale: float) -> float:
    return float(min(_ONE_COPY, model.nbytes(scale) // 2))


def _nbytes(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * model.ITEMSIZE


def _others(
    memory: Memory,
    connection: Connection,
    tensors: Mapping[str, torch.Tensor] | None,
    scale: float,
    ways: list[str],
    staged: torch.Tensor | None,
) -> dict[str, Way]:
    made: dict[str, Way] = {}
    if "handles" in ways:
        made["handles"] = Handles(memory, connection, tensors)
    if "bucket" in ways:
        made["bucket"] = Bucket(memory, connection, tensors, buffer_bytes(scale))
    if staged is not None:
        made["pinned"] = Pinned(memory, connection, tensors, staged)
    return made


class _Owner:
    def __init__(
        self, place: Place, scale: float, ways: list[str], connection: Connection, staged: torch.Tensor | None
    ) -> None:
        self._memory = Memory(place)
        self._tensors = {
            name: self._memory.shared(shape, torch.bfloat16) for name, shape in model.shapes(scale).items()
        }
        self._mark = list(self._tensors.values())[-1].view(-1)[-1:]
        self._memory.wait()
        bus = client()
        started = time.perf_counter_ns()
        self._etha = Etha(self._memory, bus, self._tensors)
        self._took = (time.perf_counter_ns() - started) * 1e-9
        others = _others(self._memory, connection, self._tensors, scale, ways, staged)
        self._ways: dict[str, Way] = {"etha": self._etha, **others}

    def trust(self, pid: int) -> None:
        """torch takes descriptors of virtual memory out of this process: pidfd_getfd(2) asks for that right."""
        setup_ptrace(pid)

    def registered(self) -> float:
        return self._took

    def publish(self, version: int) -> float:
        started = time.perf_counter_ns()
        self._etha.send(version)
        return (time.perf_counter_ns() - started) * 1e-9

    def send(self, way: str, version: int) -> int:
        """The moment before it was sent."""
        self._mark.fill_(version % _MARKS)
        self._memory.wait()
        moment = now()
        self._ways[way].send(version)
        return moment


class _Reader:
    def __init__(
        self, place: Place, scale: float, ways: list[str], connection: Connection, staged: torch.Tensor | None
    ) -> None:
        self._memory = Memory(place)
        self._all = self._memory.private(model.nbytes(scale))
        self._half = int(_half(scale))
        self._targets: dict[str, torch.Tensor] = {}
        start = 0
        for name, shape in model.shapes(scale).items():
            part = self._all[start : start + _nbytes(shape)]
            self._targets[name] = part.view(torch.bfloat16).view(shape)
            start += part.nbytes
        self._memory.wait()
        self._bus = client()
        self._etha = Etha(self._memory, self._bus, None)
        self._ways: dict[str, Way] = {
            "etha": self._etha,
            **_others(self._memory, connection, None, scale, ways, staged),
        }

    def read(self, version: int) -> float:
        """Seconds of a read of what is published."""
        started = time.perf_counter_ns()
        lease = self._etha.lease(version)
        took = (time.perf_counter_ns() - started) * 1e-9
        lease.release()
        return took

    def copy(self, side: str) -> float:
        """Seconds a GiB: of the list out of a lease, or of one half of its place into the other."""
        if side == "floor":
            half = self._half
            seconds = self._memory.seconds(lambda: self._all[:half].copy_(self._all[half : 2 * half]))
            return seconds * GIB / half
        with self._etha.lease(0) as lease:
            return self._memory.seconds(lambda: lease.copy_into(self._targets)) * GIB / self._all.nbytes

    def receive(self, way: str, version: int, copy: bool) -> tuple[int, int]:
        moments = self._ways[way].receive(version, self._targets if copy else None)
        if copy and int(list(self._targets.values())[-1].view(-1)[-1]) != version % _MARKS:
            raise RuntimeError(f"what {way} handed over and was copied is not version {version}")
        return moments
