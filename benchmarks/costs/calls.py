"""What the calls of a training step cost: publish, a lease, an update, and a command that is waited for."""

from __future__ import annotations

import itertools
import time
from typing import Final

from costs.bare import Other, Store
from costs.pairing import Run, clocked
from costs.processes import Box, Helper, Talk, client
from costs.row import Budget, Row, compare
from costs.spread import medians, slopes, spread
from costs.tensors import MIB, parameters

_PACE: Final = 1e-3
"""Seconds of rest before each sample, as in the design's "paced 1 ms"."""

_STORAGES: Final = (1, 100, 1000)
_BYTES: Final = (MIB, 1024 * MIB)


def publish(run: Run) -> list[Row]:
    """`Publication.publish` of one tensor."""
    with Box() as box, Other(answers=False) as other:
        store = Store(box.directory / "bare.lmdb")
        publication = client().register_tensors("policy", parameters(1))

        def bare() -> None:
            store.put()
            other.send()

        taken = run.interleave(
            {"etha": clocked(publication.publish), "floor": clocked(bare)}, rounds=20, turns=50, pause=_PACE, warm=20
        )
    return [
        compare(
            "publish",
            "publish(), one tensor",
            **taken,
            floor_is="LMDB put + send",
            budget=Budget("ratio", 2.5, "≤ 2.5 × LMDB put + send"),
        )
    ]


def publish_storages(run: Run) -> list[Row]:
    """How `publish` grows with the storages that it checks."""
    with Box():
        bus = client()
        sides = {
            str(count): clocked(bus.register_tensors(f"of {count}", parameters(count)).publish) for count in _STORAGES
        }
        taken = run.interleave(sides, rounds=20, turns=20, pause=_PACE, warm=20)
    found = slopes([(count, taken[str(count)]) for count in _STORAGES])
    return [
        Row(
            name="publish-storages",
            what="publish(), per storage more",
            etha=spread(found),
            floor_is="slope over 1, 100 and 1,000 storages",
            budget=Budget("value", 0.3e-6, "≤ 0.3 µs per storage"),
            samples=sum(map(len, taken["1"])),
            rounds=len(found),
            more={f"{count} storages, s": spread(medians(rounds)).median for count, rounds in taken.items()},
        )
    ]


def publish_bytes(run: Run) -> list[Row]:
    """Whether `publish` minds the bytes."""
    with Box():
        bus = client()
        small, large = _BYTES[0], run.pick(_BYTES[1], 16 * MIB)
        sides = {
            side: clocked(bus.register_tensors(side, parameters(1, nbytes)).publish)
            for side, nbytes in (("etha", large), ("floor", small))
        }
        taken = run.interleave(sides, rounds=20, turns=20, pause=_PACE, warm=20)
    return [
        compare(
            "publish-bytes",
            "publish(), 1 GiB",
            **taken,
            floor_is="publish(), 1 MiB",
            budget=Budget("even", 1.05, "the same whatever the bytes"),
        )
    ]


def lease(run: Run) -> list[Row]:
    """A lease taken and given back; and the giving back alone."""
    with Box(), Other(answers=True) as echo, Other(answers=False) as sink, Helper(_own) as owner:
        owner.hear()
        policy = client().subscribe("policy")

        def read_and_release() -> None:
            with policy.read():
                pass

        def release() -> float:
            held = policy.read()
            time.sleep(_PACE)
            return clocked(held.release)()

        sides = {
            "etha": clocked(read_and_release),
            "floor": clocked(echo.ping),
            "release": release,
            "send": clocked(sink.send),
        }
        taken = run.interleave(sides, rounds=20, turns=50, pause=_PACE, warm=20)
    return [
        compare(
            "lease",
            "a lease taken and released, paced 1 ms",
            etha=taken["etha"],
            floor=taken["floor"],
            floor_is="ping-pong through epoll",
            budget=Budget("ratio", 3.0, "≤ 3 × ping-pong"),
        ),
        compare(
            "release",
            "the release alone",
            etha=taken["release"],
            floor=taken["send"],
            floor_is="one send",
        ),
    ]


def update(run: Run) -> list[Row]:
    """An update that nobody stands in the way of: a claim that is granted, and a publish."""
    with Box() as box, Other(answers=True, store=box.directory / "theirs.lmdb") as echo, Other(answers=False) as sink:
        store = Store(box.directory / "ours.lmdb")
        publication = client().register_tensors("policy", parameters(1))

        def write() -> None:
            with publication.update():
                pass

        def bare() -> None:
            echo.ping()
            store.put()
            sink.send()

        taken = run.interleave(
            {"etha": clocked(write), "floor": clocked(bare)}, rounds=20, turns=50, pause=_PACE, warm=20
        )
    return [compare("update", "update() entered and left", **taken, floor_is="ping-pong with a put, put + send")]


def command(run: Run) -> list[Row]:
    """Commands that are waited for: a registration of one tensor, and its closing."""
    with Box() as box, Other(answers=True, store=box.directory / "theirs.lmdb") as echo:
        store = Store(box.directory / "ours.lmdb")
        bus = client()
        tensors = parameters(1)
        names = (f"number {number}" for number in itertools.count())

        def register() -> float:
            started = time.perf_counter_ns()
            publication = bus.register_tensors(next(names), tensors)
            took = time.perf_counter_ns() - started
            publication.close()
            return took * 1e-9

        def close() -> float:
            return clocked(bus.register_tensors(next(names), tensors).close)()

        def bare() -> None:
            store.put()
            echo.ping()

        taken = run.interleave(
            {"register": register, "close": close, "floor": clocked(bare)}, rounds=20, turns=25, pause=_PACE, warm=20
        )
    return [
        compare(
            f"command-{which}",
            what,
            etha=taken[which],
            floor=taken["floor"],
            floor_is="LMDB put + ping-pong + LMDB put",
            budget=Budget("ratio", 2.5, "≤ 2.5 × put + ping-pong + put"),
        )
        for which, what in (("register", "register_tensors() of one tensor"), ("close", "close()"))
    ]


def _own(talk: Talk) -> None:
    publication = client().register_tensors("policy", parameters(1))
    talk.say(publication.version)
    talk.hear()
