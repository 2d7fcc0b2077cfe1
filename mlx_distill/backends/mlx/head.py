"""The head and the cross-entropy as one, in chunks of positions: the logits of a batch never exist as a whole.

Under LoRA the head is frozen, so the only gradient that leaves it is that of the hidden state, and it can be made in
the same pass as the loss: with e = exp(logits − max), s = Σe and r = Σe over all words but the target, it is
(e @ W over these − r·W[target]) / s. The target is left out of the product, which in half precision rounds: of
(e @ W) / s − W[target], where the target is nearly certain, little but that rounding would be left. A chunk's logits
are gone before the next chunk's are made. Only positions that carry loss are computed at all.

The idea of computing the gradient in the forward pass is that of Liger Kernel's fused linear cross-entropy
(Hsu et al., 2024, arXiv:2410.10989); this is an implementation on MLX's own operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.backends.mlx.cpu_kernels import exponentials, rows_of
from mlx_distill.backends.mlx.projection import times_weight

#: Positions whose logits exist at once. At 150,000 words of vocabulary a chunk is 150 MB in float32.
CHUNK = 256

#: Least weight that a row is scaled by.
_LEAST = 1e-30

#: How many roundings apart the logits of head and model may lie and still be the same sums.
_ROUNDINGS = 16


@dataclass(frozen=True)
class Head:
    """A frozen linear head, tied or untied, plain or quantized, with or without a bias.

    Attributes:
        module: An embedding whose transpose is the head (tied), or a linear layer.
    """

    module: nn.Module

    @property
    def dtype(self) -> mx.Dtype:
        """Of its weights, or of what scales them."""
        return self.module.scales.dtype if hasattr(self.module, "scales") else self.module.weight.dtype

    @property
    def _tied(self) -> bool:
        return isinstance(self.module, (nn.Embedding, nn.QuantizedEmbedding))

    def logits(self, hidden: mx.array) -> mx.array:
        """(N, D) → (N, V) in float32."""
        out = self.module.as_linear(hidden) if self._tied else self.module(hidden)
        return out.astype(mx.float32)

    def back(self, weights: mx.array) -> mx.array:
        """(N, V) @ W → (N, D): from the vocabulary back to the hidden state, in float32.

        The product is computed in the head's own type, to which the weights are rounded. As float16 ends at 65,504 and
        6e-8, a row's largest weight is made 1 before and put back afterwards.
        """
        if self.dtype != mx.float16:
            return times_weight(self.module, weights).astype(mx.float32)
        largest = mx.maximum(mx.abs(weights).max(axis=-1, keepdims=True), _LEAST)
        return times_weight(self.module, weights / largest).astype(mx.float32) * largest

    def rows(self, targets: mx.array) -> mx.array:
        """(N,) → (N, D): the head's weights of these words, in float32."""
        m = self.module
        if isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            out = mx.dequantize(
                m.weight[targets],
                m.scales[targets],
                m.biases[targets] if m.biases is not None else None,
                group_size=m.group_size,
                bits=m.bits,
                mode=m.mode,
            )
        else:
            out = m.weight[targets]
        return out.astype(mx.float32)


Losses = tuple[mx.array, mx.array]


class _Chunk(NamedTuple):
    """What is made of (n, V) logits, with e = exp(logits − max).

    Attributes:
        loss: Summed.
        correct: Right predictions.
        others: e, but 0 at the target, (n, V).
        their_sum: Of the others, (n, 1): the target's share is not in it, so that it has all its digits where they are
            few.
        sum: Of all, (n, 1).
    """

    loss: mx.array
    correct: mx.array
    others: mx.array
    their_sum: mx.array
    sum: mx.array


def _look_at(logits: mx.array, targets: mx.array) -> _Chunk:
    words = targets[:, None]
    top = logits.max(axis=-1, keepdims=True)
    at_target = mx.take_along_axis(logits, words, axis=-1)
    # Written to where e stands, as nothing else looks at it.
    others = mx.put_along_axis(mx.exp(logits - top), words, mx.array(0.0), axis=-1)
    their_sum = others.sum(axis=-1, keepdims=True)
    whole = their_sum + mx.exp(at_target - top)
    loss = (mx.log(whole) + top - at_target).sum()
    correct = (mx.argmax(logits, axis=-1) == targets).sum()
    return _Chunk(loss, correct, others, their_sum, whole)


def fused_loss(head: Head, hidden: mx.array, targets: mx.array, *, chunk: int = CHUNK) -> Losses:
    """Cross-entropy of a linear head, differentiable in the hidden state.

    Args:
        head: The frozen head.
        hidden: (N, D), one row a position that carries loss.
        targets: (N,) int32, the word to predict there.
        chunk: Positions at once.

    Returns:
        The loss in nats summed over positions, and the count of positions predicted right; float32 scalars.
    """

    def compute(h: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        losses, corrects, grads = [], [], []
        done: list[mx.array] = []
        for at in range(0, h.shape[0], chunk):
            part = h[at : at + chunk]
            # Without this edge the graph would be free to make all chunks' logits before it uses any.
            if done:
                part = mx.depends([part], done)[0]
            wanted = targets[at : at + chunk]
            found = _look_at(head.logits(part), wanted)
            grad = (head.back(found.others) - found.their_sum * head.rows(wanted)) / found.sum
            grad = grad.astype(h.dtype)
            done = [found.loss, grad]
            losses.append(found.loss)
            corrects.append(found.correct)
            grads.append(grad)
        return sum(losses, mx.array(0.0)), sum(corrects, mx.array(0)).astype(mx.float32), mx.concatenate(grads)

    with_gradient = mx.custom_function(compute)

    def vjp(primals: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> mx.array:
        return (cotangents[0] * outputs[2]).astype(primals.dtype)

    with_gradient.vjp(vjp)
    loss, correct, _ = with_gradient(hidden)
    return loss, correct


def plain_loss(logits: mx.array, targets: mx.array) -> Losses:
    """The same from whole logits (N, V), for models whose head is more than linear."""
    logits = logits.astype(mx.float32)
    loss = nn.losses.cross_entropy(logits, targets, reduction="sum")
    return loss, (mx.argmax(logits, axis=-1) == targets).sum().astype(mx.float32)


def eager_loss(
    head: Head, hidden: mx.array, targets: mx.array, *, with_gradient: bool, chunk: int = CHUNK
) -> tuple[float, int, mx.array | None]:
    """Like `fused_loss`, outside of any tracing and chunk by chunk, with the kernels of MLX's CPU backend.

    Returns:
        The loss, the count, and the gradient of `hidden` if asked for.
    """
    loss, correct = 0.0, 0
    gradients: list[mx.array] = []
    for at in range(0, hidden.shape[0], chunk):
        wanted = targets[at : at + chunk]
        logits = head.logits(hidden[at : at + chunk])
        rows, indices = rows_of(logits), np.asarray(wanted)
        lines = np.arange(len(indices))
        at_targets = rows[lines, indices]
        correct += int((rows.argmax(axis=-1) == indices).sum())
        tops, sums = exponentials(rows)
        loss += float((np.log(sums) + tops - at_targets[:, None]).sum(dtype=np.float64))
        if with_gradient:
            rows[lines, indices] -= sums[:, 0]
            gradients.append(head.back(logits) / mx.array(sums))
            mx.eval(gradients[-1])
    return loss, correct, mx.concatenate(gradients) if gradients else None


def evaluate_loss(head: Head, hidden: mx.array, targets: mx.array, *, chunk: int = CHUNK) -> Losses:
    """Like `fused_loss`, without the gradient: a chunk is evaluated before the next is built."""
    loss, correct = mx.array(0.0), mx.array(0.0)
    for at in range(0, hidden.shape[0], chunk):
        logits = head.logits(hidden[at : at + chunk])
        found = _look_at(logits, targets[at : at + chunk])
        loss, correct = loss + found.loss, correct + found.correct
        mx.eval(loss, correct)
    return loss, correct


def find_head(model: nn.Module) -> tuple[Callable[[mx.array], mx.array], Head] | None:
    """The part of an mlx-lm model below its head, and its head, if the model is no more than the two.

    Returns:
        A function from tokens (B, T) to hidden states (B, T, D), and the head; None if the model's logits are not
        what these two give (a soft-cap, a scale, another structure), found out by computing both.
    """
    body = getattr(model, "model", None)
    module = getattr(model, "lm_head", None) or getattr(body, "embed_tokens", None)
    linear = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
    if body is None or not isinstance(module, linear) or not callable(body):
        return None
    head = Head(module)
    tokens = mx.arange(1, 9)[None]
    expected = model(tokens).astype(mx.float32)
    hidden = body(tokens)
    if not isinstance(hidden, mx.array) or hidden.ndim != 3:
        return None
    found = head.logits(hidden[0])
    if found.shape != expected[0].shape:
        return None
    gap = (found - expected[0]).abs().max() / (1e-6 + expected.abs().max())
    # The same sums in the same type: what differs beyond their rounding is something else that the model does.
    return (body, head) if gap.item() <= _ROUNDINGS * mx.finfo(hidden.dtype).eps else None
