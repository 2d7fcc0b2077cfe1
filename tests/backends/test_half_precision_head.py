"""The head's gradient in half precision: as exact where a token is nearly certain as where it is not.

What leaves the head is a difference of two sums that are nearly the same: the target's weights, and those of all words
by their probability. Rounded before it is taken, it is lost: at p = 0.999 the rounding of bfloat16 is as large as it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_distill.backends.mlx.head import Head, eager_loss, fused_loss, plain_loss

WIDTH, WORDS, POSITIONS = 64, 300, 23

Doubles = NDArray[np.float64]

HALVES = [mx.bfloat16, mx.float16]

MODULES: dict[str, Callable[[], nn.Module]] = {
    "tied": lambda: nn.Embedding(WORDS, WIDTH),
    "untied": lambda: nn.Linear(WIDTH, WORDS, bias=False),
    "biased": lambda: nn.Linear(WIDTH, WORDS),
}


def doubles(array: mx.array) -> Doubles:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def half_head(kind: str, dtype: mx.Dtype, bits: int | None) -> tuple[Head, Doubles]:
    """A head and the weights that it stands for."""
    mx.random.seed(7)
    module = MODULES[kind]()
    module.set_dtype(dtype)
    if bits is None:
        return Head(module), doubles(module.weight)
    module = module.to_quantized(group_size=32, bits=bits)
    return Head(module), doubles(mx.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=bits))


def softmax(logits: Doubles) -> Doubles:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def confident(head: Head, weights: Doubles, p: float, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Hidden states along the weights of their targets, just as long as gives these the probability p."""
    targets = np.random.default_rng(3).integers(0, WORDS, POSITIONS)
    along = weights[targets] / np.linalg.norm(weights[targets], axis=-1, keepdims=True)
    low, high = np.zeros((POSITIONS, 1)), np.full((POSITIONS, 1), 200.0)
    for _ in range(40):
        middle = (low + high) / 2
        found = softmax((middle * along) @ weights.T)[np.arange(POSITIONS), targets][:, None]
        low, high = np.where(found < p, middle, low), np.where(found < p, high, middle)
    return mx.array((low * along).astype(np.float32)).astype(dtype), mx.array(targets.astype(np.int32))


def reference(head: Head, weights: Doubles, hidden: mx.array, targets: mx.array) -> tuple[Doubles, Doubles, Doubles]:
    """The gradient by the formula in float64 from the head's own logits; the norms of what is summed; probabilities."""
    lines, words = np.arange(len(targets)), np.array(targets)
    slopes = softmax(doubles(head.logits(hidden)))
    found = slopes[lines, words].copy()
    # Not one less the probability: what is left of that has lost digits even here.
    slopes[lines, words] = 0
    slopes[lines, words] = -slopes.sum(axis=-1)
    return slopes @ weights, np.abs(slopes) @ np.linalg.norm(weights, axis=-1), found


def fused(head: Head, hidden: mx.array, targets: mx.array) -> mx.array:
    gradient: mx.array = mx.grad(lambda h: fused_loss(head, h, targets, chunk=7)[0])(hidden)
    return gradient


def eager(head: Head, hidden: mx.array, targets: mx.array) -> mx.array:
    gradient = eager_loss(head, hidden, targets, with_gradient=True, chunk=7)[2]
    assert gradient is not None
    return gradient


def bound(dtype: mx.Dtype, exact: Doubles, summed: Doubles) -> Doubles:
    """How far the gradient of a position may be off.

    Each of the slopes is rounded before the product, and the product twice: when it is made, and as the gradient of a
    hidden state of its type. Below 2⁻¹⁴ float16's steps no longer shrink.
    """
    unit = mx.finfo(dtype).eps / 2
    steps = np.sqrt(WIDTH) * 2.0**-25 if dtype == mx.float16 else 0.0
    return np.asarray(unit * (summed + 2 * np.linalg.norm(exact, axis=-1)) * 1.01 + steps)


@pytest.mark.parametrize("way", [fused, eager])
@pytest.mark.parametrize("p", [0.5, 0.99, 0.999])
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", MODULES)
def test_no_more_is_lost_than_rounding_explains(
    kind: str, dtype: mx.Dtype, bits: int | None, p: float, way: Callable[[Head, mx.array, mx.array], mx.array]
) -> None:
    head, weights = half_head(kind, dtype, bits)
    hidden, targets = confident(head, weights, p, dtype)
    exact, summed, found = reference(head, weights, hidden, targets)
    assert np.all(np.abs(np.log(1 - found) - np.log(1 - p)) < 0.5), "it is as certain as was asked for"
    off = np.linalg.norm(doubles(way(head, hidden, targets)) - exact, axis=-1)
    assert (off <= bound(dtype, exact, summed)).all()
    # Which is little of it, however small it is.
    assert (off <= 0.03 * np.linalg.norm(exact, axis=-1)).all()


@pytest.mark.parametrize("way", [fused, eager])
@pytest.mark.parametrize("kind", MODULES)
def test_in_float32_next_to_nothing_is_lost(kind: str, way: Callable[[Head, mx.array, mx.array], mx.array]) -> None:
    head, weights = half_head(kind, mx.float32, None)
    hidden, targets = confident(head, weights, 0.999, mx.float32)
    exact, _, _ = reference(head, weights, hidden, targets)
    off = np.linalg.norm(doubles(way(head, hidden, targets)) - exact, axis=-1)
    assert (off <= 3e-4 * np.linalg.norm(exact, axis=-1)).all()


def test_many_words_of_which_none_stands_out_are_within_float16() -> None:
    """Their exponentials sum to more than it can hold, and each is less than it can tell from nothing."""
    words, width = 70_000, 8
    random = np.random.default_rng(0)
    module = nn.Linear(width, words, bias=False)
    module.weight = mx.array(random.standard_normal((words, width)).astype(np.float32)).astype(mx.float16)
    head, targets = Head(module), mx.array([5, 60_000], dtype=mx.int32)
    hidden = mx.array(1e-3 * random.standard_normal((2, width)), dtype=mx.float16)
    loss, gradient = mx.value_and_grad(lambda h: fused_loss(head, h, targets)[0])(hidden)
    assert loss.item() == pytest.approx(2 * np.log(words), rel=1e-3)
    weights = doubles(module.weight)
    expected = softmax(doubles(head.logits(hidden))) @ weights - weights[np.array(targets)]
    np.testing.assert_allclose(doubles(gradient), expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
def test_whole_logits_lose_no_more(dtype: mx.Dtype) -> None:
    head, weights = half_head("tied", dtype, None)
    hidden, targets = confident(head, weights, 0.999, dtype)
    exact, _, _ = reference(head, weights, hidden, targets)
    gradient: Any = mx.grad(lambda h: plain_loss(head.module.as_linear(h), targets)[0])(hidden)
    off = np.linalg.norm(doubles(gradient) - exact, axis=-1)
    assert (off <= 0.03 * np.linalg.norm(exact, axis=-1)).all()
