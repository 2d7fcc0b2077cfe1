"""What an adapter is, whichever backend trains it: where it sits, how it starts, what its file says of it."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_distill.config import TrainConfig
from mlx_distill.errors import ConfigError
from mlx_distill.layout import RunFolder, write_text


def num_adapter_layers(available: int, config: TrainConfig) -> int:
    """How many layers, counted from the last, carry an adapter.

    Args:
        available: Layers of the model.

    Raises:
        ConfigError: More are asked for.
    """
    if config.layers == "all":
        return available
    if not 0 < config.layers <= available:
        raise ConfigError(
            f"layers = {config.layers}: {config.model} has {available} layers.",
            hint=f"Choose 1 to {available}, or all.",
        )
    return config.layers


def lora_parameters(config: TrainConfig, keys: Collection[str] | None = None) -> dict[str, Any]:
    """The `lora_parameters` of mlx-lm's `adapter_config.json`.

    mlx-lm knows no rank-stabilised LoRA (Kalajdzievski, 2023, arXiv:2312.03732) and need not: it is a larger scale.

    Args:
        keys: The matrices of a layer that are adapted; None for all.
    """
    scale = config.scale * math.sqrt(config.rank) if config.rslora else config.scale
    parameters = {"rank": config.rank, "scale": scale, "dropout": config.dropout}
    return parameters if keys is None else {**parameters, "keys": list(keys)}


def initial_adapter(shapes: dict[str, tuple[int, ...]], *, seed: int) -> dict[str, NDArray[np.float32]]:
    """The factors that training starts from; a magnitude follows from the base's weights, and is not among them.

    Args:
        shapes: `lora_a` is (in, rank), and (experts, rank, in) for experts; `lora_b` is (rank, out).
        seed: Of the run.
    """
    generator = np.random.default_rng(seed)
    values: dict[str, NDArray[np.float32]] = {}
    for name, shape in sorted(shapes.items()):
        # A matrix that is several in one has its factors numbered: lora_a.0, lora_a.1.
        leaf = next(part for part in reversed(name.split(".")) if not part.isdigit())
        if leaf == "lora_a":
            bound = 1.0 / np.sqrt(shape[0] if len(shape) == 2 else shape[-1])
            values[name] = generator.uniform(-bound, bound, size=shape).astype(np.float32)
        elif leaf == "lora_b":
            values[name] = np.zeros(shape, dtype=np.float32)
    return values


def choose_targets(names: Collection[str], config: TrainConfig) -> list[str] | None:
    """The names that the targets mean, each by its end: q_proj is self_attn.q_proj. None for all.

    Args:
        names: Of the matrices of a layer.

    Raises:
        ConfigError: A target is none of them.
    """
    targets = [part.strip() for part in config.targets.split(",")]
    if targets == ["all"]:
        return None
    chosen: set[str] = set()
    for target in targets:
        meant = {name for name in names if f".{name}".endswith(f".{target}")} if target else set()
        if not meant:
            near = difflib.get_close_matches(target, {*names, *(name.rpartition(".")[2] for name in names)}, n=1)
            raise ConfigError(
                f"targets = {config.targets!r}: the adapted layers of {config.model} have no matrix {target!r}"
                + (f" (did you mean {near[0]}?)." if near else "."),
                hint=f"Choose from {', '.join(names)}; or all.",
            )
        chosen |= meant
    return sorted(chosen)


def require_rank(ranks: Mapping[str, int], config: TrainConfig) -> None:
    """Make sure that no adapted matrix has a lower rank than its adapter.

    Args:
        ranks: Of the adapted matrices, by name.

    Raises:
        ConfigError: One has.
    """
    smallest = min(ranks, key=lambda name: ranks[name])
    if config.rank > ranks[smallest]:
        raise ConfigError(
            f"rank = {config.rank}: the smallest adapted matrix of {config.model}, {smallest}, "
            f"has rank {ranks[smallest]}.",
            hint=f"Choose --rank 1 to {ranks[smallest]}; 8 to 64 is usual.",
        )


def write_adapter_config(files: RunFolder, settings: Mapping[str, Any], config: TrainConfig) -> None:
    """Write mlx-lm's `adapter_config.json`.

    Args:
        settings: `fine_tune_type`, `num_layers` and `lora_parameters`.
        config: Names the base model.
    """
    write_text(files.adapter_config, json.dumps({**settings, "model": config.model}, indent=2) + "\n")
