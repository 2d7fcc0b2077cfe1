"""Causal attention on a CPU in blocks of queries, forwards and backwards, so that most of what the mask hides is never
computed.

MLX's CPU backend has no fused attention: it computes the whole (T, T) square of scores and hides half of it. A block of
queries sees only the keys up to its own end, so taking the queries in blocks leaves out all but a strip along the
diagonal. The forward pass keeps the output and each query's log-sum; the backward pass makes a block's weights again
from them, so that no more than one block's scores exist at once, as in FlashAttention (Dao et al., 2022,
arXiv:2205.14135). Query heads that share a key head are multiplied as one matrix.

Shapes: queries (B, K, G, T, D), G heads for each of K key heads, scaled; keys and values (B, K, T, D). All float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_distill.backends.mlx.cpu_kernels import (
    Floats,
    exponentials,
    memory_of,
    normalised_exponentials,
    rows_of,
    softmax_gradient,
)

#: Queries a block. Narrower blocks compute less of the hidden half, in products that are less efficient.
BLOCK = 128


def attend(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """Attention of every position to itself and all before it.

    Returns:
        The output (B, K, G, T, D) and the log-sums of the scores (B, K, G, T, 1).
    """
    outs, log_sums = [], []
    for block in _blocks(queries):
        weights = _scores(queries, keys, block)
        tops, sums = exponentials(rows_of(weights))
        shape = (*weights.shape[:-1], 1)
        outs.append(_apart(weights @ values[:, :, : block.stop] / mx.array(sums).reshape(shape), queries))
        log_sums.append(_apart(mx.array(tops + np.log(sums)).reshape(shape), queries))
        mx.eval(outs[-1])
    return mx.concatenate(outs, axis=3), mx.concatenate(log_sums, axis=3)


def attend_gradient(
    queries: mx.array, keys: mx.array, values: mx.array, out: mx.array, log_sums: mx.array, gradient: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The gradients of queries, keys and values.

    Args:
        out: What `attend` gave, with `log_sums`.
        gradient: Of `out`.
    """
    inner = (gradient * out).sum(axis=-1, keepdims=True)
    to_queries = []
    to_keys, to_values = mx.zeros_like(keys), mx.zeros_like(values)
    for block in _blocks(queries):
        weights = _scores(queries, keys, block)
        normalised_exponentials(rows_of(weights), _column(log_sums, block))
        arriving = _together(gradient, block)
        through = arriving @ values[:, :, : block.stop].swapaxes(-1, -2)
        softmax_gradient(rows_of(weights), rows_of(through), _column(inner, block))
        _add_to(to_values, weights.swapaxes(-1, -2) @ arriving)
        _add_to(to_keys, through.swapaxes(-1, -2) @ _together(queries, block))
        to_queries.append(_apart(through @ keys[:, :, : block.stop], queries))
        mx.eval(to_queries[-1])
    return mx.concatenate(to_queries, axis=3), to_keys, to_values


def _blocks(queries: mx.array) -> Iterator[slice]:
    length = queries.shape[3]
    for start in range(0, length, BLOCK):
        yield slice(start, min(start + BLOCK, length))


def _together(array: mx.array, block: slice) -> mx.array:
    """A block of positions of (B, K, G, T, D), the heads of a group one below the other: (B, K, G·n, D)."""
    part = array[:, :, :, block]
    return part.reshape(*part.shape[:2], -1, part.shape[-1])


def _apart(array: mx.array, like: mx.array) -> mx.array:
    """The reverse of `_together`: (B, K, G·n, D) → (B, K, G, n, D)."""
    return array.reshape(*like.shape[:3], -1, array.shape[-1])


def _column(array: mx.array, block: slice) -> Floats:
    return rows_of(mx.contiguous(_together(array, block)))


def _scores(queries: mx.array, keys: mx.array, block: slice) -> mx.array:
    """Scores of a block of queries for all keys up to its end, (B, K, G·n, end); -inf where a key is later."""
    scores = _together(queries, block) @ keys[:, :, : block.stop].swapaxes(-1, -2)
    size = block.stop - block.start
    diagonal = memory_of(scores).reshape(-1, size, block.stop)[:, :, block.start :]
    diagonal += np.triu(np.full((size, size), -np.inf, np.float32), k=1)
    return scores


def _add_to(total: mx.array, part: mx.array) -> None:
    """Add to the first positions of (B, K, T, D), in place."""
    memory_of(total)[:, :, : part.shape[2]] += memory_of(part)
