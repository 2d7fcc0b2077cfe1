"""Merge an adapter into the weights it adapts."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import load_model, save_config, save_model

from mlx_distill.backends.mlx.loading import load_adapter
from mlx_distill.errors import ModelError, ResourceError
from mlx_distill.models.folder import rotary_settings


def fuse_into(base: Path, adapter: Path, out: Path) -> int:
    """Write the weights and configuration of base + adapter.

    A matrix is formed in float32 and rounded once, to the type that the base's weights have on disk; where those are
    quantized, it is then quantized as they were. What is no single matrix, such as experts, is fused by mlx-lm.

    Args:
        base: Folder of the model that the adapter was trained on.
        adapter: Folder with `adapters.safetensors` and `adapter_config.json`.
        out: An empty folder.

    Returns:
        How many layers were changed.

    Raises:
        ModelError: The adapter does not fit the base.
        ResourceError: The weights cannot be written, as on a full disk.
    """
    model, config = load_model(base, lazy=True, model_config=rotary_settings(base))
    load_adapter(model, adapter)
    fused = [(name, _fuse(module)) for name, module in model.named_modules() if hasattr(module, "fuse")]
    if not fused:
        raise ModelError(f"{adapter}: this adapter changes no layer of {base}.")
    model.update_modules(tree_unflatten(fused))
    try:
        save_model(out, model, donate_model=True)
    except RuntimeError as error:
        # MLX has no other for a file that it cannot write.
        raise ResourceError(
            f"The fused model could not be written to {out.parent}: {error}", hint="Free some space there."
        ) from error
    save_config(config, out / "config.json")
    return len(fused)


def _fuse(module: nn.Module) -> nn.Module:
    base = getattr(module, "linear", None)
    if not isinstance(module, (LoRALinear, DoRALinear)) or not isinstance(base, (nn.Linear, nn.QuantizedLinear)):
        return module.fuse()
    fused = nn.Linear(1, 1, bias=False)
    if "bias" in base:
        fused.bias = base.bias
    weight, dtype = _dense(base)
    weight = weight + (module.scale * module.lora_b.T) @ module.lora_a.T
    if isinstance(module, DoRALinear):
        weight = weight * (module.m / mx.linalg.norm(weight, axis=1))[:, None]
    fused.weight = weight.astype(dtype)
    if isinstance(base, nn.QuantizedLinear):
        fused = nn.QuantizedLinear.from_linear(fused, base.group_size, base.bits, mode=base.mode)
    mx.eval(fused.parameters())
    return fused


def _dense(linear: nn.Linear | nn.QuantizedLinear) -> tuple[mx.array, mx.Dtype]:
    """A matrix in float32, and the type that it has on disk or is dequantized to."""
    if isinstance(linear, nn.Linear):
        return linear.weight.astype(mx.float32), linear.weight.dtype
    scales, biases = linear.scales, linear.biases
    if linear.mode == "affine":
        # In half precision each product of code and scale would be rounded. Other modes' are exact in theirs.
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    weight = mx.dequantize(
        linear.weight, scales, biases, group_size=linear.group_size, bits=linear.bits, mode=linear.mode
    )
    return weight.astype(mx.float32), linear.scales.dtype if linear.mode == "affine" else weight.dtype
