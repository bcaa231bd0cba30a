"""The parameters of an 8-billion-parameter model, by the configuration that Llama 3.1 8B has published.

291 tensors, 8.03 billion parameters, 16.06 GB in bfloat16: hidden size 4096, 32 layers, 32 heads of 128, 8 of them for
keys and values, intermediate size 14336, 128256 words, embedding and head not tied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

NAME: Final = "Llama 3.1 8B"
ITEMSIZE: Final = 2
"""Of bfloat16."""

_HIDDEN, _LAYERS, _KEYS, _INTERMEDIATE, _WORDS = 4096, 32, 8 * 128, 14336, 128256

_LAYER: Final = (
    ("input_layernorm", (_HIDDEN,)),
    ("self_attn.q_proj", (_HIDDEN, _HIDDEN)),
    ("self_attn.k_proj", (_KEYS, _HIDDEN)),
    ("self_attn.v_proj", (_KEYS, _HIDDEN)),
    ("self_attn.o_proj", (_HIDDEN, _HIDDEN)),
    ("post_attention_layernorm", (_HIDDEN,)),
    ("mlp.gate_proj", (_INTERMEDIATE, _HIDDEN)),
    ("mlp.up_proj", (_INTERMEDIATE, _HIDDEN)),
    ("mlp.down_proj", (_HIDDEN, _INTERMEDIATE)),
)


def shapes(scale: float = 1.0) -> dict[str, tuple[int, ...]]:
    """Name to shape.

    Args:
        scale: the share of each matrix's rows, as one of ``1 / scale`` tensor-parallel ranks has. The number of tensors
            stays: a step's costs beside its bytes hang on that.
    """
    return {name: _scaled(shape, scale) for name, shape in _all()}


def nbytes(scale: float = 1.0) -> int:
    """Of the whole list."""
    return sum(math.prod(shape) * ITEMSIZE for shape in shapes(scale).values())


def _all() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (_WORDS, _HIDDEN)
    for layer in range(_LAYERS):
        for part, shape in _LAYER:
            yield f"model.layers.{layer}.{part}.weight", shape
    yield "model.norm.weight", (_HIDDEN,)
    yield "lm_head.weight", (_WORDS, _HIDDEN)


def _scaled(shape: tuple[int, ...], scale: float) -> tuple[int, ...]:
    return shape if len(shape) == 1 else (max(1, round(shape[0] * scale)), *shape[1:])
