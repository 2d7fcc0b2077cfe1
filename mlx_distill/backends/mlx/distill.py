"""The loss of distillation and a linear head as one, in chunks, as `head` does it for the cross-entropy.

With q the student's probabilities and h the gradient of the divergence in the logarithms of its buckets, the gradient
in the logits is h at a named word, and q · h_rest / q_rest at any other: h sums to zero, since the buckets are
normalised. So one product with the head's weights gives the gradient of the hidden state, as it does without a teacher.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_distill.backends.mlx.cpu_kernels import exponentials, rows_of, scaled, sums_without
from mlx_distill.backends.mlx.head import CHUNK, Head
from mlx_distill.batches import TeacherBuckets
from mlx_distill.distillation import Objective

#: Least probability of the rest that is divided by.
_LEAST = 1e-30

#: Cross-entropy and divergence, both summed over positions in nats, and the count of positions predicted right.
DistillLosses = tuple[mx.array, mx.array, mx.array]


def divergence(student: mx.array, teacher: mx.array, objective: Objective) -> tuple[mx.array, mx.array]:
    """The divergence of buckets, and its gradient.

    Args:
        student: (N, B), logarithms of its probabilities.
        teacher: (N, B) likewise.

    Returns:
        (N,) in nats, and (N, B): the gradient in `student`, which sums to zero over the buckets.
    """
    t = objective.temperature
    lq, lp = _normalised(student / t), _normalised(teacher / t)
    q, p = mx.exp(lq), mx.exp(lp)
    if objective.divergence == "forward-kl":
        return (p * (lp - lq)).sum(axis=-1), (q - p) / t
    if objective.divergence == "reverse-kl":
        gap = lq - lp
        value = (q * gap).sum(axis=-1)
        return value, q * (gap - value[:, None]) / t
    beta = objective.beta
    lm = mx.logaddexp(lp + np.log(beta), lq + np.log1p(-beta))
    gap = lq - lm
    of_student = (q * gap).sum(axis=-1)
    value = beta * (p * (lp - lm)).sum(axis=-1) + (1 - beta) * of_student
    return value, (1 - beta) * q * (gap - of_student[:, None]) / t


def _normalised(logs: mx.array) -> mx.array:
    return logs - mx.logsumexp(logs, axis=-1, keepdims=True)


def fused_distill(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    teacher: tuple[mx.array, mx.array],
    objective: Objective,
    *,
    chunk: int = CHUNK,
) -> tuple[mx.array, DistillLosses]:
    """The loss, differentiable in the hidden state; the whole logits never exist.

    Args:
        head: The frozen head.
        hidden: (N, D), one row a position that carries loss.
        targets: (N,) int32, the word that stands there.
        teacher: `TeacherBuckets.ids` and `.log_probs`.

    Returns:
        The objective, summed over positions, and what it is made of.
    """
    ids, log_probs = teacher

    def compute(h: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
        sums = [mx.array(0.0), mx.array(0.0), mx.array(0.0)]
        gradients: list[mx.array] = []
        done: list[mx.array] = []
        for at in range(0, h.shape[0], chunk):
            part = h[at : at + chunk]
            # Without this edge the graph would be free to make all chunks' logits before it uses any.
            if done:
                part = mx.depends([part], done)[0]
            found, gradient = _chunk(
                head.logits(part),
                targets[at : at + chunk],
                ids[at : at + chunk],
                log_probs[at : at + chunk],
                objective,
            )
            gradients.append(head.back(gradient).astype(h.dtype))
            sums = [a + b for a, b in zip(sums, found, strict=True)]
            done = [*sums, gradients[-1]]
        loss = (1 - objective.weight) * sums[0] + objective.weight * sums[1]
        return loss, sums[0], sums[1], sums[2], mx.concatenate(gradients)

    return _with_gradient(compute, hidden)


def plain_distill(
    logits: mx.array, targets: mx.array, teacher: tuple[mx.array, mx.array], objective: Objective
) -> tuple[mx.array, DistillLosses]:
    """The same from whole logits (N, V), for models whose head is more than linear."""

    def compute(whole: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
        found, gradient = _chunk(whole, targets, *teacher, objective)
        return (1 - objective.weight) * found[0] + objective.weight * found[1], *found, gradient

    return _with_gradient(compute, logits.astype(mx.float32))


def _with_gradient(compute: Callable[[mx.array], tuple[mx.array, ...]], at: mx.array) -> tuple[mx.array, DistillLosses]:
    """The objective and its parts at a point, differentiable there, of a function that gives its gradient last."""
    differentiable = mx.custom_function(compute)

    def vjp(primals: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> mx.array:
        return (cotangents[0] * outputs[4]).astype(primals.dtype)

    differentiable.vjp(vjp)
    loss, entropy, apart, correct, _ = differentiable(at)
    return loss, (entropy, apart, correct)


def evaluate_distill(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    teacher: tuple[mx.array, mx.array],
    objective: Objective,
    *,
    chunk: int = CHUNK,
) -> DistillLosses:
    """Like `fused_distill`, without the gradient: a chunk is evaluated before the next is built."""
    sums = [mx.array(0.0), mx.array(0.0), mx.array(0.0)]
    ids, log_probs = teacher
    for at in range(0, hidden.shape[0], chunk):
        here = slice(at, at + chunk)
        found, _ = _chunk(head.logits(hidden[here]), targets[here], ids[here], log_probs[here], objective)
        sums = [a + b for a, b in zip(sums, found, strict=True)]
        mx.eval(sums)
    return sums[0], sums[1], sums[2]


def divergence_of(logits: mx.array, teacher: tuple[mx.array, mx.array], objective: Objective) -> mx.array:
    """The divergence of whole logits (N, V) alone, summed over positions.

    Args:
        teacher: `TeacherBuckets.ids` and `.log_probs`.
    """
    ids, log_probs = teacher
    # Which words stand there makes no difference to it.
    (_, apart, _), _ = _chunk(logits, ids[:, 0], ids, log_probs, objective)
    return apart


def _chunk(
    logits: mx.array, targets: mx.array, ids: mx.array, log_probs: mx.array, objective: Objective
) -> tuple[DistillLosses, mx.array]:
    """The sums over a chunk, and the gradient of the objective in its logits (n, V)."""
    top = logits.max(axis=-1, keepdims=True)
    e = mx.exp(logits - top)
    log_sum = mx.log(e.sum(axis=-1, keepdims=True)) + top
    at_target = mx.take_along_axis(logits, targets[:, None], axis=-1)
    named = mx.take_along_axis(logits, ids, axis=-1) - log_sum
    rest = None
    if log_probs.shape[1] > ids.shape[1]:
        # Summed for itself: one less the others would be lost in rounding where it is small.
        others = mx.put_along_axis(e, ids, mx.array(0.0), axis=-1).sum(axis=-1, keepdims=True)
        rest = mx.log(mx.maximum(others, _LEAST)) + top - log_sum
    student = named if rest is None else mx.concatenate([named, rest], axis=-1)
    value, slope = divergence(student, log_probs, objective)
    entropy = (log_sum - at_target).sum()
    correct = (mx.argmax(logits, axis=-1) == targets).sum().astype(mx.float32)
    gradient = e * _coefficient(slope, rest, log_sum - top, objective)
    gradient = mx.put_along_axis(gradient, ids, _of_named(slope, named, objective), axis=-1)
    if objective.weight < 1:
        at = mx.take_along_axis(gradient, targets[:, None], axis=-1) - (1 - objective.weight)
        gradient = mx.put_along_axis(gradient, targets[:, None], at, axis=-1)
    return (entropy, value.sum(), correct), gradient


def _coefficient(slope: mx.array, rest: mx.array | None, log_sum: mx.array, objective: Objective) -> mx.array:
    """(n, 1): what e = exp(logits − top) is multiplied by at a word without a bucket of its own.

    Args:
        log_sum: Logarithm of Σe, (n, 1).
    """
    own = mx.full(log_sum.shape, 1 - objective.weight)
    if rest is not None:
        own = own + objective.weight * slope[:, -1:] / mx.exp(rest)
    return own * mx.exp(-log_sum)


def _of_named(slope: mx.array, named: mx.array, objective: Objective) -> mx.array:
    """(n, K): the gradient at the words that have buckets, the target's own share left out."""
    return objective.weight * slope[:, : named.shape[1]] + (1 - objective.weight) * mx.exp(named)


def eager_distill(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    teacher: TeacherBuckets,
    objective: Objective,
    *,
    with_gradient: bool,
    chunk: int = CHUNK,
) -> tuple[float, float, int, mx.array | None]:
    """Like `fused_distill`, outside of any tracing and chunk by chunk, with the kernels of MLX's CPU backend.

    Returns:
        Cross-entropy, divergence, the count, and the gradient of `hidden` if asked for.
    """
    entropy, apart, correct = 0.0, 0.0, 0
    gradients: list[mx.array] = []
    for at in range(0, hidden.shape[0], chunk):
        here = slice(at, at + chunk)
        ids = teacher.ids[here]
        logits = head.logits(hidden[here])
        rows, words = rows_of(logits), np.asarray(targets[here])
        lines = np.arange(len(words))
        at_target = rows[lines, words]
        named = np.take_along_axis(rows, ids, axis=-1)
        correct += int((rows.argmax(axis=-1) == words).sum())
        tops, sums = exponentials(rows)
        log_sums = np.log(sums) + tops
        entropy += float((log_sums[:, 0] - at_target).sum(dtype=np.float64))
        student = named - log_sums
        rest = None
        if teacher.has_rest:
            others = np.maximum(sums_without(rows, ids), np.float32(_LEAST))
            rest = np.log(others) + tops - log_sums
            student = np.concatenate([student, rest], axis=-1)
        value, slope = divergence(mx.array(student), mx.array(teacher.log_probs[here]), objective)
        apart += float(np.asarray(value).sum(dtype=np.float64))
        if with_gradient:
            factor = _coefficient(slope, None if rest is None else mx.array(rest), mx.array(np.log(sums)), objective)
            scaled(rows, np.asarray(factor))
            np.put_along_axis(rows, ids, np.asarray(_of_named(slope, mx.array(named - log_sums), objective)), axis=-1)
            rows[lines, words] -= 1 - objective.weight
            gradients.append(head.back(logits))
            mx.eval(gradients[-1])
    return entropy, apart, correct, mx.concatenate(gradients) if gradients else None
