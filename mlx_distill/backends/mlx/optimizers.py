"""The optimizers of adapters: MLX's own, with weight decay that is decoupled and knows what it may pull at.

Decay draws the factors of LoRA towards zero, where they say nothing. A DoRA magnitude that says nothing is the norm of
the row it scales, so no vector is decayed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from numpy.typing import NDArray

from mlx_distill.config import TrainConfig

#: Of Muon, as its author has them: momentum, and the polynomial that draws singular values towards 1.
_MOMENTUM = 0.95
_ITERATIONS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
#: Root mean square of AdamW's usual update, in learning rates (Liu et al., 2025, arXiv:2502.16982).
_ADAMW_SIZE = 0.2


class AdapterOptimizer:
    """Updates the trainable parameters of a model.

    Args:
        config: Names the optimizer and its weight decay.
        model: Its trainable parameters are float32.
    """

    def __init__(self, config: TrainConfig, model: nn.Module) -> None:
        self._rule = _make_rule(config)
        self._decay = 0.0 if config.optimizer == "adam" else config.weight_decay
        self._rule.init(model.trainable_parameters())

    def update(self, model: nn.Module, gradient: dict[str, Any], learning_rate: float) -> None:
        """Take one step.

        Args:
            gradient: The tree of the model's trainable parameters.
            learning_rate: Of this step; the schedule lives in the training loop.
        """
        rate = mx.array(learning_rate)
        keep = 1 - rate * self._decay
        self._rule.learning_rate = rate
        before = tree_map(lambda p: p * keep if p.ndim > 1 else p, model.trainable_parameters())
        model.update(self._rule.apply_gradients(gradient, before))
        mx.eval(model.trainable_parameters(), self._rule.state)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """A copy of its state, by name."""
        return {name: np.array(value) for name, value in tree_flatten(self._rule.state)}

    def restore(self, arrays: Iterable[tuple[str, mx.array]]) -> None:
        """Go on from a state that `arrays` gave."""
        self._rule.state = tree_unflatten(list(arrays))
        mx.eval(self._rule.state)


def _make_rule(config: TrainConfig) -> optim.Optimizer:
    rate = config.learning_rate
    match config.optimizer:
        case "adam" | "adamw":
            return optim.Adam(rate, bias_correction=True)
        case "lion":
            return optim.Lion(rate)
        case "adafactor":
            # By itself it would take its own learning rate, and scale it by each matrix's size: LoRA's second factor
            # starts at zero and would hardly move.
            return optim.Adafactor(rate, relative_step=False, scale_parameter=False)
        case "muon":
            return _Muon(rate, bias_correction=True)


class _Muon(optim.Adam):  # type: ignore[misc]  # MLX has no types
    """Muon (Jordan et al., 2024) for matrices, Adam for vectors, which have no direction to make orthogonal.

    MLX's own scales an update by its matrix's shape as (out, in), which LoRA's factors are not: theirs are (in, rank)
    and (rank, out). Here updates are as large as AdamW's whatever the shape, so that one learning rate suits both.
    """

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        if parameter.ndim < 2:
            super().init_single(parameter, state)
        else:
            state["m"] = mx.zeros_like(parameter)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        if parameter.ndim < 2:
            return super().apply_single(gradient, parameter, state)
        state["m"] = _MOMENTUM * state["m"] + (1 - _MOMENTUM) * gradient
        ahead = _MOMENTUM * state["m"] + (1 - _MOMENTUM) * gradient
        size = _ADAMW_SIZE * math.sqrt(max(parameter.shape[-2:]))
        return parameter - self.learning_rate * size * orthogonalised(ahead)


def orthogonalised(matrices: mx.array) -> mx.array:
    """Draw all singular values of matrices to about 1 (0.7 to 1.2), by an iteration after Newton and Schulz.

    Args:
        matrices: (…, M, N), float32. Singular values below a hundredth of the largest come only part of the way, and
            a matrix of zeros stays one.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalised(matrices.swapaxes(-1, -2)).swapaxes(-1, -2)
    a, b, c = _COEFFICIENTS
    out = matrices / (mx.linalg.norm(matrices, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = out @ out.swapaxes(-1, -2)
        out = a * out + (b * gram + c * gram @ gram) @ out
    return out
