"""Load a student with mlx-lm, freeze it, and give it an adapter: LoRA or DoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from mlx_distill.backends.adapters import (
    choose_targets,
    initial_adapter,
    lora_parameters,
    num_adapter_layers,
    require_rank,
)
from mlx_distill.backends.mlx.device import explained_allocation, on_gpu
from mlx_distill.config import TrainConfig
from mlx_distill.errors import ConfigError, ModelError, ResourceError
from mlx_distill.models.folder import rotary_settings

#: Leaves of a module that an adapter trains: the two factors of LoRA, and DoRA's magnitude.
ADAPTER_LEAVES = {"lora_a", "lora_b", "m"}

#: What mlx-lm adapts.
_MATRICES = (
    nn.Linear,
    nn.QuantizedLinear,
    SwitchLinear,
    QuantizedSwitchLinear,
    nn.Embedding,
    nn.QuantizedEmbedding,
)

_ADVICE = "Close other programs, or choose a smaller model or a 4-bit copy of this one."

#: By name.
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def load_lazily(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A model whose weights are read when they are asked for, and its configuration.

    Args:
        folder: A model in Hugging Face layout.

    Raises:
        ModelError: mlx-lm does not know the architecture, or the files are damaged.
        ResourceError: The machine is out of memory.
    """
    try:
        with explained_allocation(_ADVICE):
            model, config = load_model(folder, lazy=True, model_config=rotary_settings(folder))
    except ResourceError:
        raise
    except (FileNotFoundError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder}: mlx-lm could not load this model: {error}",
            hint="Check that config.json and model*.safetensors are whole and of one model.",
        ) from error
    return model, config


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
        ResourceError: The machine is out of memory.
    """
    model, config = load_lazily(folder)
    wanted = DTYPES.get(dtype) or (None if on_gpu() else mx.float32)
    if wanted is not None:
        model.set_dtype(wanted)
    model.freeze()
    with explained_allocation(_ADVICE):
        mx.eval(model.parameters())
    return model, config


def attach_adapter(model: nn.Module, config: TrainConfig) -> dict[str, Any]:
    """Put a fresh adapter on the last layers of a frozen model, in place.

    The first factor of LoRA starts uniform in ±1/√in and the second at zero, as mlx-lm starts them, but drawn by numpy
    from the seed, in the order of the parameters' names, so that every backend starts from the same adapter. A DoRA
    magnitude starts as the norm of the row that it scales, so that either kind changes nothing at first.

    Returns:
        What mlx-lm's `adapter_config.json` says of it: `fine_tune_type`, `num_layers` and `lora_parameters`.

    Raises:
        ConfigError: More layers are asked for than the model has, a target is no matrix of theirs, the rank exceeds a
            matrix, or DoRA is asked for where there is none.
    """
    layers = num_adapter_layers(len(model.layers), config)
    matrices = _matrices(model, layers)
    keys = choose_targets(matrices, config)
    chosen = matrices if keys is None else {key: matrices[key] for key in keys}
    _check_kind(chosen, config)
    require_rank({name: min(map(_full_rank, modules)) for name, modules in chosen.items()}, config)
    parameters = lora_parameters(config, keys)
    linear_to_lora_layers(model, layers, parameters, use_dora=config.adapter == "dora")
    fresh = initial_adapter(adapter_shapes(model), seed=config.seed)
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in fresh.items()]))
    return {"fine_tune_type": config.adapter, "num_layers": layers, "lora_parameters": parameters}


def adapter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every adapter parameter of a model, by name."""
    flat = tree_flatten(model.trainable_parameters())
    return {name: tuple(value.shape) for name, value in sorted(flat)}


def _matrices(model: nn.Module, layers: int) -> dict[str, list[nn.Module]]:
    """What can be adapted in the last layers, by its name within a layer, as mlx-lm finds it."""
    found: dict[str, list[nn.Module]] = {}
    for layer in model.layers[-layers:]:
        for name, module in layer.named_modules():
            if isinstance(module, _MATRICES) or hasattr(module, "to_lora"):
                found.setdefault(name, []).append(module)
    return dict(sorted(found.items()))


def _check_kind(matrices: dict[str, list[nn.Module]], config: TrainConfig) -> None:
    if config.adapter != "dora":
        return
    able = [name for name, modules in matrices.items() if all(map(_takes_dora, modules))]
    if len(able) < len(matrices):
        hint = "Choose --adapter lora" + (f", or leave them out:  --targets {','.join(able)}" if able else ".")
        raise ConfigError(
            f"adapter = dora: mlx-lm has no DoRA for {', '.join(name for name in matrices if name not in able)} "
            f"of {config.model}.",
            hint=hint,
        )


def _takes_dora(module: nn.Module) -> bool:
    # Experts, embeddings and matrices that are several in one do not. Of a quantized matrix mlx-lm takes its width
    # to be a whole number of values a word.
    plain = isinstance(module, nn.Linear) or (isinstance(module, nn.QuantizedLinear) and 32 % module.bits == 0)
    return plain and not hasattr(module, "to_lora")


def _full_rank(module: nn.Module) -> int:
    rows, columns = module.weight.shape[-2:]
    # A word of a quantized matrix holds several values.
    return int(min(rows, columns * 32 // module.bits if "scales" in module else columns))


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put a trained adapter on a frozen model, in place.

    Raises:
        ModelError: The adapter is missing, damaged, or was made for another model.
        ResourceError: The machine is out of memory.
    """
    from mlx_lm.tuner.utils import load_adapters

    try:
        with explained_allocation(_ADVICE):
            load_adapters(model, str(folder))
    except ResourceError:
        raise
    except (FileNotFoundError, json.JSONDecodeError, AttributeError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder}: this adapter does not load onto the model: {error}",
            hint="Use the base model that run.json names, or train again:  mlx-distill train --help",
        ) from error
