"""An mlx-lm model taken apart into its frozen lower part and its trained upper part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_distill.backends.mlx.block import Block, find_block
from mlx_distill.backends.mlx.device import on_gpu


@dataclass(frozen=True)
class Trunk:
    """An mlx-lm model body taken apart at its first trained layer.

    Attributes:
        body: Has `embed_tokens`, `layers` and `norm`.
        frozen: How many of its layers lie below the cut.
        blocks: Of each layer, where its gradient is written out for a CPU; else None.
    """

    body: nn.Module
    frozen: int
    blocks: Sequence[Block | None]

    def below(self, tokens: mx.array) -> mx.array:
        """Tokens (B, T) → what enters the first trained layer, (B, T, D)."""
        hidden = self.body.embed_tokens(tokens)
        for layer, block in zip(self.body.layers[: self.frozen], self.blocks[: self.frozen], strict=True):
            hidden = layer(hidden, "causal", None) if block is None else block.forward(hidden)[0]
        return hidden

    def above(self, hidden: mx.array) -> mx.array:
        """What enters the first trained layer → what enters the head, both (B, T, D); MLX can differentiate it."""
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


def find_trunk(body: nn.Module, trained: int, *, length: int, name: str) -> Trunk | None:
    """Take a model body apart below its last `trained` layers, if it is no more than embedding, causal layers and norm.

    Args:
        length: Of the longest row, in tokens: a window no shorter than it hides nothing.
        name: Of the body in the model, for the names of its parameters.

    Returns:
        None if the parts are not what the body is: found out by computing both on a few tokens, and by looking at the
        masks that the body gives its layers at full length.
    """
    if not all(hasattr(body, part) for part in ("embed_tokens", "layers", "norm")) or not _all_causal(body, length):
        return None
    blocks: list[Block | None] = [None] * len(body.layers)
    if not on_gpu():
        blocks = [find_block(layer, f"{name}.layers.{at}") for at, layer in enumerate(body.layers)]
    trunk = Trunk(body, len(body.layers) - trained, blocks)
    tokens = mx.arange(1, 9)[None]
    try:
        found = trunk.above(trunk.below(tokens))
    except (TypeError, ValueError, AttributeError):
        return None
    expected = body(tokens)
    gap = (found - expected).astype(mx.float32).abs().max()
    return trunk if gap.item() <= 1e-4 * (1 + expected.astype(mx.float32).abs().max().item()) else None


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
