"""A frozen linear map, perhaps with LoRA on it, and its gradient.

The gradient of a frozen weight is never needed, so going back is one product with the weight and, under LoRA, four
thin ones with the factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from mlx_distill.backends.mlx.device import on_gpu

#: By the name of a parameter.
Gradients = dict[str, mx.array]


def times_weight(module: nn.Module, rows: mx.array) -> mx.array:
    """(N, out) @ W → (N, in): back through a linear layer or an embedding used as one, plain or quantized."""
    if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        own = module.scales.dtype
        # On a GPU the type of the scales is fast, where they have one: of mxfp4 and its like they are bytes. A CPU sums
        # in the type of the rows, so that half precision would lose what is wanted.
        return mx.quantized_matmul(
            rows.astype(own) if on_gpu() and mx.issubdtype(own, mx.floating) else rows,
            module.weight,
            scales=module.scales,
            biases=module.biases,
            transpose=False,
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        )
    return rows.astype(module.weight.dtype) @ module.weight


@dataclass(frozen=True)
class Projection:
    """A linear layer, or mlx-lm's LoRA layer around one, without dropout.

    Attributes:
        name: Of the module in the model.
    """

    module: nn.Module
    name: str

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether a module is one of these."""
        if type(module) is LoRALinear:
            # A dropout of probability p keeps 1 − p as `_p_1`.
            return getattr(module.dropout, "_p_1", 0) == 1 and Projection.fits(module.linear)
        return type(module) in (nn.Linear, nn.QuantizedLinear)

    def forward(self, rows: mx.array) -> mx.array:
        """(N, in) → (N, out)."""
        m = self.module
        if not isinstance(m, LoRALinear):
            return m(rows)
        return mx.addmm(m.linear(rows), rows @ m.lora_a, m.lora_b, alpha=m.scale)

    def backward(
        self, rows: mx.array, gradient: mx.array, gradients: Gradients, *, onto: mx.array | None = None
    ) -> mx.array:
        """The gradient of the input.

        Args:
            rows: The input, (N, in).
            gradient: Of the output, (N, out).
            gradients: The factors' are put here.
            onto: Added to the result.
        """
        m = self.module
        linear = m.linear if isinstance(m, LoRALinear) else m
        if onto is not None and isinstance(linear, nn.Linear):
            back = mx.addmm(onto, gradient, linear.weight)
        else:
            back = times_weight(linear, gradient)
            back = back if onto is None else onto + back
        if not isinstance(m, LoRALinear):
            return back
        return mx.addmm(back, self._factor_gradients(m, rows, gradient, gradients), m.lora_a.T)

    def finish(self, rows: mx.array, gradient: mx.array, gradients: Gradients) -> None:
        """Like `backward` where the gradient of the input is not needed."""
        if isinstance(self.module, LoRALinear):
            self._factor_gradients(self.module, rows, gradient, gradients)

    def _factor_gradients(self, lora: LoRALinear, rows: mx.array, gradient: mx.array, gradients: Gradients) -> mx.array:
        through = lora.scale * (gradient @ lora.lora_b.T)
        gradients[f"{self.name}.lora_a"] = rows.T @ through
        gradients[f"{self.name}.lora_b"] = lora.scale * ((rows @ lora.lora_a).T @ gradient)
        return through
