"""Load a student with mlx-lm, freeze it, and give it LoRA layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from numpy.typing import NDArray

from mlx_distill.backends.mlx.device import on_gpu
from mlx_distill.config import TrainConfig
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.models.folder import rotary_settings

#: Leaves of a module that an adapter trains: the two factors of LoRA, and DoRA's magnitude.
ADAPTER_LEAVES = {"lora_a", "lora_b", "m"}

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def load_frozen(folder: Path, *, dtype: str) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model with all its weights frozen.

    Args:
        folder: A model in Hugging Face layout.
        dtype: "auto" keeps the model's own type on a GPU, and is float32 on a CPU, whose half-precision
            products are some thirty times slower. Quantized weights stay quantized.

    Returns:
        The model and its configuration.

    Raises:
        ModelError: mlx-lm does not know the architecture, or the files are damaged.
    """
    try:
        model, config = load_model(folder, lazy=True, model_config=rotary_settings(folder))
    except (FileNotFoundError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder}: mlx-lm could not load this model: {error}",
            hint="Check that config.json and model*.safetensors are whole and of one model.",
        ) from error
    wanted = _DTYPES.get(dtype) or (None if on_gpu() else mx.float32)
    if wanted is not None:
        model.set_dtype(wanted)
    model.freeze()
    mx.eval(model.parameters())
    return model, config


def attach_lora(model: nn.Module, config: TrainConfig) -> None:
    """Put fresh LoRA layers on the last layers of a frozen model, in place.

    The first factor starts uniform in ±1/√in and the second at zero, as mlx-lm starts them, but drawn by numpy
    from the seed, in the order of the parameters' names, so that every backend starts from the same adapter.

    Raises:
        ConfigError: More layers are asked for than the model has, or the rank exceeds a matrix.
    """
    layers = num_adapter_layers(model, config)
    linear_to_lora_layers(model, layers, lora_parameters(config))
    shapes = adapter_shapes(model)
    smallest = min(shape[-2] if name.endswith("lora_a") else shape[-1] for name, shape in shapes.items())
    if config.rank > smallest:
        raise ConfigError(
            f"rank = {config.rank}: the smallest adapted matrix of {config.model} has rank {smallest}.",
            hint=f"Choose --rank 1 to {smallest}; 8 to 64 is usual.",
        )
    fresh = initial_adapter(shapes, seed=config.seed)
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in fresh.items()]))


def num_adapter_layers(model: nn.Module, config: TrainConfig) -> int:
    """How many layers, counted from the last, carry an adapter."""
    available = len(model.layers)
    if config.layers == "all":
        return available
    if not 0 < config.layers <= available:
        raise ConfigError(
            f"layers = {config.layers}: {config.model} has {available} layers.",
            hint=f"Choose 1 to {available}, or all.",
        )
    return config.layers


def lora_parameters(config: TrainConfig) -> dict[str, Any]:
    """The `lora_parameters` of mlx-lm's `adapter_config.json`."""
    return {"rank": config.rank, "scale": config.scale, "dropout": config.dropout}


def adapter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every adapter parameter of a model, by name."""
    flat = tree_flatten(model.trainable_parameters())
    return {name: tuple(value.shape) for name, value in sorted(flat)}


def initial_adapter(shapes: dict[str, tuple[int, ...]], *, seed: int) -> dict[str, NDArray[np.float32]]:
    """The adapter that training starts from.

    Args:
        shapes: `lora_a` is (in, rank), `lora_b` is (rank, out).
        seed: Of the run.
    """
    generator = np.random.default_rng(seed)
    values: dict[str, NDArray[np.float32]] = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("lora_a"):
            bound = 1.0 / np.sqrt(shape[-2])
            values[name] = generator.uniform(-bound, bound, size=shape).astype(np.float32)
        else:
            values[name] = np.zeros(shape, dtype=np.float32)
    return values


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put a trained adapter on a frozen model, in place.

    Raises:
        ModelError: The adapter is missing, damaged, or was made for another model.
    """
    from mlx_lm.tuner.utils import load_adapters

    try:
        load_adapters(model, str(folder))
    except (FileNotFoundError, json.JSONDecodeError, AttributeError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder}: this adapter does not load onto the model: {error}",
            hint="Use the base model that run.json names, or train again:  mlx-distill train --help",
        ) from error
