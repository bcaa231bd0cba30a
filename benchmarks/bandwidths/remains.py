"""The memory that a published list takes: while it is read, and when both sides have gone.

Of everything on the box, or on the device, as a process that has no part in it sees it; so nothing else may run there.
"""

from __future__ import annotations

import time
from typing import Final

import torch
from costs.pairing import Run
from costs.processes import Box, client
from costs.reading import used
from costs.row import Budget, Row
from costs.spread import spread

from bandwidths import model
from bandwidths.actors import Actor
from bandwidths.memory import Memory
from bandwidths.place import Place

_SECONDS: Final = 2.0
"""Within which all is back."""

_PAGE: Final = 4096


def remains(place: Place, scale: float, run: Run) -> list[Row]:
    """Some rounds, each with an owner and a reader of its own; their contexts, on a device, are there before."""
    size = model.nbytes(scale)
    rounds = run.pick(3, 1)
    found: dict[str, list[float]] = {"during": [], "cloned": [], "alive": [], "after": []}
    with Box(place.device), Actor(_Watcher, place) as watcher:
        for number in range(-1, rounds):  # in the first one, the agent gets what it keeps
            base = watcher.call("used")
            with Actor(_Owner, place, scale) as owner, Actor(_Reader, place) as reader:
                before = watcher.call("used")
                owner.call("register")
                reader.call("read")
                during = watcher.call("used")
                reader.call("clone")
                cloned = watcher.call("used")
                reader.call("close")
                owner.call("close")
                alive = watcher.call("used")
            after = watcher.call("settle", base)
            if number >= 0:
                for name, value in (
                    ("during", during - before),
                    ("cloned", cloned - before),
                    ("alive", alive - base),
                    ("after", after - base),
                ):
                    found[name].append(value / size)
            run.step((number + 2) / (rounds + 1))
    limit = 0.01 if place.kind == "host" else 0.001
    more = {"bytes": float(size), "scale": scale}
    return [
        Row(
            name=f"memory-{name}-{place.kind}",
            what=f"{what} ({place.kind})",
            unit="share",
            etha=spread(found[name]),
            floor=spread(found[control]),
            floor_is=f"{floor_is} (to see it seen)",
            budget=budget,
            samples=len(found[name]),
            rounds=len(found[name]),
            more=more,
        )
        for name, what, control, floor_is, budget in (
            (
                "during",
                "the memory used more while the list is registered and read",
                "cloned",
                "a reader that clones",
                Budget("value", 0.01, "< 1 % of the bytes: no second copy"),
            ),
            (
                "after",
                "the memory left when both sides have gone",
                "alive",
                "both closed, and alive",
                Budget("value", limit, f"nothing left within 2 s (≤ {limit:.1%})"),
            ),
        )
    ]


class _Watcher:
    def __init__(self, place: Place) -> None:
        self._memory = Memory(place)

    def used(self) -> int:
        """Bytes."""
        if not self._memory.on_device:
            return used()
        free, total = torch.cuda.mem_get_info()
        return total - free

    def settle(self, base: int) -> int:
        """What is used once it is no more than before, or after so long."""
        deadline = time.monotonic() + _SECONDS
        while (now := self.used()) > base and time.monotonic() < deadline:
            time.sleep(0.01)
        return now


class _Owner:
    def __init__(self, place: Place, scale: float) -> None:
        self._memory = Memory(place)
        self._tensors = {
            name: self._memory.shared(shape, torch.bfloat16) for name, shape in model.shapes(scale).items()
        }
        self._memory.wait()
        self._bus = client()
        _tiny(self._memory, self._bus)

    def register(self) -> None:
        self._publication = self._bus.register_tensors("model", self._tensors)

    def close(self) -> None:
        self._publication.close()


class _Reader:
    def __init__(self, place: Place) -> None:
        self._memory = Memory(place)
        self._bus = client()
        self._kept: list[torch.Tensor] = []
        self._look(torch.ones(_PAGE, dtype=torch.bfloat16, device=place.device))

    def read(self) -> None:
        """Touch every page."""
        self._subscription = self._bus.subscribe("model")
        with self._subscription.read() as lease:
            for tensor in lease.values():
                self._look(tensor)

    def clone(self) -> None:
        with self._subscription.read() as lease:
            self._kept = [tensor.clone() for tensor in lease.values()]
        self._memory.wait()

    def close(self) -> None:
        self._kept.clear()
        if self._memory.on_device:
            torch.cuda.empty_cache()
        self._subscription.close()

    def _look(self, tensor: torch.Tensor) -> None:
        tensor.view(torch.int16).view(-1)[:: _PAGE // 2].max().item()


def _tiny(memory: Memory, bus: object) -> None:
    """One registration, for what a process takes once."""
    publication = bus.register_tensors("tiny", {"tiny": memory.shared((1,), torch.int64)})  # type: ignore[attr-defined]
    publication.close()
