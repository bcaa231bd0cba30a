"""How fast bytes are copied out of a mapping: beside their owner's copy of the same bytes, and beside one's own."""

from __future__ import annotations

from typing import Any, Final

import torch
from costs.pairing import Run
from costs.processes import Box, client
from costs.row import Budget, Row, compare
from costs.spread import medians, spread

from bandwidths.actors import Actor
from bandwidths.memory import GIB, MIB, Memory
from bandwidths.place import Place

SIZES: Final = (512 * MIB, 2 * GIB, 8 * GIB)
_BUDGET: Final = Budget("even", 1.02, "1, within the run's spread")
_BUFFERS: Final = 4
"""The source and, in the reader, one of its own; and a target in each of the two processes."""

_MARK, _OWN = 7, 1


def named(size: int) -> str:
    """``"512MiB"``, ``"8GiB"``."""
    return f"{size // GIB}GiB" if size >= GIB else f"{size // MIB}MiB"


def bandwidth(place: Place, run: Run) -> list[Row]:
    """Reader and owner copy in turns, each into its own memory."""
    rows: list[Row] = []
    with Box(place.device), Actor(_Owner, place) as owner, Actor(_Reader, place) as reader:
        sizes = [run.pick(size, 2 * MIB * (1 + index)) for index, size in enumerate(SIZES)]
        fitting = [size for size in sizes if _BUFFERS * size <= owner.call("free") // 2]
        if fitting:
            owner.call("register", max(fitting))
            reader.call("subscribe", max(fitting))
        for index, (size, full) in enumerate(zip(sizes, SIZES, strict=True)):
            if size in fitting:
                share = Run(run.quick, lambda done, before=index: run.step((before + done) / len(SIZES)))
                rows += _rows(place, size, full, _taken(share, owner, reader, size))
            else:
                rows += [
                    Row(name=name, what=what, note="more than half of the free memory")
                    for name, what, _, _ in _of(place, full)
                ]
    return rows


def _taken(run: Run, owner: Actor, reader: Actor, size: int) -> dict[str, list[list[float]]]:
    sides = {
        "mapping": lambda: float(reader.call("copy", "theirs", size)),
        "owner": lambda: float(owner.call("copy", size)),
        "own": lambda: float(reader.call("copy", "own", size)),
    }
    return run.interleave(sides, rounds=10, turns=2, warm=1)


def _of(place: Place, size: int) -> tuple[tuple[str, str, str, str], ...]:
    """Name, what, floor and the floor's side of the two rows of a size."""
    what = f"{named(size)} copied out of a mapping ({place.kind})"
    return (
        (f"copy-{place.kind}-{named(size)}", what, "the same bytes, by their owner", "owner"),
        (f"own-{place.kind}-{named(size)}", what, "out of one's own memory", "own"),
    )


def _rows(place: Place, size: int, full: int, taken: dict[str, list[list[float]]]) -> list[Row]:
    speed = size / spread(medians(taken["mapping"])).median
    return [
        compare(
            name,
            what,
            etha=taken["mapping"],
            floor=taken[side],
            floor_is=floor_is,
            budget=_BUDGET,
            more={"bytes": float(size), "bytes/s": speed},
        )
        for name, what, floor_is, side in _of(place, full)
    ]


class _Owner:
    def __init__(self, place: Place) -> None:
        self._memory = Memory(place)
        self._bus = client()

    def free(self) -> int:
        return self._memory.free()

    def register(self, nbytes: int) -> int:
        self._source = self._memory.shared((nbytes,), torch.uint8, _MARK)
        self._target = self._memory.private(nbytes)
        self._memory.wait()
        self._publication = self._bus.register_tensors("buffer", {"bytes": self._source})
        return self._publication.version

    def copy(self, nbytes: int) -> float:
        return self._memory.seconds(lambda: self._target[:nbytes].copy_(self._source[:nbytes]))


class _Reader:
    def __init__(self, place: Place) -> None:
        self._memory = Memory(place)
        self._bus = client()

    def subscribe(self, nbytes: int) -> int:
        self._own = self._memory.shared((nbytes,), torch.uint8, _OWN)
        self._target = self._memory.private(nbytes)
        self._lease = self._bus.subscribe("buffer").read()
        return self._lease.version

    def copy(self, which: str, nbytes: int) -> float:
        """Seconds; the last byte that was to come has come."""
        source: Any = self._lease["bytes"] if which == "theirs" else self._own
        took = self._memory.seconds(lambda: self._target[:nbytes].copy_(source[:nbytes]))
        if self._target[nbytes - 1].item() != (_MARK if which == "theirs" else _OWN):
            raise RuntimeError("a copy that was clocked has not copied")
        return took
