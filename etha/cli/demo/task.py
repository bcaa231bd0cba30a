"""The task: handwritten digits, and a small convolutional network that learns them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

PUBLICATION: Final = "digits"
BATCH: Final = 64
PEAK_LEARNING_RATE: Final = 4e-3

_SPLIT_SEED: Final = 0
_TEST_SHARE: Final = 5
"""One image in five is kept for the test."""


@dataclass(frozen=True)
class Digits:
    """Images are float32 (n, 1, 8, 8) in 0 to 1, labels int64 (n,)."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load() -> Digits:
    """The 1,797 digits that scikit-learn ships, split 80/20, the same in every process and run."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    targets = torch.as_tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    test, train = order[: len(order) // _TEST_SHARE], order[len(order) // _TEST_SHARE :]
    return Digits(images[train], targets[train], images[test], targets[test])


def network() -> nn.Module:
    """A network of 298,276 float32 parameters: 1.2 MB."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 270),
        nn.ReLU(),
        nn.Linear(270, 10),
    )


def empty_network() -> nn.Module:
    """The same network with no memory under its parameters: it can only borrow."""
    with torch.device("meta"):
        return network().eval()


@torch.no_grad()
def accuracy(shell: nn.Module, weights: Mapping[str, torch.Tensor], digits: Digits) -> float:
    """Test accuracy of ``shell`` computed with ``weights``, where they lie."""
    logits = functional_call(shell, dict(weights), (digits.test_images,))
    return float((logits.argmax(1) == digits.test_labels).double().mean())
