"""Causal attention in blocks of queries, so that most of what the causal mask hides is never computed.

MLX's CPU backend has no fused attention: it computes the whole (T, T) square of scores and hides half of it. A block of
queries sees only the keys up to its own end, so taking the queries in blocks leaves out all but a strip along the
diagonal. The sums are the same ones; only their grouping differs, in the last bits. On a GPU MLX's fused kernel does
this itself, and nothing is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

#: Queries a block. Narrower blocks compute less of the hidden half, in products that are less efficient.
BLOCK = 128

_NAME = "scaled_dot_product_attention"


def causal_attention(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float) -> mx.array:
    """Attention of every position to itself and all before it.

    Args:
        queries: (B, H, T, D).
        keys: (B, H_kv, T, D), with H a multiple of H_kv.
        values: Like keys.

    Returns:
        (B, H, T, D).
    """
    length = queries.shape[2]
    blocks = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        # With fewer queries than keys, "causal" aligns the last query with the last key.
        blocks.append(
            mx.fast.scaled_dot_product_attention(
                queries[:, :, start:end], keys[:, :, :end], values[:, :, :end], scale=scale, mask="causal"
            )
        )
    return mx.concatenate(blocks, axis=2) if len(blocks) > 1 else blocks[0]


@contextmanager
def in_blocks(model: nn.Module) -> Iterator[None]:
    """While open, the model's own attention modules attend in blocks where that is the same: causal, and no cache."""
    modules = {sys.modules[type(module).__module__] for _, module in model.named_modules()}
    originals = {module: getattr(module, _NAME) for module in modules if hasattr(module, _NAME)}
    for module, original in originals.items():
        setattr(module, _NAME, _blocked(original))
    try:
        yield
    finally:
        for module, original in originals.items():
            setattr(module, _NAME, original)


def _blocked(original: Any) -> Any:
    def attend(
        queries: mx.array, keys: mx.array, values: mx.array, cache: Any = None, *, scale: float, mask: Any, **more: Any
    ) -> mx.array:
        if cache is None and isinstance(mask, str) and mask == "causal" and not more and queries.shape[2] > BLOCK:
            return causal_attention(queries, keys, values, scale=scale)
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, **more)

    return attend
