"""The learning rate at each step."""

from __future__ import annotations

import math

from mlx_distill.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Linear warm-up to the peak, then the chosen schedule down to its final share.

    Args:
        config: Names the schedule, the peak, the warm-up's share of all steps and the final share.
        step: Optimizer steps taken before this one, from 0.
        total_steps: Of the whole run.
    """
    peak = config.learning_rate
    warmup_steps = round(config.warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if config.schedule == "constant":
        return peak
    remaining = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (config.final_learning_rate + (1 - config.final_learning_rate) * remaining)
