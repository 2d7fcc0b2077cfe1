"""What MLX's CPU backend is slow at, by numpy and on all cores.

MLX's CPU backend computes elementwise functions on one core, and transcendental ones a single element at a time: an
exponential takes some 14 ns on x86, and a training step of a small model needs hundreds of millions of them. numpy's
are vectorised, and it lets go of the interpreter's lock, so that rows can be shared among threads. Rows are taken in
pieces that stay in a core's cache. What a row gives depends on that row alone, so neither the pieces nor the threads
change any bit.

All take rows in float32, (N, K), and write in place: pass memory that nothing else looks at.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: float32 values that a piece works on at once: a quarter of a megabyte, as a core's own cache has.
_PIECE = 2**16

Floats = NDArray[np.float32]


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="mlx-distill-kernel")


def memory_of(array: mx.array) -> Floats:
    """The values of an array without a copy: what is written there is written into the array. Evaluates it."""
    mx.eval(array)
    return np.asarray(array)


def rows_of(array: mx.array) -> Floats:
    """The same as rows of the last axis; the array must be contiguous."""
    memory = memory_of(array)
    rows = memory.reshape(-1, memory.shape[-1])
    assert np.may_share_memory(rows, memory)
    return rows


def _by_rows(shape: tuple[int, ...], work: Callable[[slice], None]) -> None:
    """Do the work on all rows, in pieces, on all cores. Numbers that are not finite pass through without a word."""

    def quietly(piece: slice) -> None:
        with np.errstate(all="ignore"):
            work(piece)

    rows, width = shape
    step = max(1, min(_PIECE // max(1, width), -(-rows // (os.cpu_count() or 1))))
    pieces = [slice(at, min(at + step, rows)) for at in range(0, rows, step)]
    if len(pieces) == 1:
        quietly(pieces[0])
    else:
        list(_threads().map(quietly, pieces))


def exponentials(logits: Floats) -> tuple[Floats, Floats]:
    """Replace each row by exp(row − its maximum).

    Returns:
        The maxima and the sums of what the rows now hold, each (N, 1).
    """
    tops = np.empty((logits.shape[0], 1), np.float32)
    sums = np.empty_like(tops)

    def work(rows: slice) -> None:
        part = logits[rows]
        part.max(axis=-1, keepdims=True, out=tops[rows])
        part -= tops[rows]
        np.exp(part, out=part)
        part.sum(axis=-1, keepdims=True, out=sums[rows])

    _by_rows(logits.shape, work)
    return tops, sums


def sums_without(rows: Floats, columns: NDArray[np.int32]) -> Floats:
    """The sums of rows (N, V) over all but some columns of each, (N, K); (N, 1). The rows are as before afterwards."""
    sums = np.empty((rows.shape[0], 1), np.float32)

    def work(piece: slice) -> None:
        part, which = rows[piece], columns[piece]
        kept = np.take_along_axis(part, which, axis=-1)
        np.put_along_axis(part, which, np.float32(0), axis=-1)
        part.sum(axis=-1, keepdims=True, out=sums[piece])
        np.put_along_axis(part, which, kept, axis=-1)

    _by_rows(rows.shape, work)
    return sums


def scaled(rows: Floats, factors: Floats) -> None:
    """Multiply each row by its factor, (N, 1)."""

    def work(piece: slice) -> None:
        rows[piece] *= factors[piece]

    _by_rows(rows.shape, work)


def normalised_exponentials(scores: Floats, log_sums: Floats) -> None:
    """Replace each row by exp(row − its log-sum), with log-sums (N, 1): a softmax whose sums are known."""

    def work(rows: slice) -> None:
        part = scores[rows]
        part -= log_sums[rows]
        np.exp(part, out=part)

    _by_rows(scores.shape, work)


def softmax_gradient(weights: Floats, gradient: Floats, inner: Floats) -> None:
    """Replace the gradient of a softmax's output by that of its input: weights · (gradient − inner).

    Args:
        weights: The softmax's output.
        gradient: Of it; replaced.
        inner: The sums of weights · gradient over each row, (N, 1).
    """

    def work(rows: slice) -> None:
        part = gradient[rows]
        part -= inner[rows]
        part *= weights[rows]

    _by_rows(weights.shape, work)


def swiglu(gate: Floats, up: Floats, out: Floats) -> None:
    """Write silu(gate) · up to `out`."""

    def work(rows: slice) -> None:
        part = out[rows]
        _one_plus_exp_minus(gate[rows], part)
        np.divide(gate[rows], part, out=part)
        part *= up[rows]

    _by_rows(gate.shape, work)


def swiglu_gradient(gate: Floats, up: Floats, gradient: Floats) -> None:
    """Replace `gate` and `up` by the gradients of silu(gate) · up with respect to them, given that of the output."""

    def work(rows: slice) -> None:
        g, u, arriving = gate[rows], up[rows], gradient[rows]
        sigmoid = np.empty_like(g)
        _one_plus_exp_minus(g, sigmoid)
        np.reciprocal(sigmoid, out=sigmoid)
        # silu'(g) = σ (1 + g (1 − σ))
        slope = 1 - sigmoid
        slope *= g
        slope += 1
        slope *= sigmoid
        slope *= u
        sigmoid *= g
        np.multiply(slope, arriving, out=g)
        np.multiply(sigmoid, arriving, out=u)

    _by_rows(gate.shape, work)


def _one_plus_exp_minus(values: Floats, out: Floats) -> None:
    np.negative(values, out=out)
    # Beyond float32's range this is infinite and the sigmoid made of it 0, as it should be.
    np.exp(out, out=out)
    out += 1


def add_rms_norm_gradient(values: Floats, weight: Floats, eps: float, gradient: Floats, total: Floats) -> None:
    """Add the gradient of an RMS norm's input to `total`.

    Args:
        values: The norm's input.
        weight: Its factors, (K,).
        gradient: Of its output; destroyed.
    """
    width = values.shape[1]

    def work(rows: slice) -> None:
        x, g = values[rows], gradient[rows]
        inverse = 1 / np.sqrt(np.einsum("nk,nk->n", x, x)[:, None] / width + np.float32(eps))
        g *= weight
        # y = r x with r = (mean x² + ε)^(-1/2), so dx = r g − x (g·x) r³ / K
        pull = np.einsum("nk,nk->n", g, x)[:, None] * inverse**3 / width
        g *= inverse
        g -= x * pull
        total[rows] += g

    _by_rows(values.shape, work)
