"""The same hand-over by etha and by ``torch.multiprocessing``: 500 tensors of one process, in another's hands.

*Warm*: both processes have handed over before; the tensors are new, and lie in shared memory. *Cold*: both processes
are new, and the tensors are private: what moves them into shared memory counts. In both, the clock stops when the
sender hears that the receiver has the tensors.

In torch's way one `Connection` carries the pickled list, and torch's reductions open what it names. In etha's way the
sender registers, and the receiver subscribes.
"""

from __future__ import annotations

import itertools
import time
from multiprocessing.connection import Connection, Pipe
from typing import Final

import torch
import torch.multiprocessing

from costs.pairing import Run, Side
from costs.processes import Box, Helper, Talk, client
from costs.row import Budget, Row, compare
from costs.tensors import Strategy, parameters, raise_descriptor_limit

COUNT: Final = 500
_PRIVATE_BYTES: Final = 4096


def register_beside_torch(run: Run) -> list[Row]:
    """`register_tensors` of 500 tensors, beside torch's hand-over of the like."""
    count = run.pick(COUNT, 20)
    with Box(), _TorchReceiver("file_system") as receiver:
        bus = client()
        names = (f"number {number}" for number in itertools.count())

        def register(strategy: Strategy) -> Side:
            def side() -> float:
                tensors = parameters(count, strategy=strategy)
                started = time.perf_counter_ns()
                publication = bus.register_tensors(next(names), tensors)
                took = time.perf_counter_ns() - started
                publication.close()
                return took * 1e-9

            return side

        def hand_over() -> float:
            return receiver.hand_over(list(parameters(count, strategy="file_system").values()))

        taken = run.interleave(
            {"named": register("file_system"), "torch": hand_over, "kept": register("file_descriptor")},
            rounds=30,
            warm=3,
        )
    more = {"tensors": float(count)}
    return [
        compare(
            f"register-500-{which}",
            f"register_tensors() of 500, {strategy}",
            etha=taken[which],
            floor=taken["torch"],
            floor_is="torch.multiprocessing, file_system, warm",
            budget=Budget("ratio", 0.5, "≤ 0.5 × torch.multiprocessing"),
            more=more,
        )
        for which, strategy in (("named", "file_system"), ("kept", "file_descriptor"))
    ]


def warm(run: Run) -> list[Row]:
    """Register and subscribe, in both sharing strategies, beside torch's hand-over."""
    return [_warm(run, strategy) for strategy in _STRATEGIES]


def cold(run: Run) -> list[Row]:
    """The first hand-over of two new processes, in both sharing strategies."""
    return [_cold(run, strategy) for strategy in _STRATEGIES]


def _warm(run: Run, strategy: Strategy) -> Row:
    count = run.pick(COUNT, 20)
    with Box(), _TorchReceiver(strategy) as receiver, Helper(_subscribe_again) as reader:
        reader.hear()
        bus = client()
        names = (f"number {number}" for number in itertools.count())

        def etha() -> float:
            tensors, name = parameters(count, strategy=strategy), next(names)
            started = time.perf_counter_ns()
            publication = bus.register_tensors(name, tensors)
            reader.ask(name)
            took = time.perf_counter_ns() - started
            reader.ask(None)
            publication.close()
            return took * 1e-9

        def bare() -> float:
            return receiver.hand_over(list(parameters(count, strategy=strategy).values()))

        taken = run.interleave({"etha": etha, "floor": bare}, rounds=20, warm=2)
    return _compared("warm", strategy, taken)


def _cold(run: Run, strategy: Strategy) -> Row:
    count = run.pick(COUNT, 20)
    with Box():

        def etha() -> float:
            with Helper(_subscribe_once) as reader, Helper(_register_once, count, strategy) as owner:
                return _both(owner, reader)

        def bare() -> float:
            ours, theirs = Pipe()
            with (
                ours,
                theirs,
                Helper(_receive_once, theirs, ours) as reader,
                Helper(_send_once, ours, theirs, count, strategy) as owner,
            ):
                return _both(owner, reader)

        taken = run.interleave({"etha": etha, "floor": bare}, rounds=10, warm=1)
    return _compared("cold", strategy, taken)


def _compared(state: str, strategy: Strategy, taken: dict[str, list[list[float]]]) -> Row:
    return compare(
        f"handover-{state}-{strategy}",
        f"500 tensors handed over, {strategy}, {state}",
        **taken,
        floor_is="torch.multiprocessing, the same",
    )


_STRATEGIES: Final[tuple[Strategy, ...]] = ("file_descriptor", "file_system")


def _both(owner: Helper, reader: Helper) -> float:
    """Seconds from the owner's word to go until the reader has the tensors."""
    owner.hear()
    reader.hear()
    started = time.perf_counter_ns()
    owner.talk.say("go")
    reader.talk.say("go")
    reader.hear()
    took = time.perf_counter_ns() - started
    owner.hear()
    return took * 1e-9


def _private(count: int) -> dict[str, torch.Tensor]:
    return {f"tensor {number}": torch.ones(_PRIVATE_BYTES // 4) for number in range(count)}


def _register_once(talk: Talk, count: int, strategy: Strategy) -> None:
    raise_descriptor_limit()
    torch.multiprocessing.set_sharing_strategy(strategy)
    tensors = _private(count)
    talk.say("ready")
    talk.hear()
    for tensor in tensors.values():
        tensor.share_memory_()
    publication = client().register_tensors("policy", tensors)
    talk.say(publication.version)
    talk.hear()


def _subscribe_once(talk: Talk) -> None:
    talk.say("ready")
    talk.hear()
    subscription = client().subscribe("policy", timeout=60)
    talk.say(subscription.generation)
    talk.hear()


def _subscribe_again(talk: Talk) -> None:
    raise_descriptor_limit()
    bus = client()
    talk.say("ready")
    while True:
        subscription = bus.subscribe(talk.hear())
        talk.say(subscription.generation)
        talk.hear()
        subscription.close()
        talk.say("closed")


def _send_once(talk: Talk, ours: Connection, theirs: Connection, count: int, strategy: Strategy) -> None:
    theirs.close()
    raise_descriptor_limit()
    torch.multiprocessing.set_sharing_strategy(strategy)
    tensors = list(_private(count).values())
    talk.say("ready")
    talk.hear()
    ours.send(tensors)
    talk.say("sent")
    talk.hear()


def _receive_once(talk: Talk, theirs: Connection, ours: Connection) -> None:
    ours.close()
    raise_descriptor_limit()
    talk.say("ready")
    talk.hear()
    tensors = theirs.recv()
    talk.say(len(tensors))
    talk.hear()


class _TorchReceiver:
    """Another process that takes whatever comes by torch's reductions."""

    def __init__(self, strategy: Strategy) -> None:
        self._ours, theirs = Pipe()
        self._helper = Helper(_receive_again, theirs, self._ours, strategy)
        theirs.close()

    def hand_over(self, tensors: list[torch.Tensor]) -> float:
        """Seconds until the receiver says that it has them."""
        started = time.perf_counter_ns()
        self._ours.send(tensors)
        self._ours.recv_bytes()
        took = time.perf_counter_ns() - started
        self._ours.recv_bytes()  # it has dropped them
        return took * 1e-9

    def __enter__(self) -> _TorchReceiver:
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()
        self._helper.close()


def _receive_again(talk: Talk, theirs: Connection, ours: Connection, strategy: Strategy) -> None:
    ours.close()
    raise_descriptor_limit()
    torch.multiprocessing.set_sharing_strategy(strategy)
    while True:
        tensors = theirs.recv()
        theirs.send_bytes(b"here")
        del tensors
        theirs.send_bytes(b"dropped")
