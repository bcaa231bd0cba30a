"""One hostile record after another against the codecs and `validate`, alone in this process, each with its price.

A case is a seed and a number, and needs nothing else.
"""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Final

import msgspec
from hostile import STRANGER, bytes_of, damaged, maker, unbounded_manifest
from samples import CASES, STATE

from etha.errors import EthaError
from etha.tensor_bus import commands, packets
from etha.tensor_bus.ipc.manifest import Manifest, validate
from etha.tensor_bus.records import Codec, encode

SECONDS: Final = 0.1
"""The longest that a case may take of the processor."""

USUAL_SECONDS: Final = 1e-3
"""What 999 cases of a thousand may take."""

MEMORY: Final = 1 << 20
PER_BYTE: Final = 40
"""Bytes that a case may take at its peak: a packet so many, a record so many or so many times its own length, for
Python's objects are some thirty times as long as the shortest record that declares them."""

SAMPLED: Final = 64
"""One case in so many is weighed, and every one that is long."""

LONG: Final = 1 << 13

CORPUS: Final = tuple((codec, encode(record)) for codec, record in CASES)
WHOLES: Final = tuple(data for _, data in CORPUS)
_OF_PACKETS: Final = (packets.FROM_WORKER, packets.FROM_AGENT)
MAKERS: Final = (
    *((commands.CODEC, maker(commands.Command)),) * 3,
    *((packets.FROM_WORKER, maker(packets.FromWorker)),) * 3,
    (packets.FROM_AGENT, maker(packets.FromAgent)),
    *((Codec(type(record)), maker(type(record))) for record in STATE),
)


@dataclass
class Case:
    """One hostile record.

    Attributes:
        kind: how it was made.
        data: its bytes; empty for a manifest that was never bytes.
        judge: what is asked to judge it; it accepts it, or raises `EthaError`.
        packet: whether it crosses the connection.
    """

    kind: str
    data: bytes
    judge: Callable[[], object]
    packet: bool = False

    @property
    def memory(self) -> int:
        """Bytes that it may take at its peak."""
        return MEMORY if self.packet else max(MEMORY, PER_BYTE * len(self.data))


@dataclass
class Toll:
    """What a run of cases cost.

    Attributes:
        count: cases.
        accepted: how many of each kind were taken for sound.
        made: how many there were of each kind.
        slow: how many took longer than `USUAL_SECONDS`.
        longest: seconds of processor time, and the number of the case.
        heaviest: bytes at its peak, and the number of the case, of those that were weighed.
        weighed: how many were.
        failed: number and error of the cases that broke a promise.
    """

    count: int = 0
    accepted: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    slow: int = 0
    longest: tuple[float, int] = (0.0, -1)
    heaviest: tuple[int, int] = (0, -1)
    weighed: int = 0
    failed: list[tuple[int, str]] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.count} cases, {dict(self.made)}, of which accepted {dict(self.accepted)}; {self.slow} took over"
            f" {USUAL_SECONDS * 1e3:.0f} ms, the longest {self.longest[0] * 1e3:.2f} ms (number {self.longest[1]}); of"
            f" {self.weighed} weighed, the heaviest {self.heaviest[0] / 1024:.0f} KiB (number {self.heaviest[1]})"
        )


def case(seed: int, number: int, source: Random | None = None) -> Case:
    """The case of this seed and number, always the same; ``source`` saves making one."""
    source = source or Random()
    source.seed(seed << 32 | number)
    draw = source.random()
    if draw < 0.75:
        codec, whole = CORPUS[int(source.random() * len(CORPUS))]
        data = damaged(whole, source, WHOLES)
        return Case("damaged", data, lambda: _decode(codec, data), codec in _OF_PACKETS)
    if draw < 0.9:
        codec, make = MAKERS[int(source.random() * len(MAKERS))]
        record = make(source, STRANGER)
        if not isinstance(record, msgspec.Struct):
            raise TypeError(f"{record!r:.80} is no record")
        data = bytes_of(record)
        if draw < 0.8:
            data = damaged(data, source, WHOLES)
        return Case("structured", data, lambda: _decode(codec, data), codec in _OF_PACKETS)
    manifest = unbounded_manifest(source)
    return Case("manifest", b"", lambda: validate(manifest))


def _decode(codec: Codec[msgspec.Struct], data: bytes) -> None:
    record = codec.decode(data)
    shared = getattr(record, "manifest", None)
    if isinstance(shared, Manifest):
        validate(shared)


def run(seed: int, numbers: range) -> Toll:
    """Run cases, and what they cost. Only a mistake of this file's own raises."""
    toll, source, clock = Toll(), Random(), time.thread_time
    for number in numbers:
        found = case(seed, number, source)
        began = clock()
        try:
            found.judge()
            toll.accepted[found.kind] += 1
        except EthaError:
            pass
        except BaseException as error:
            toll.failed.append((number, f"{found.kind}: {error!r:.300}"))
        took = clock() - began
        toll.slow += took > USUAL_SECONDS
        toll.longest = max(toll.longest, (took, number))
        if took > SECONDS:
            toll.failed.append((number, f"{found.kind}: {took:.3f} s"))
        if number % SAMPLED == 0 or len(found.data) > LONG:
            peak = _weight(found)
            toll.weighed += 1
            toll.heaviest = max(toll.heaviest, (peak, number))
            if peak > found.memory:
                toll.failed.append((number, f"{found.kind}: {peak} bytes for a record of {len(found.data)}"))
        toll.made[found.kind] += 1
    toll.count = len(numbers)
    return toll


def _weight(found: Case) -> int:
    """Bytes that the case takes at its peak, judged once more: tracemalloc makes it three times as slow."""
    tracemalloc.start()
    try:
        found.judge()
    except Exception:  # it was said already
        return tracemalloc.get_traced_memory()[1]
    else:
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
