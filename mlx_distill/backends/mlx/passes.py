"""The passes over a student: loss forwards, gradients backwards, by the best way that its model allows.

- What lies below the trained layers is computed once a row and kept (`trunk`).
- A linear head is computed together with the loss, in chunks (`head`).
- On a CPU, layers of the Llama family have their gradient written out (`stack`); all else is differentiated by MLX.

Each way is taken only where it gives what the whole model gives, which is found out by computing both at the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_distill.backends.mlx.distill import evaluate_distill, fused_distill, plain_distill
from mlx_distill.backends.mlx.frozen_rows import FrozenRows, Store
from mlx_distill.backends.mlx.head import Head, evaluate_loss, fused_loss, plain_loss
from mlx_distill.backends.mlx.projection import Gradients
from mlx_distill.backends.mlx.stack import Found, Goal, find_stack
from mlx_distill.backends.mlx.trunk import find_trunk
from mlx_distill.batches import Batch, TeacherBuckets
from mlx_distill.distillation import Objective


class Passes:
    """Computes losses and gradients of a model with an adapter.

    Args:
        model: Of mlx-lm, with its adapter attached.
        parts: What `find_head` found before the adapter was attached.
        trained: Layers that carry an adapter, counted from the last.
        max_length: Tokens of the longest row.
        objective: What is minimised of batches with a teacher.

    Attributes:
        checkpointing: Whether to keep only what enters each trained layer, and to compute it twice.
        keep_trained: Whether rows that are trained on come again.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: tuple[nn.Module, Head] | None,
        *,
        trained: int,
        max_length: int,
        objective: Objective | None = None,
    ) -> None:
        self._objective = objective
        self.checkpointing = False
        self.keep_trained = True
        self._model = model
        self._body: nn.Module | None
        self._head: Head | None
        self._body, self._head = parts or (None, None)
        self._trunk = None
        if self._body is not None:
            name = next(key for key, module in model.named_modules() if module is self._body)
            self._trunk = find_trunk(self._body, trained, length=max_length, name=name)
        self._stack = find_stack(self._trunk, self._head)
        self._rows = None
        if self._trunk is not None and self._trunk.frozen:
            self._rows = FrozenRows(self._trunk, None)
        self._differentiate = nn.value_and_grad(model, self._loss)

    @property
    def ways(self) -> str:
        """The ways taken, in words."""
        ways = [
            "fused head and loss" if self._head else "whole logits, as this model's head is more than linear",
            f"{self._trunk.frozen} frozen layers computed once a row" if self._rows and self._trunk else "",
            "gradients written out" if self._stack else "",
        ]
        return ", ".join(way for way in ways if way)

    @property
    def prefix_token_bytes(self) -> int:
        """Bytes that keeping the frozen layers' output takes for each token; 0 where nothing is kept."""
        if self._rows is None or self._trunk is None:
            return 0
        # A layer gives what it takes: the type and width of an embedding, of which the size is known uncomputed.
        return int(self._trunk.body.embed_tokens(mx.zeros((1, 1), dtype=mx.int32)).nbytes)

    def keep_rows(self, store: Store | None) -> None:
        """Keep what the frozen layers give in a store from now on."""
        if self._rows is not None and self._trunk is not None:
            self._rows = FrozenRows(self._trunk, store)

    def loss(self, batch: Batch) -> Found:
        """What a batch's targets cost, without dropout."""
        self._model.eval()
        places, targets = _targets(batch)
        start = self._enter(batch, keep=True)
        if self._stack is not None:
            return self._stack.loss(start, places, self._goal(batch, targets))
        top = self._ascend(start)
        top = top.reshape(-1, top.shape[-1])[places]
        return self._evaluated(top, targets, batch)

    def loss_and_gradients(self, batch: Batch) -> tuple[Found, Gradients]:
        """Like `loss`, with dropout, and with the gradients of the summed objective by parameter."""
        self._model.train()
        places, targets = _targets(batch)
        # What the student wrote is not seen again.
        start = self._enter(batch, keep=self.keep_trained and not batch.own)
        if self._stack is not None:
            goal = self._goal(batch, targets)
            return self._stack.loss_and_gradients(start, places, goal, checkpointing=self.checkpointing)
        teacher = None if batch.teacher is None else _arrays(batch.teacher)
        (_, found), tree = self._differentiate(start, places, targets, teacher, self._objective_of(batch))
        gradients = dict(tree_flatten(tree))
        mx.eval(found, gradients)
        return _found(found), gradients

    def _goal(self, batch: Batch, targets: mx.array) -> Goal:
        return Goal(targets, batch.teacher, self._objective_of(batch))

    def _objective_of(self, batch: Batch) -> Objective | None:
        """What is minimised of a batch; of what the student wrote, the divergence alone."""
        return self._objective.without_text() if self._objective is not None and batch.own else self._objective

    def _evaluated(self, top: mx.array, targets: mx.array, batch: Batch) -> Found:
        if batch.teacher is None or self._objective is None:
            found = plain_loss(top, targets) if self._head is None else evaluate_loss(self._head, top, targets)
            return Found(found[0].item(), round(found[1].item()))
        teacher = _arrays(batch.teacher)
        if self._head is None:
            return _found(plain_distill(top, targets, teacher, self._objective)[1])
        return _found(evaluate_distill(self._head, top, targets, teacher, self._objective))

    def _enter(self, batch: Batch, *, keep: bool) -> mx.array:
        """What the trained part starts from: what the frozen part gives, or the tokens where it is not known."""
        if self._rows is not None:
            return self._rows.batch(batch, keep=keep)
        tokens = mx.array(batch.tokens)
        return tokens if self._trunk is None else self._trunk.below(tokens)

    def _ascend(self, start: mx.array) -> mx.array:
        """From what `_enter` gives to the hidden states below the head; to the logits where the head is not known."""
        if self._trunk is not None:
            return self._trunk.above(start)
        return self._model(start) if self._body is None else self._body(start)

    def _loss(
        self,
        start: mx.array,
        places: mx.array,
        targets: mx.array,
        teacher: tuple[mx.array, mx.array] | None,
        objective: Objective | None,
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        """What is minimised, and what it is made of: see `_found`."""
        with _twice_computed(self._model) if self.checkpointing else nullcontext():
            top = self._ascend(start)
        top = top.reshape(-1, top.shape[-1])[places]
        if teacher is None or objective is None:
            loss, correct = plain_loss(top, targets) if self._head is None else fused_loss(self._head, top, targets)
            return loss, (loss, correct)
        if self._head is None:
            return plain_distill(top, targets, teacher, objective)
        return fused_distill(self._head, top, targets, teacher, objective)


def _arrays(teacher: TeacherBuckets) -> tuple[mx.array, mx.array]:
    return mx.array(teacher.ids), mx.array(teacher.log_probs)


def _found(sums: tuple[mx.array, ...]) -> Found:
    """Of cross-entropy and count, or of cross-entropy, divergence and count."""
    entropy, *apart, correct = (value.item() for value in sums)
    return Found(entropy, round(correct), apart[0] if apart else None)


def _targets(batch: Batch) -> tuple[mx.array, mx.array]:
    """Where in B·T a target is predicted, and the targets, each (N,) int32."""
    rows, columns = np.nonzero(batch.loss_mask)
    places = rows * batch.tokens.shape[1] + columns - 1
    return mx.array(places.astype(np.int32)), mx.array(batch.tokens[rows, columns])


@contextmanager
def _twice_computed(model: nn.Module) -> Iterator[None]:
    """While open, layers with an adapter keep only what enters them, and are computed again for the gradient."""
    owner = next(m for _, m in model.named_modules() if isinstance(m.get("layers"), list))
    layers = owner.layers
    owner.layers = [_Twice(layer) if layer.trainable_parameters() else layer for layer in layers]
    try:
        yield
    finally:
        owner.layers = layers


class _Twice:
    """Stands for a layer, under `mx.checkpoint`.

    On the way back that calls the layer again, and dropout by itself would draw other masks. So both calls draw from
    the random state that the first one found; outside, the state goes on as if there had been that one alone.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> object:
        return getattr(self._layer, name)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        begun = ended = _random_state()

        def compute(parameters: Any, *inputs: Any, **options: Any) -> Any:
            nonlocal ended
            outside = _random_state()
            mx.random.seed(begun)
            # As arguments, so that their gradients are computed, too.
            self._layer.update(parameters)
            out = self._layer(*inputs, **options)
            ended = _random_state()
            mx.random.seed(outside)
            return out

        out = mx.checkpoint(compute)(self._layer.trainable_parameters(), *inputs, **options)
        mx.random.seed(ended)
        return out


def _random_state() -> int:
    """MLX's random state, as the seed that brings it about."""
    high, low = np.array(mx.random.state[0]).tolist()
    return int(high) << 32 | int(low)
