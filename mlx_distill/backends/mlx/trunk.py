"""The frozen lower part of a student, computed once a row.

With LoRA on the last k layers, everything below them is the same in every epoch and every evaluation. Its output is
computed row by row and kept, so that later epochs pay for the trained layers and the head alone. Each row is computed
at its own width whether or not its output is kept, so the losses are the same to the bit either way.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.batches import WIDTH_QUANTUM, Batch

#: Share of the machine's memory that kept rows may take.
MEMORY_SHARE = 0.2


@dataclass(frozen=True)
class Trunk:
    """An mlx-lm model body cut below its first trained layer.

    Attributes:
        body: Has `embed_tokens`, `layers` and `norm`.
        frozen: How many of its layers lie below the cut.
    """

    body: nn.Module
    frozen: int

    def below(self, tokens: mx.array) -> mx.array:
        """Tokens (B, T) → what enters the first trained layer, (B, T, D)."""
        hidden = self.body.embed_tokens(tokens)
        for layer in self.body.layers[: self.frozen]:
            hidden = layer(hidden, "causal", None)
        return hidden

    def above(self, hidden: mx.array) -> mx.array:
        """What enters the first trained layer → what enters the head, both (B, T, D)."""
        for layer in self.body.layers[self.frozen :]:
            hidden = layer(hidden, "causal", None)
        return self.body.norm(hidden)


class _Spy:
    """Stands for a layer: notes the mask that it is given, and passes the hidden state on."""

    def __init__(self, layer: nn.Module, masks: list[object]) -> None:
        self._layer = layer
        self._masks = masks

    def __getattr__(self, name: str) -> object:
        return getattr(self._layer, name)

    def __call__(self, hidden: mx.array, mask: object = None, cache: object = None) -> mx.array:
        self._masks.append(mask)
        return hidden


def find_trunk(body: nn.Module, trained: int, *, length: int) -> Trunk | None:
    """Cut a model body below its last `trained` layers, if it is no more than embedding, causal layers and norm.

    Args:
        length: Of the longest row, in tokens: a window no shorter than it hides nothing.

    Returns:
        None if nothing lies below, or if the two parts are not what the body is: found out by computing both on a
        few tokens, and by looking at the masks that the body gives its layers at full length.
    """
    if not all(hasattr(body, name) for name in ("embed_tokens", "layers", "norm")):
        return None
    frozen = len(body.layers) - trained
    if frozen <= 0 or not _all_causal(body, length):
        return None
    trunk = Trunk(body, frozen)
    tokens = mx.arange(1, 9)[None]
    try:
        found = trunk.above(trunk.below(tokens))
    except (TypeError, ValueError, AttributeError):
        return None
    expected = body(tokens)
    gap = (found - expected).astype(mx.float32).abs().max()
    return trunk if gap.item() <= 1e-5 * (1 + expected.astype(mx.float32).abs().max().item()) else None


def _all_causal(body: nn.Module, length: int) -> bool:
    masks: list[object] = []
    layers = body.layers
    body.layers = [_Spy(layer, masks) for layer in layers]
    try:
        body(mx.zeros((1, length), dtype=mx.int32))
    except (TypeError, ValueError, AttributeError):
        return False
    finally:
        body.layers = layers
    return len(masks) == len(layers) and all(isinstance(mask, str) and mask == "causal" for mask in masks)


class FrozenRows:
    """The trunk's output of each row seen, kept while there is room.

    Args:
        trunk: What computes them.
        budget: Bytes that kept rows may take.
    """

    def __init__(self, trunk: Trunk, budget: int) -> None:
        self.trunk = trunk
        self._room = budget
        self._kept: dict[bytes, mx.array] = {}

    def batch(self, batch: Batch) -> mx.array:
        """The trunk's output of a padded batch: (B, T, D), zero on padding."""
        width = batch.tokens.shape[1]
        rows = [self._row(batch.tokens[at, :length]) for at, length in enumerate(batch.lengths)]
        return mx.stack([mx.pad(row, [(0, width - row.shape[0]), (0, 0)]) for row in rows])

    def _row(self, tokens: np.ndarray) -> mx.array:
        key = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
        if (kept := self._kept.get(key)) is not None:
            return kept
        length = len(tokens)
        width = -(-length // WIDTH_QUANTUM) * WIDTH_QUANTUM
        padded = np.pad(tokens, (0, width - length))
        hidden = mx.contiguous(self.trunk.below(mx.array(padded)[None])[0, :length])
        mx.eval(hidden)
        if hidden.nbytes <= self._room:
            self._room -= hidden.nbytes
            self._kept[key] = hidden
        return hidden
