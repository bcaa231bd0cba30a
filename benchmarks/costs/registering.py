"""What `register_tensors` grows with: names and allocations, not bytes."""

from __future__ import annotations

import itertools
import time
from typing import Final

import torch

from costs.pairing import Run, Side
from costs.processes import Box, client
from costs.row import Budget, Row, compare
from costs.spread import medians, spread
from costs.tensors import MIB, parameters

_COUNTS: Final = (1, 500, 10_000)
_REST: Final = 0.3
"""Seconds before each sample: the agent closes, aside, what was there before, and looks at its owner's memory."""

_SIZES: Final = (MIB, 64 * MIB, 1024 * MIB)


def count(run: Run) -> list[Row]:
    """1, 500 and 10,000 tensors, each with a storage of its own."""
    first, middle, last = (run.pick(each, min(each, 10 * (1 + place))) for place, each in enumerate(_COUNTS))
    with Box():
        bus = client()
        sides = {str(n): _registering(bus, parameters(n, strategy="file_system")) for n in (first, middle, last)}
        taken = run.interleave(sides, rounds=10, warm=1, pause=0.0 if run.quick else _REST)
    per_tensor = {n: [[value / n for value in samples] for samples in taken[str(n)]] for n in (middle, last)}
    return [
        compare(
            "register-count",
            "register_tensors() of 10,000, per tensor",
            etha=per_tensor[last],
            floor=per_tensor[middle],
            floor_is="of 500, per tensor",
            budget=Budget("ratio", 1.2, "grows with names (≤ 1.2 × per tensor)"),
            more={f"{n} tensors, s": spread(medians(rounds)).median for n, rounds in taken.items()},
        )
    ]


def nbytes(run: Run) -> list[Row]:
    """One tensor of 1 MiB, 64 MiB and 1 GiB, every page touched."""
    sizes = [run.pick(size, min(size, 4 * MIB)) for size in _SIZES]
    with Box():
        bus = client()
        sides = {f"{place}": _registering(bus, parameters(1, size)) for place, size in enumerate(sizes)}
        taken = run.interleave(sides, rounds=20, turns=5, pause=1e-3, warm=3)
    return [
        compare(
            "register-bytes",
            "register_tensors() of 1 GiB",
            etha=taken["2"],
            floor=taken["0"],
            floor_is="of 1 MiB",
            budget=Budget("even", 1.05, "does not grow with bytes"),
            more={
                f"{size // MIB} MiB, s": spread(medians(taken[f"{place}"])).median for place, size in enumerate(_SIZES)
            },
        )
    ]


_numbers = itertools.count()


def _registering(bus, tensors: dict[str, torch.Tensor]) -> Side:
    def side() -> float:
        started = time.perf_counter_ns()
        publication = bus.register_tensors(f"number {next(_numbers)}", tensors)
        took = time.perf_counter_ns() - started
        publication.close()
        return took * 1e-9

    return side
