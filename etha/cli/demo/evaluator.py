"""The evaluator process: measures test accuracy with the trainer's own memory, version by version.

``python -m etha.cli.demo.evaluator --steps N [--sabotage]``, started by `etha demo`, to which it
reports. Its network lies on the meta device: it has no weights that could be used by mistake.

With ``--sabotage`` it does what etha's contract forbids: it keeps the tensors of its first lease
after the lease has ended, and goes on reading them while the trainer writes. Nothing stops it (the
bytes are the trainer's); the stamps show what comes of it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from typing import Final

import torch

from etha.cli.demo import stamp, task
from etha.cli.demo.events import Finished, Mapped, Placement, Read, Ready
from etha.cli.demo.link import ParentLink
from etha.tensor_bus import Subscription, bootstrap_client

_VERSIONS_A_MEASURE: Final = 10
"""Of a sabotaged run."""


class Evaluation:
    """Checks and evaluates one set of tensors after the other, and reports each."""

    def __init__(self, parent: ParentLink) -> None:
        self._parent = parent
        self._digits = task.load()
        self._shell = task.empty_network()
        self._placements: tuple[Placement, ...] = ()
        self._torn = 0
        self._reads = 0
        self.versions: set[int] = set()

    def place(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Tells the parent where the tensors lie, if that is new, and lets it look."""
        placements = tuple(Placement(name, t.data_ptr(), t.nbytes) for name, t in sorted(tensors.items()))
        if placements != self._placements:
            self._placements = placements
            self._parent.tell(Mapped(os.getpid(), placements))
            self.wait_for_word()

    def wait_for_word(self) -> None:
        """Until the parent lets it go on."""
        self._parent.wait_for_word()

    def check(self, tensors: Mapping[str, torch.Tensor], leased: int | None) -> stamp.Verdict:
        """Recomputes every stamp from the bytes in place."""
        verdict = stamp.check(tensors[stamp.NAME], _weights(tensors), leased)
        self._reads += 1
        self._torn += verdict.torn
        if not verdict.torn:
            self.versions.add(verdict.version)
        return verdict

    def measure(self, tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """Computes the accuracy with the bytes in place, and reports it."""
        accuracy = task.accuracy(self._shell, _weights(tensors), self._digits)
        self._parent.tell(Read(version, accuracy, self._torn, self._reads))


def _weights(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != stamp.NAME}


def read_with_leases(subscription: Subscription, evaluation: Evaluation) -> tuple[float, ...]:
    """Reads each newest version under its lease until the owner closes; the read times, in µs.

    A read time runs from the moment when the version was both written and asked for: waiting for
    a version that does not exist yet is the trainer's time, and evaluating the one before is ours.
    """
    times: list[float] = []
    asked = time.monotonic_ns()
    for weights in subscription:
        held = time.monotonic_ns()
        first = not evaluation.versions
        evaluation.place(weights)
        verdict = evaluation.check(weights, weights.version)
        evaluation.measure(weights, weights.version)
        if not first and not verdict.torn:
            times.append((held - max(asked, verdict.sealed_ns)) / 1e3)
        asked = time.monotonic_ns()
    return tuple(times)


def read_without_leases(subscription: Subscription, evaluation: Evaluation, last: int) -> None:
    """Sabotage: keeps the tensors of a lease that has ended, and reads them until the last version.

    The stamps are read again and again; the accuracy, which takes longer than a training step and
    would leave most writes unseen, only now and then, where a version was found whole.
    """
    with subscription.read() as lease:
        kept = dict(lease)
        evaluation.place(kept)
    measured = -_VERSIONS_A_MEASURE
    while measured != last:
        verdict = evaluation.check(kept, None)
        due = verdict.version == last or verdict.version >= measured + _VERSIONS_A_MEASURE
        if due and not verdict.torn:
            measured = verdict.version
            evaluation.measure(kept, measured)
    # The parent measures memory a last time, while all is mapped.
    evaluation.wait_for_word()


def main() -> None:
    """Loads, waits for a word, subscribes, reads to the end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--sabotage", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parent = ParentLink()
    evaluation = Evaluation(parent)

    client, _ = bootstrap_client()
    with client:
        parent.tell(Ready(os.getpid()))
        parent.wait_for_word()
        subscription = client.subscribe(task.PUBLICATION)
        read_us: tuple[float, ...] = ()
        if options.sabotage:
            read_without_leases(subscription, evaluation, options.steps)
        else:
            read_us = read_with_leases(subscription, evaluation)
        parent.tell(Finished(len(evaluation.versions), read_us))


if __name__ == "__main__":
    main()
