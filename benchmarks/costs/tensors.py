"""What is registered: tensors in torch's shared memory, named as a model names them."""

from __future__ import annotations

import resource
from typing import Final, Literal

import torch
import torch.multiprocessing

Strategy = Literal["file_descriptor", "file_system"]

MIB: Final = 1 << 20

_PARTS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "input_norm", "post_norm")


def parameters(count: int, nbytes: int = 4096, strategy: Strategy = "file_descriptor") -> dict[str, torch.Tensor]:
    """``count`` fresh float32 tensors, each with a storage of its own in shared memory, every byte written.

    Args:
        count: how many.
        nbytes: bytes of each.
        strategy: torch's, which decides whether a descriptor is kept (``file_descriptor``) or a name.
    """
    raise_descriptor_limit()
    torch.multiprocessing.set_sharing_strategy(strategy)
    return {
        f"model.layers.{index // len(_PARTS)}.{_PARTS[index % len(_PARTS)]}.weight": torch.ones(
            nbytes // 4
        ).share_memory_()
        for index in range(count)
    }


def raise_descriptor_limit() -> None:
    """Torch keeps one descriptor for each shared storage; the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
