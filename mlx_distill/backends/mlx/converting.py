"""The same model with other weights: dense, or quantized. Tensor by tensor, so that it is never whole in memory."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import dequantize_model, quantize_model

from mlx_distill.backends.mlx.loading import DTYPES, load_lazily
from mlx_distill.backends.mlx.saving import write_model
from mlx_distill.errors import ModelError

#: Weights that share a scale, as mlx-lm has it by default.
GROUP_SIZE = 64


def write_dense(folder: Path, out: Path, *, dtype: str | None = None) -> None:
    """Write weights and configuration of a model with no matrix quantized.

    A quantized matrix is formed in float32 and rounded once.

    Args:
        folder: The model.
        out: A folder.
        dtype: Of the matrices that were quantized; None for that of their scales.

    Raises:
        ModelError: mlx-lm cannot load the model.
        ResourceError: The weights cannot be written, as on a full disk.
    """
    model, config = load_lazily(folder)
    _dequantize(model, None if dtype is None else DTYPES[dtype])
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    write_model(model, config, out, what="The model")


def write_quantized(folder: Path, out: Path, bits: int) -> int:
    """Write weights and configuration of a model with its matrices quantized, in groups of 64.

    What is quantized to these bits already stays as it is; what is quantized to others is dequantized first.

    Args:
        bits: Of a weight.

    Returns:
        How many matrices are quantized.

    Raises:
        ModelError: mlx-lm cannot load the model, or none of its matrices divides into groups.
        ResourceError: The weights cannot be written, as on a full disk.
    """
    model, config = load_lazily(folder)
    if any(module.bits != bits for _, module in model.named_modules() if "scales" in module):
        _dequantize(model, None)
        for key in ("quantization", "quantization_config"):
            config.pop(key, None)
    model, config = quantize_model(model, config, GROUP_SIZE, bits)
    count = sum("scales" in module for _, module in model.named_modules())
    if not count:
        raise ModelError(
            f"{folder}: no matrix of this model divides into groups of {GROUP_SIZE}.", hint="Leave --quantize out."
        )
    write_model(model, config, out, what="The model")
    return count


def _dequantize(model: nn.Module, dtype: mx.Dtype | None) -> None:
    wanted: dict[str, mx.Dtype] = {}
    for name, module in model.named_modules():
        if "scales" not in module:
            continue
        affine = getattr(module, "mode", "affine") == "affine"
        wanted[f"{name}.weight"] = dtype or (module.scales.dtype if affine else mx.bfloat16)
        if affine:
            # In half precision each product of code and scale would be rounded. Other modes' are exact in theirs.
            module.scales, module.biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
    dequantize_model(model)
    model.update(
        tree_map_with_path(
            lambda name, value: value.astype(wanted[name]) if name in wanted else value, model.parameters()
        )
    )
