"""The trained layers, the last norm and the head, with the gradient written out, for MLX's CPU backend.

One layer is evaluated after the other, forwards and backwards, so that a layer's memory is free again as soon as its
gradient is made. With checkpointing only what enters each layer is kept, and the layer is computed again on the way
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.backends.mlx.block import Block, Saved, add_norm_gradient
from mlx_distill.backends.mlx.cpu_kernels import rows_of
from mlx_distill.backends.mlx.distill import eager_distill
from mlx_distill.backends.mlx.head import Head, eager_loss
from mlx_distill.backends.mlx.projection import Gradients
from mlx_distill.backends.mlx.trunk import Trunk
from mlx_distill.batches import TeacherBuckets
from mlx_distill.distillation import Objective


class Found(NamedTuple):
    """What a batch costs.

    Attributes:
        loss: Cross-entropy in nats, summed over targets.
        correct: Targets predicted right.
        divergence: From the teacher in nats, summed likewise; None without one.
    """

    loss: float
    correct: int
    divergence: float | None = None


class Goal(NamedTuple):
    """What the hidden states below the head shall lead to.

    Attributes:
        targets: (N,) int32.
        teacher: What it says there; None where the targets are all that is learned.
        objective: What is minimised where there is a teacher.
    """

    targets: mx.array
    teacher: TeacherBuckets | None = None
    objective: Objective | None = None

    def cost(self, head: Head, hidden: mx.array, *, with_gradient: bool) -> tuple[Found, mx.array | None]:
        """Of hidden states (N, D), and the gradient of what is minimised in them."""
        if self.teacher is None or self.objective is None:
            loss, correct, gradient = eager_loss(head, hidden, self.targets, with_gradient=with_gradient)
            return Found(loss, correct), gradient
        loss, apart, correct, gradient = eager_distill(
            head, hidden, self.targets, self.teacher, self.objective, with_gradient=with_gradient
        )
        return Found(loss, correct, apart), gradient


@dataclass(frozen=True)
class Stack:
    """What lies above a trunk's cut, all in float32.

    Attributes:
        blocks: The trained layers, from the lowest.
        norm: After the last.
    """

    blocks: Sequence[Block]
    norm: nn.RMSNorm
    head: Head

    def loss(self, hidden: mx.array, places: mx.array, goal: Goal) -> Found:
        """What a batch costs.

        Args:
            hidden: What enters the first layer, (B, T, D).
            places: Where a target is predicted, as positions in B·T; (N,) int32.
            goal: What is wanted there.
        """
        for block in self.blocks:
            hidden = block.forward(hidden)[0]
        top = self.norm(hidden).reshape(-1, hidden.shape[-1])[places]
        return goal.cost(self.head, top, with_gradient=False)[0]

    def loss_and_gradients(
        self, hidden: mx.array, places: mx.array, goal: Goal, *, checkpointing: bool
    ) -> tuple[Found, Gradients]:
        """Like `loss`, with the gradients of the adapter's parameters.

        Args:
            checkpointing: Keep what enters each layer alone, and compute the layer twice.
        """
        kept: list[mx.array | Saved] = []
        for block in self.blocks:
            entered = hidden
            hidden, saved = block.forward(entered)
            kept.append(entered if checkpointing else saved)
            del saved
        width = hidden.shape[-1]
        rows = hidden.reshape(-1, width)
        found, to_top = goal.cost(self.head, self.norm(rows)[places], with_gradient=True)
        assert to_top is not None
        gradient, to_normed = mx.zeros(rows.shape), mx.zeros(rows.shape)
        rows_of(to_normed)[np.asarray(places)] = rows_of(to_top)
        add_norm_gradient(self.norm, rows, to_normed, rows_of(gradient))
        del to_top, to_normed, rows, hidden
        gradients: Gradients = {}
        for block in reversed(self.blocks):
            saved = kept.pop()
            if not isinstance(saved, Saved):
                saved = block.forward(saved)[1]
            block.backward(saved, gradient, gradients, input_needed=bool(kept))
        return found, gradients


def find_stack(trunk: Trunk | None, head: Head | None) -> Stack | None:
    """The stack above a trunk, if every layer of it is a block and the head is known."""
    if trunk is None or head is None or type(trunk.body.norm) is not nn.RMSNorm:
        return None
    blocks = [block for block in trunk.blocks[trunk.frozen :] if block is not None]
    if len(blocks) < len(trunk.blocks) - trunk.frozen or head.dtype != mx.float32:
        return None
    return Stack(blocks, trunk.body.norm, head)
