"""The trainer process: trains on the digits, and publishes every step.

``python -m etha.cli.demo.trainer --steps N``, started by `etha demo`, to which it reports.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from torch import nn

from etha.cli.demo import stamp, task
from etha.cli.demo.events import Placement, Registered, Trained
from etha.cli.demo.link import ParentLink
from etha.tensor_bus import bootstrap_client


class Training:
    """A network in shared memory and its optimizer, one batch at a time.

    The storages move to shared memory before the optimizer is made: an optimizer made earlier
    would be right too (parameters keep their identity), a view taken earlier would not.
    """

    def __init__(self, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self._digits = task.load()
        self.network = task.network()
        self.network.share_memory()
        self.weights = dict(self.network.named_parameters())
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=task.PEAK_LEARNING_RATE)
        # One more than there are steps: the scheduler counts the rate before the first as one.
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, task.PEAK_LEARNING_RATE, total_steps=steps + 1
        )

    def backward(self) -> None:
        """Forward and backward on the next batch: reads the weights, writes only gradients."""
        batch = torch.randint(len(self._digits.train_images), (task.BATCH,))
        self._optimizer.zero_grad()
        logits = self.network(self._digits.train_images[batch])
        loss = nn.functional.cross_entropy(logits, self._digits.train_labels[batch])
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Writes the weights."""
        self._optimizer.step()
        self._schedule.step()


def main() -> None:
    """Registers, waits for a word, trains, waits for a word, closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parent = ParentLink()
    training = Training(options.steps, options.seed)
    seal = stamp.blank(training.weights)
    stamp.seal(seal, training.weights, 0)
    published = {**training.weights, stamp.NAME: seal}

    client, _ = bootstrap_client()
    with client:
        policy = client.register_tensors(task.PUBLICATION, published)
        placements = tuple(Placement(name, t.data_ptr(), t.nbytes) for name, t in published.items())
        parent.tell(Registered(os.getpid(), placements))
        parent.wait_for_word()

        enter_us: list[float] = []
        publish_us: list[float] = []
        for version in range(1, options.steps + 1):
            training.backward()
            asked = time.perf_counter_ns()
            with policy.update(version):
                entered = time.perf_counter_ns()
                training.step()
                stamp.seal(seal, training.weights, version)
                left = time.perf_counter_ns()
            enter_us.append((entered - asked) / 1e3)
            publish_us.append((time.perf_counter_ns() - left) / 1e3)
        parent.tell(Trained(options.steps, tuple(enter_us), tuple(publish_us)))
        parent.wait_for_word()
        policy.close()


if __name__ == "__main__":
    main()
