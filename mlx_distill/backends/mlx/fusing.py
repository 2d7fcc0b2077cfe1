"""Merge LoRA factors into the weights they adapt."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.utils import load_model, save_config, save_model

from mlx_distill.backends.mlx.loading import load_adapter
from mlx_distill.errors import ModelError
from mlx_distill.models.folder import rotary_settings


def fuse_into(base: Path, adapter: Path, out: Path) -> int:
    """Write the weights and configuration of base + adapter.

    The sum is formed in float32 and rounded once, to the type that the base's weights have on disk. A quantized
    layer is fused by mlx-lm: dequantized, summed, quantized again.

    Args:
        base: Folder of the model that the adapter was trained on.
        adapter: Folder with `adapters.safetensors` and `adapter_config.json`.
        out: An empty folder.

    Returns:
        How many layers were changed.

    Raises:
        ModelError: The adapter does not fit the base.
    """
    model, config = load_model(base, lazy=True, model_config=rotary_settings(base))
    load_adapter(model, adapter)
    fused = [(name, _fuse(module)) for name, module in model.named_modules() if hasattr(module, "fuse")]
    if not fused:
        raise ModelError(f"{adapter}: this adapter changes no layer of {base}.")
    model.update_modules(tree_unflatten(fused))
    save_model(out, model, donate_model=True)
    save_config(config, out / "config.json")
    return len(fused)


def _fuse(module: nn.Module) -> nn.Module:
    linear = module.linear if hasattr(module, "linear") else None
    if not isinstance(linear, nn.Linear):
        return module.fuse()
    dtype = linear.weight.dtype
    linear.weight = linear.weight.astype(mx.float32)
    result = module.fuse()
    result.weight = result.weight.astype(dtype)
    mx.eval(result.weight)
    return result
