"""The arithmetic of training, counted: a multiplication and an addition are two.

With P the weights of a layer's matrices, L layers of which the last K are trained, r the adapter's rank, A the width of
attention (heads × their size), D that of the hidden state and V the vocabulary, a row of n tokens, m of which carry
loss, takes

    forward    2·P·n in each of L layers, and 2·A·n·(n + 1) for its causal attention (scores and their use)
    backward   as much again in each of K layers for the gradient of what enters them, twice that for attention;
               the frozen weights need none
    adapter    6·n·r·Σ(in + out) in each of K layers: forward, and backward to its input and to itself
    head       4·D·V·m: forward and back to the hidden state, at the positions that carry loss

Padding, recomputation, logits where there is no loss, norms and activations are not counted. The L − K layers below
the trained ones give the same in every epoch: they are counted once for who keeps that, else once an epoch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _bench.workload import RANK


@dataclass(frozen=True)
class Shape:
    """Of a Llama or Qwen2 model.

    Attributes:
        matrices: (in, out) of each of a layer's matrices.
        attention: Heads × their size.
    """

    matrices: tuple[tuple[int, int], ...]
    layers: int
    attention: int
    hidden: int
    vocabulary: int


def read_shape(model: Path) -> Shape:
    """From a model's config.json."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    queries, keys = heads * size, (config.get("num_key_value_heads") or heads) * size
    matrices = (
        *((hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)),
        *((hidden, inner), (hidden, inner), (inner, hidden)),
    )
    return Shape(matrices, config["num_hidden_layers"], queries, hidden, config["vocab_size"])


def training_flops(
    shape: Shape, rows: Sequence[tuple[int, int]], *, epochs: int, trained: int, keeps_frozen: bool
) -> float:
    """Of a whole training.

    Args:
        rows: Tokens, and tokens that carry loss, of each row.
        trained: Layers with an adapter.
        keeps_frozen: Whether what the layers below give is computed once and kept.
    """
    frozen = shape.layers - trained
    weights = sum(first * second for first, second in shape.matrices)
    adapter = RANK * sum(first + second for first, second in shape.matrices)
    once, every = 0.0, 0.0
    for n, m in rows:
        products, attention = 2 * weights * n, 2 * shape.attention * n * (n + 1)
        once += frozen * (products + attention)
        every += trained * (2 * products + 3 * attention + 6 * adapter * n) + 4 * shape.hidden * shape.vocabulary * m
    return every * epochs + once * (1 if keeps_frozen else epochs)
