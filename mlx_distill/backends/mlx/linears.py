"""The single matrices of a model's layers, by the names that an adapter has for them, without loading its weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.dora import DoRALinear
from numpy.typing import NDArray

from mlx_distill.backends.mlx.loading import load_adapter, load_lazily


@dataclass(frozen=True)
class Matrix:
    """A matrix that can be adapted.

    Attributes:
        layer: Its layer's number, from 0.
        key: Its name within the layer, such as self_attn.q_proj.
        inputs: Columns.
        outputs: Rows.
    """

    layer: int
    key: str
    inputs: int
    outputs: int


class Layers:
    """The layers of a model.

    Args:
        folder: A model in Hugging Face layout.

    Attributes:
        count: How many layers there are.
        matrices: By whole name, such as model.layers.0.self_attn.q_proj.

    Raises:
        ModelError: mlx-lm does not know the architecture, or the files are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = _lazily(folder)
        names = {id(module): name for name, module in self._model.named_modules()}
        self.count = len(self._model.layers)
        self.matrices: dict[str, Matrix] = {}
        for at, layer in enumerate(self._model.layers):
            for key, module in layer.named_modules():
                if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and not hasattr(module, "to_lora"):
                    outputs, columns = module.weight.shape
                    # A word of a quantized matrix holds several values.
                    inputs = columns * 32 // module.bits if isinstance(module, nn.QuantizedLinear) else columns
                    self.matrices[f"{names[id(layer)]}.{key}"] = Matrix(at, key, inputs, outputs)

    def row_norms(self, names: Collection[str]) -> dict[str, NDArray[np.float32]]:
        """The norm of each row, in float32: a DoRA magnitude that changes nothing."""
        modules = dict(self._model.named_modules())
        return {name: np.array(DoRALinear.from_base(modules[name], r=1).m) for name in names}

    def require_adapter(self, adapter: Path) -> None:
        """Make sure that mlx-lm takes an adapter for this model.

        Raises:
            ModelError: It does not.
        """
        load_adapter(_lazily(self._folder), adapter)


def _lazily(folder: Path) -> nn.Module:
    model, _ = load_lazily(folder)
    model.freeze()
    return model
