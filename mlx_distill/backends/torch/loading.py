"""Load a student with transformers, freeze it, and give it peft's LoRA or DoRA under mlx-lm's names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mlx_distill.backends.adapters import (
    choose_targets,
    initial_adapter,
    lora_parameters,
    num_adapter_layers,
    require_rank,
)
from mlx_distill.config import TrainConfig
from mlx_distill.errors import ConfigError, ModelError

_ADAPTER = "default"

#: Of peft's parameters: what mlx-lm calls them, and whether it has them the other way round.
_LEAVES = {
    f"lora_A.{_ADAPTER}.weight": ("lora_a", True),
    f"lora_B.{_ADAPTER}.weight": ("lora_b", True),
    f"lora_magnitude_vector.{_ADAPTER}.weight": ("m", False),
}


@dataclass(frozen=True)
class AdapterParameter:
    """One trainable parameter.

    Attributes:
        parameter: Of peft's.
        transposed: Whether mlx-lm has it the other way round.
    """

    parameter: nn.Parameter
    transposed: bool

    def to_mlx(self, value: torch.Tensor) -> NDArray[np.float32]:
        """The parameter, or what is shaped like it, as mlx-lm has it: a copy."""
        array = value.detach().to("cpu", torch.float32).numpy()
        return np.array(array.T if self.transposed else array, order="C")

    def from_mlx(self, array: NDArray[np.generic]) -> torch.Tensor:
        """The reverse of `to_mlx`, on the parameter's device."""
        value = torch.from_numpy(np.array(array.T if self.transposed else array, dtype=np.float32, order="C"))
        return value.to(self.parameter.device)


def load_frozen(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load a model with all its weights frozen.

    Raises:
        ModelError: transformers does not know the architecture, the files are damaged, or quantized for MLX.
    """
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization" in settings:
        raise ModelError(
            f"{folder} is quantized for MLX, which torch cannot compute.",
            hint="Take the model it was made from, or --backend mlx.",
        )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{folder}: transformers could not load this model: {error}",
            hint="Check that config.json and model*.safetensors are whole and of one model.",
        ) from error
    return model.requires_grad_(False).to(device)


def attach_adapter(
    model: nn.Module, config: TrainConfig
) -> tuple[nn.Module, dict[str, AdapterParameter], dict[str, Any]]:
    """Put a fresh adapter on the last layers of a frozen model: the very one that the MLX backend starts from.

    Returns:
        The model; its trainable parameters by mlx-lm's names, in their order; and what mlx-lm's `adapter_config.json`
        says of the adapter.

    Raises:
        ConfigError: As the MLX backend has it.
    """
    prefix, owner = _layers(model)
    count = num_adapter_layers(len(owner), config)
    first = len(owner) - count
    matrices: dict[str, list[tuple[str, nn.Linear]]] = {}
    for at in range(first, len(owner)):
        for name, module in owner[at].named_modules():
            if isinstance(module, nn.Linear):
                matrices.setdefault(name, []).append((f"{prefix}.{at}.{name}", module))
    keys = choose_targets(sorted(matrices), config)
    chosen = matrices if keys is None else {key: matrices[key] for key in keys}
    require_rank({name: min(min(m.weight.shape) for _, m in found) for name, found in chosen.items()}, config)
    parameters = lora_parameters(config, keys)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=parameters["scale"] * config.rank,
        lora_dropout=config.dropout,
        target_modules=[path for found in chosen.values() for path, _ in found],
        use_dora=config.adapter == "dora",
        bias="none",
    )
    with warnings.catch_warnings():
        # peft looks at what transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, lora, adapter_name=_ADAPTER)
    trained = dict(sorted(_parameters(adapted)))
    shapes = {name: _mlx_shape(one) for name, one in trained.items()}
    put(trained, initial_adapter(shapes, seed=config.seed))
    return adapted, trained, {"fine_tune_type": config.adapter, "num_layers": count, "lora_parameters": parameters}


def put(trained: Mapping[str, AdapterParameter], values: Mapping[str, NDArray[np.generic]]) -> None:
    """Set trainable parameters.

    Raises:
        ModelError: A value is of another model's adapter.
    """
    with torch.no_grad():
        for name, value in values.items():
            one = trained.get(name)
            if one is None or _mlx_shape(one) != value.shape:
                raise ModelError(
                    f"The adapter has a parameter {name} of shape {value.shape} that the model has not.",
                    hint="Use the base model that run.json names.",
                )
            one.parameter.copy_(one.from_mlx(value))


def _mlx_shape(one: AdapterParameter) -> tuple[int, ...]:
    shape = tuple(one.parameter.shape)
    return shape[::-1] if one.transposed else shape


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers, and its name."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError("This model has no list of layers.", hint="Choose --backend mlx, or another model.")
    return max(lists, key=lambda found: len(found[1]))


def _parameters(model: nn.Module) -> Iterator[tuple[str, AdapterParameter]]:
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = next((leaf for leaf in _LEAVES if path.endswith(f".{leaf}")), None)
        if leaf is None:
            raise ConfigError(f"peft trains {path}, which mlx-lm has no name for.", hint="Choose --adapter lora.")
        name, transposed = _LEAVES[leaf]
        module = path.removeprefix("base_model.model.").removesuffix(f".{leaf}")
        yield f"{module}.{name}", AdapterParameter(parameter, transposed)
