"""Merge an adapter into the weights it adapts, one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from pydantic import BaseModel, Field

from mlx_distill import layout
from mlx_distill.backends.mlx.loading import ADAPTER_LEAVES, load_adapter, load_lazily
from mlx_distill.backends.mlx.rounding import key_of, rounded
from mlx_distill.backends.mlx.saving import write_model
from mlx_distill.errors import ModelError

#: Values of a matrix that exist in float32 at once, with some ten times as much beside them as they are rounded.
_VALUES = 2**16

#: Types that weights have, the coarsest first.
_DTYPES = ("bfloat16", "float16", "float32")

_HINT = "Train again:  mlx-distill train --help"


class _Parameters(BaseModel):
    """Of `adapter_config.json`, what mlx-lm makes layers of."""

    rank: int = Field(gt=0)
    scale: float
    dropout: float = Field(ge=0, lt=1)
    keys: list[str] | None = None


class _AdapterConfig(BaseModel):
    """What mlx-lm needs of `adapter_config.json`; there may be more in it."""

    fine_tune_type: Literal["lora", "dora"] = "lora"
    num_layers: int
    lora_parameters: _Parameters


@dataclass(frozen=True)
class Fused:
    """What was written.

    Attributes:
        layers: How many were changed.
        quantized: How many of these the base holds quantized.
        dtype: The coarsest type that a changed matrix, or the scales of one, was rounded to, such as "bfloat16".
    """

    layers: int
    quantized: int
    dtype: str


def require_adapter(folder: Path) -> None:
    """Refuse an adapter whose two files are not whole or not of each other, before a model is loaded.

    Args:
        folder: With `adapters.safetensors` and `adapter_config.json`.

    Raises:
        InputError: `adapter_config.json` is missing, or is not what mlx-lm reads; says why.
        ModelError: The same of the weights, or they are of another rank.
    """
    files = layout.RunFolder(folder)
    rank = layout.read_record(files.adapter_config, _AdapterConfig, hint=_HINT).lora_parameters.rank
    try:
        weights = mx.load(str(files.adapter))
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"{files.adapter}: this adapter does not load: {error}", hint=_HINT) from error
    assert isinstance(weights, dict)
    if not weights:
        raise ModelError(f"{files.adapter}: this adapter does not load: it holds no weights.", hint=_HINT)
    for name, value in weights.items():
        # Experts' factors have another order, and a magnitude has no rank.
        found = {"lora_a": value.shape[-1:], "lora_b": value.shape[:1]}.get(name.rpartition(".")[2])
        if found and value.ndim == 2 and found != (rank,):
            raise ModelError(
                f"{files.adapter}: this adapter does not load: {name} is of rank {found[0]}, and "
                f"{files.adapter_config.name} says {rank}.",
                hint=f"The two files are not of one adapter. {_HINT}",
            )


def fuse_into(base: Path, adapter: Path, out: Path, *, dequantize: bool = False) -> Fused:
    """Write the weights and configuration of base + adapter.

    A matrix is formed in float32 and rounded once, by chance, to the type that the base's weights have on disk; where
    those are quantized, it is quantized as they were instead, unless it is to stay dequantized. What is no single
    matrix, such as experts, is fused by mlx-lm. A fused matrix takes the place of the old one before the next is made:
    beyond the model itself, less memory is held than a layer's weights take.

    Args:
        base: Folder of the model that the adapter was trained on.
        adapter: Folder with `adapters.safetensors` and `adapter_config.json`.
        out: A folder without weights.
        dequantize: Leave the changed matrices of a quantized base in the type of their scales. All others stay
            quantized, which mlx-lm loads as it is.

    Raises:
        ModelError: The adapter does not fit the base.
        ResourceError: The weights cannot be written, as on a full disk.
    """
    model, config = load_lazily(base)
    load_adapter(model, adapter)
    # Names alone: a list of the modules would keep all old weights.
    names = [name for name, module in model.named_modules() if hasattr(module, "fuse")]
    if not names:
        raise ModelError(f"{adapter}: this adapter changes no layer of {base}.")
    _require_whole(model, names, layout.RunFolder(adapter))
    quantized: list[str] = []
    dtypes: set[str] = set()
    for name in names:
        module = _module(model, name)
        if _is_quantized(module):
            quantized.append(name)
        fused = _fuse(name, module, dequantize=dequantize)
        model.update_modules(tree_unflatten([(name, fused)]))
        dtypes.add(_dtype(fused))
        del module, fused
    mx.clear_cache()
    if dequantize:
        for name in quantized:
            config["quantization"][name] = False
    _save(model, config, out)
    return Fused(len(names), len(quantized), next(dtype for dtype in _DTYPES if dtype in dtypes))


def _require_whole(model: nn.Module, names: Sequence[str], files: layout.RunFolder) -> None:
    """mlx-lm puts fresh factors where the file has none: nothing is then learned there, and DoRA is not LoRA."""
    held = set(mx.load(str(files.adapter)))
    # A module that is several in one has its factors numbered.
    held |= {name.rpartition(".")[0] for name in held}
    wanted = [f"{name}.{leaf}" for name in names for leaf in sorted(ADAPTER_LEAVES) if leaf in _module(model, name)]
    if missing := [name for name in wanted if name not in held]:
        raise ModelError(
            f"{files.adapter}: this adapter does not load: it lacks {len(missing)} of the {len(wanted)} tensors that "
            f"{files.adapter_config.name} tells of, such as {missing[0]}.",
            hint=f"The two files are not of one adapter. {_HINT}",
        )


def _save(model: nn.Module, config: dict[str, Any], out: Path) -> None:
    size = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    layout.require_disk(out, size, what="The fused model")
    write_model(model, config, out, what="The fused model")
    mx.clear_cache()


def _module(model: nn.Module, name: str) -> nn.Module:
    at: Any = model
    for part in name.split("."):
        at = at[int(part) if isinstance(at, list) else part]
    assert isinstance(at, nn.Module)
    return at


def _inner(module: nn.Module) -> nn.Module | None:
    """What an adapter sits on."""
    return next((module[part] for part in ("linear", "embedding") if part in module), None)


def _is_quantized(module: nn.Module) -> bool:
    inner = _inner(module)
    return inner is not None and "scales" in inner


def _dtype(module: nn.Module) -> str:
    """The coarsest type of a module's values. Scales of modes other than affine are no numbers, and mean bfloat16."""
    found = {str(value.dtype).removeprefix("mlx.core.") for _, value in tree_flatten(module.parameters())}
    return next((dtype for dtype in _DTYPES if dtype in found), _DTYPES[0])


def _fuse(name: str, module: nn.Module, *, dequantize: bool) -> nn.Module:
    base = _inner(module)
    if not isinstance(module, LoRALinear | DoRALinear) or not isinstance(base, nn.Linear | nn.QuantizedLinear):
        fused = module.fuse(dequantize=dequantize)
        mx.eval(fused.parameters())
        return fused
    fused = nn.Linear(1, 1, bias=False)
    if "bias" in base:
        fused.bias = base.bias
    quantize = isinstance(base, nn.QuantizedLinear) and not dequantize
    # Next to the steps of a quantized matrix those of its scales' type are nothing, and chance would be noise alone.
    fused.weight = _merged(module, base, None if quantize else name)
    if isinstance(base, nn.QuantizedLinear) and quantize:
        fused = nn.QuantizedLinear.from_linear(fused, base.group_size, base.bits, mode=base.mode)
    mx.eval(fused.parameters())
    return fused


def _merged(module: LoRALinear | DoRALinear, base: nn.Linear | nn.QuantizedLinear, name: str | None) -> mx.array:
    """The matrix (out, in) that base and adapter stand for, rounded once: by the chance of its name, or to nearest."""
    made: list[mx.array] = []
    at_once = max(1, _VALUES // module.lora_a.shape[0])
    for start in range(0, base.weight.shape[0], at_once):
        rows = slice(start, start + at_once)
        weight, dtype = _dense(base, rows)
        weight = weight + (module.scale * module.lora_b[:, rows].T) @ module.lora_a.T
        if isinstance(module, DoRALinear):
            weight = weight * (module.m[rows] / mx.linalg.norm(weight, axis=1))[:, None]
        made.append(weight.astype(dtype) if name is None else rounded(weight, dtype, key_of(name, start)))
        mx.eval(made[-1])
    return made[0] if len(made) == 1 else mx.concatenate(made)


def _dense(linear: nn.Linear | nn.QuantizedLinear, rows: slice) -> tuple[mx.array, mx.Dtype]:
    """Rows of a matrix in float32, and the type that it has on disk or is dequantized to."""
    if isinstance(linear, nn.Linear):
        return linear.weight[rows].astype(mx.float32), linear.weight.dtype
    scales, biases = linear.scales[rows], None
    if linear.mode == "affine":
        # In half precision each product of code and scale would be rounded. Other modes' are exact in theirs.
        scales, biases = scales.astype(mx.float32), linear.biases[rows].astype(mx.float32)
    weight = mx.dequantize(
        linear.weight[rows], scales, biases, group_size=linear.group_size, bits=linear.bits, mode=linear.mode
    )
    return weight.astype(mx.float32), linear.scales.dtype if linear.mode == "affine" else weight.dtype
