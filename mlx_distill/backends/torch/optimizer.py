"""torch's Adam with decoupled weight decay, whose state is known by the names that MLX's has."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from mlx_distill.backends.torch.loading import AdapterParameter
from mlx_distill.config import TrainConfig
from mlx_distill.errors import ConfigError

#: torch's name of each moment, and MLX's.
_MOMENTS = {"exp_avg": "m", "exp_avg_sq": "v"}


class AdapterOptimizer:
    """Updates an adapter.

    Args:
        config: Names the optimizer and its weight decay.
        trained: The parameters, by mlx-lm's names.

    Raises:
        ConfigError: torch has no such optimizer, or another of the same name.
    """

    def __init__(self, config: TrainConfig, trained: Mapping[str, AdapterParameter]) -> None:
        if config.optimizer not in ("adam", "adamw"):
            raise ConfigError(
                f"optimizer = {config.optimizer}: the torch backend, a reference, has adamw and adam.",
                hint="Choose --optimizer adamw, or --backend mlx.",
            )
        self._trained = trained
        decay = 0.0 if config.optimizer == "adam" else config.weight_decay
        # As in the MLX backend: a DoRA magnitude, a vector, is not drawn towards zero.
        groups = [
            {"params": [one.parameter for one in trained.values() if one.parameter.ndim > 1], "weight_decay": decay},
            {"params": [one.parameter for one in trained.values() if one.parameter.ndim < 2], "weight_decay": 0.0},
        ]
        self._rule = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate)

    def update(self, learning_rate: float) -> None:
        """Take one step along the gradients that the parameters hold."""
        for group in self._rule.param_groups:
            group["lr"] = learning_rate
        self._rule.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._rule.zero_grad(set_to_none=True)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """A copy of its state, as MLX's Adam has it."""
        first = self._rule.state.get(next(iter(self._trained.values())).parameter, {})
        found: dict[str, NDArray[np.generic]] = {
            "step": np.array(int(first.get("step", 0)), np.uint64),
            "learning_rate": np.array(self._rule.param_groups[0]["lr"], np.float32),
        }
        for name, one in self._trained.items():
            state = self._rule.state.get(one.parameter, {})
            for ours, theirs in _MOMENTS.items():
                found[f"{name}.{theirs}"] = one.to_mlx(state.get(ours, torch.zeros_like(one.parameter)))
        return found

    def restore(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Go on from a state that `arrays`, here or in the MLX backend, gave."""
        step = int(arrays["step"])
        self._rule.state.clear()
        if not step:
            return
        for name, one in self._trained.items():
            self._rule.state[one.parameter] = {
                "step": torch.tensor(float(step)),
                **{ours: one.from_mlx(arrays[f"{name}.{theirs}"]) for ours, theirs in _MOMENTS.items()},
            }
