"""How long from `publish` until the reader's work has read that version, its owner idle and busy.

The owner writes the version's number into the tensor, takes the time, and publishes. The reader waits in `read`, has
its work copy the number out, and takes the time when that has arrived with the host. On a device that work is queued
behind the fence, and the owner's before it. Clocks are the same for both processes.
"""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack
from typing import Final

import torch
from costs.pairing import Run, Side
from costs.processes import Box, client
from costs.row import Row, compare

from bandwidths import games
from bandwidths.actors import Actor, now
from bandwidths.memory import Memory
from bandwidths.place import Place

_PACE: Final = 2e-3
"""Seconds for the reader to begin to wait, before the owner publishes."""

_WHAT: Final = "publish() until the reader has read that version"


def stamps(place: Place, run: Run) -> list[Row]:
    """Idle and busy, each beside the ping-pong in the same state."""
    with ExitStack() as stack:
        stack.enter_context(Box(place.device))
        fd = -1 if place.kind == "host" else games.slots()
        owner = stack.enter_context(Actor(_Owner, place, fd))
        reader = stack.enter_context(Actor(_Reader, place, fd))
        versions, values = itertools.count(1), itertools.count(1, games.ROUNDS)

        def stamp() -> float:
            version = next(versions)
            reader.say("read", version)
            time.sleep(_PACE)
            published = owner.call("publish", version)
            return (reader.hear() - published) * 1e-9

        def play() -> float:
            value = next(values)
            if place.kind == "host":
                return float(owner.call("play", value))
            reader.say("play", value)
            seconds: float = owner.call("play", value)
            reader.hear()
            return seconds

        def busy(side: Side) -> Side:
            def loaded() -> float:
                owner.call("start")
                seconds = side()
                owner.call("stop")
                return seconds

            return loaded

        sides = {"stamp-idle": stamp, "play-idle": play, "stamp-busy": busy(stamp), "play-busy": busy(play)}
        taken = run.interleave(sides, rounds=10, turns=5, pause=1e-3, warm=5)
    floor_is = "ping-pong through epoll" if place.kind == "host" else "the device's own ping-pong"
    return [
        compare(
            f"stamp-{load}-{place.kind}",
            f"{_WHAT}, owner {load} ({place.kind})",
            etha=taken[f"stamp-{load}"],
            floor=taken[f"play-{load}"],
            floor_is=f"{floor_is}, {load}",
        )
        for load in ("idle", "busy")
    ]


def _player(place: Place, fd: int, mine: int) -> games.Player | games.HostPlayer:
    return games.HostPlayer() if place.kind == "host" else games.Player(fd, mine)


class _Owner:
    def __init__(self, place: Place, fd: int) -> None:
        self._player = _player(place, fd, games.SERVE)
        self._memory = Memory(place)
        self._stamp = self._memory.shared((1,), torch.int64, 0)
        self._memory.wait()
        self._publication = client().register_tensors("stamp", {"stamp": self._stamp})

    def publish(self, version: int) -> int:
        """The moment before the publish."""
        self._stamp.fill_(version)
        moment = now()
        self._publication.publish(version)
        return moment

    def play(self, first: int) -> float:
        return self._player.play(first)

    def start(self) -> None:
        self._player.start()

    def stop(self) -> None:
        self._player.stop()


class _Reader:
    def __init__(self, place: Place, fd: int) -> None:
        self._memory = Memory(place)
        self._player = None if place.kind == "host" else _player(place, fd, games.RETURN)
        self._subscription = client().subscribe("stamp")
        self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=self._memory.on_device)

    def read(self, version: int) -> int:
        """The moment when the version's number was there."""
        with self._subscription.read(min_version=version) as lease:
            self._seen.copy_(lease["stamp"], non_blocking=True)
            self._memory.wait()
            moment = now()
        if self._seen.item() != version:
            raise RuntimeError(f"version {version} was leased, and {self._seen.item()} was read")
        return moment

    def play(self, first: int) -> float:
        return 0.0 if self._player is None else self._player.play(first)
