"""A decoder layer of the Llama family with its gradient written out, for MLX's CPU backend.

Automatic differentiation keeps every intermediate that some gradient formula mentions. Written out, a layer keeps six:
what enters it, queries, keys, values, what attention gives, and the two arms of the feed-forward; norms and the
activation are made again, which is cheap. And with each layer evaluated as it is reached, the kernels of
`cpu_kernels` can work on memory in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.backends.mlx import cpu_kernels
from mlx_distill.backends.mlx.attention import attend, attend_gradient
from mlx_distill.backends.mlx.cpu_kernels import rows_of
from mlx_distill.backends.mlx.projection import Gradients, Projection

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Saved:
    """What the backward pass of a layer needs; it uses it up.

    Attributes:
        entered: (N, D), with N = B·T.
        raw_queries, raw_keys: Before their norms; None where the layer has none.
        queries: (B, K, G, T, d), rotated and scaled; `keys` and `values` (B, K, T, d).
        mixed: Attention's output, like queries; `log_sums` of its scores.
        middle: Between the two halves, (N, D).
        gate, up: (N, F).
    """

    entered: mx.array
    raw_queries: mx.array | None
    raw_keys: mx.array | None
    queries: mx.array
    keys: mx.array
    values: mx.array
    mixed: mx.array
    log_sums: mx.array
    middle: mx.array
    gate: mx.array
    up: mx.array


class Block:
    """A layer x + attention(norm(x)), then + swiglu feed-forward(norm(·)).

    Args:
        layer: Of an mlx-lm model.
        name: Of the layer in the model, for the names of its parameters.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        attention, feed_forward = layer.self_attn, layer.mlp
        self._norm, self._middle_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._q, self._k, self._v, self._o = (
            Projection(getattr(attention, part), f"{name}.self_attn.{part}") for part in _ATTENTION
        )
        self._gate, self._up, self._down = (
            Projection(getattr(feed_forward, part), f"{name}.mlp.{part}") for part in _FEED_FORWARD
        )
        self._rope = attention.rope
        self._head_norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
        self._heads, self._key_heads, self._scale = attention.n_heads, attention.n_kv_heads, attention.scale

    def forward(self, hidden: mx.array) -> tuple[mx.array, Saved]:
        """(B, T, D) → the same, and what the way back needs."""
        batch, length, _ = hidden.shape
        entered = hidden.reshape(batch * length, -1)
        normed = self._norm(entered)
        raw_q, raw_k, raw_v = (part.forward(normed) for part in (self._q, self._k, self._v))
        queries = self._rotated(raw_q, batch, self._heads, self._head_norms[0])
        keys = self._rotated(raw_k, batch, self._key_heads, self._head_norms[1])
        values = mx.contiguous(_split_heads(raw_v, batch, self._key_heads))
        queries = (queries * self._scale).reshape(batch, self._key_heads, -1, *queries.shape[-2:])
        mx.eval(queries, keys, values)
        mixed, log_sums = attend(queries, keys, values)
        middle = entered + self._o.forward(_join_heads(mixed))
        normed = self._middle_norm(middle)
        gate, up = self._gate.forward(normed), self._up.forward(normed)
        out = middle + self._down.forward(_activated(gate, up))
        mx.eval(out)
        normalised = self._head_norms[0] is not None
        saved = Saved(
            entered=entered,
            raw_queries=raw_q if normalised else None,
            raw_keys=raw_k if normalised else None,
            queries=queries,
            keys=keys,
            values=values,
            mixed=mixed,
            log_sums=log_sums,
            middle=middle,
            gate=gate,
            up=up,
        )
        return out.reshape(hidden.shape), saved

    def backward(self, saved: Saved, gradient: mx.array, gradients: Gradients, *, input_needed: bool) -> None:
        """Turn the gradient of the output into that of what entered.

        Args:
            saved: Used up.
            gradient: Of the output, (N, D); becomes that of what entered where it is needed, and is used up where not.
            gradients: Those of the parameters are put here.
        """
        total = rows_of(gradient)
        act = _activated(saved.gate, saved.up)
        to_act = self._down.backward(act, gradient, gradients)
        cpu_kernels.swiglu_gradient(rows_of(saved.gate), rows_of(saved.up), rows_of(to_act))
        normed = self._middle_norm(saved.middle)
        arriving = self._gate.backward(normed, saved.gate, gradients)
        arriving = self._up.backward(normed, saved.up, gradients, onto=arriving)
        mx.eval(arriving, gradients)
        add_norm_gradient(self._middle_norm, saved.middle, arriving, total)

        joined = _join_heads(saved.mixed)
        to_joined = self._o.backward(joined, gradient, gradients)
        batch, _, groups, length, width = saved.mixed.shape
        to_mixed = to_joined.reshape(batch, length, self._key_heads, groups, width).transpose(0, 2, 3, 1, 4)
        to_q, to_k, to_v = attend_gradient(
            saved.queries, saved.keys, saved.values, saved.mixed, saved.log_sums, mx.contiguous(to_mixed)
        )
        to_q = to_q.reshape(batch, self._heads, length, width) * self._scale
        to_raw_q = self._unrotated(to_q, saved.raw_queries, self._head_norms[0])
        to_raw_k = self._unrotated(to_k, saved.raw_keys, self._head_norms[1])
        to_raw_v = _merge_heads(to_v)
        normed = self._norm(saved.entered)
        if not input_needed:
            for part, arriving in ((self._q, to_raw_q), (self._k, to_raw_k), (self._v, to_raw_v)):
                part.finish(normed, arriving, gradients)
            mx.eval(gradients)
            return
        arriving = self._q.backward(normed, to_raw_q, gradients)
        arriving = self._k.backward(normed, to_raw_k, gradients, onto=arriving)
        arriving = self._v.backward(normed, to_raw_v, gradients, onto=arriving)
        mx.eval(arriving, gradients)
        add_norm_gradient(self._norm, saved.entered, arriving, total)

    def _rotated(self, rows: mx.array, batch: int, heads: int, norm: nn.Module | None) -> mx.array:
        """(N, H·d) → (B, H, T, d), normed where the layer does, and rotated by position."""
        parts = rows.reshape(batch, rows.shape[0] // batch, heads, -1)
        parts = parts if norm is None else norm(parts)
        rotated: mx.array = self._rope(parts.transpose(0, 2, 1, 3))
        return rotated

    def _unrotated(self, gradient: mx.array, raw: mx.array | None, norm: nn.Module | None) -> mx.array:
        """The gradient of what `_rotated` took."""
        batch, heads, length, _ = gradient.shape
        # A rotation's gradient depends on no value of its input, so any input of the shape will do.
        rows = mx.zeros((batch * length, heads * gradient.shape[-1])) if raw is None else raw
        _, (back,) = mx.vjp(lambda r: self._rotated(r, batch, heads, norm), [rows], [gradient])
        return back


def _split_heads(rows: mx.array, batch: int, heads: int) -> mx.array:
    return rows.reshape(batch, rows.shape[0] // batch, heads, -1).transpose(0, 2, 1, 3)


def _merge_heads(parts: mx.array) -> mx.array:
    """(B, H, T, d) → (B·T, H·d)."""
    batch, heads, length, width = parts.shape
    return parts.transpose(0, 2, 1, 3).reshape(batch * length, heads * width)


def _join_heads(mixed: mx.array) -> mx.array:
    """(B, K, G, T, d) → (B·T, K·G·d)."""
    return _merge_heads(mixed.reshape(mixed.shape[0], -1, *mixed.shape[3:]))


def _activated(gate: mx.array, up: mx.array) -> mx.array:
    out = mx.zeros(gate.shape)
    cpu_kernels.swiglu(rows_of(gate), rows_of(up), rows_of(out))
    return out


def add_norm_gradient(norm: nn.RMSNorm, values: mx.array, gradient: mx.array, total: cpu_kernels.Floats) -> None:
    """Add the gradient of a norm's input, (N, D), to `total`; that of its output is used up."""
    cpu_kernels.add_rms_norm_gradient(rows_of(values), np.asarray(norm.weight), norm.eps, rows_of(gradient), total)


def find_block(layer: nn.Module, name: str) -> Block | None:
    """The layer as a block, if it is one: found out by its parts, and by computing output and gradient both ways."""
    parts = [(getattr(layer, "self_attn", None), _ATTENTION), (getattr(layer, "mlp", None), _FEED_FORWARD)]
    if not all(Projection.fits(getattr(module, part, None)) for module, names in parts for part in names):
        return None
    floats = [value for _, value in tree_flatten(layer.parameters()) if value.dtype != mx.uint32]
    if any(value.dtype != mx.float32 for value in floats):
        return None
    try:
        block = Block(layer, name)
        agrees = _agrees(block, layer, name)
    except (AttributeError, TypeError, ValueError):
        return None
    return block if agrees else None


def _agrees(block: Block, layer: nn.Module, name: str) -> bool:
    width = layer.input_layernorm.weight.shape[0]
    generator = np.random.default_rng(0)
    hidden, arriving = (mx.array(generator.standard_normal((2, 5, width)), dtype=mx.float32) for _ in range(2))
    names = [key for key, _ in tree_flatten(layer.trainable_parameters())]
    before = [value for _, value in tree_flatten(layer.trainable_parameters())]

    def whole(values: mx.array, *parameters: mx.array) -> list[mx.array]:
        layer.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        return [layer(values, "causal", None)]

    (expected,), (of_hidden, *of_parameters) = mx.vjp(whole, [hidden, *before], [arriving])
    layer.update(tree_unflatten(list(zip(names, before, strict=True))))
    # Before `backward` uses `arriving` up.
    mx.eval(expected, of_hidden, of_parameters)
    found, saved = block.forward(hidden)
    gradients: Gradients = {}
    back = arriving.reshape(-1, width)
    block.backward(saved, back, gradients, input_needed=True)
    pairs = [(found, expected), (back.reshape(hidden.shape), of_hidden)]
    pairs += [(gradients[f"{name}.{key}"], value) for key, value in zip(names, of_parameters, strict=True)]
    return len(gradients) == len(names) and all(_close(a, b) for a, b in pairs)


def _close(found: mx.array, expected: mx.array) -> bool:
    """Whether two arrays are the same sums in another order."""
    gap = (found - expected).abs().max().item()
    return bool(gap <= 1e-4 * (expected.abs().max().item() + 1e-6))
