"""The student on MLX: mlx-lm's model and LoRA layers, our loss and update."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_distill import layout
from mlx_distill.backends.base import State, StepStats
from mlx_distill.backends.mlx import device
from mlx_distill.backends.mlx.attention import in_blocks
from mlx_distill.backends.mlx.head import Head, evaluate_loss, find_head, fused_loss, plain_loss
from mlx_distill.backends.mlx.loading import attach_lora, load_frozen, lora_parameters, num_adapter_layers
from mlx_distill.backends.mlx.trunk import MEMORY_SHARE, FrozenRows, find_trunk
from mlx_distill.batches import Batch
from mlx_distill.config import TrainConfig


class MlxStudent:
    """Implements `backends.base.Student`.

    Args:
        folder: The base model, in Hugging Face layout.
        config: Of the run.
    """

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        device.prepare_memory()
        self._config = config
        self._model, _ = load_frozen(folder, dtype=config.dtype)
        parts = find_head(self._model)
        self.fused_head = parts is not None
        self._body: Callable[[mx.array], mx.array] | None
        self._head: Head | None
        self._body, self._head = parts or (None, None)
        attach_lora(self._model, config)
        self._frozen_rows = self._find_frozen_rows()
        self._optimizer = _make_optimizer(config)
        self._optimizer.init(self._model.trainable_parameters())
        self._adapter_layers = num_adapter_layers(self._model, config)
        # Dropout is the only thing here that draws random numbers.
        mx.random.seed(config.seed)
        self._gradient = nn.value_and_grad(self._model, self._loss)

        self.trainable_parameters = sum(v.size for _, v in tree_flatten(self._model.trainable_parameters()))
        self.device = f"{device.describe_device()}, {self._dtype_name()}"

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepStats:
        """See `Student.step`."""
        self._model.train()
        total: Any = None
        sums = mx.zeros(2)
        for batch in micro_batches:
            with self._attention():
                (loss, correct), gradient = self._gradient(self._enter(batch), *_targets(batch))
            total = gradient if total is None else tree_map(mx.add, total, gradient)
            sums = sums + mx.stack([loss, correct])
            mx.eval(total, sums)
        target_tokens = sum(b.target_tokens for b in micro_batches)
        mean = tree_map(lambda g: g / target_tokens, total)
        mean, norm = optim.clip_grad_norm(mean, self._config.grad_clip or math.inf)
        loss_sum, correct_sum = sums.tolist()
        grad_norm = norm.item()
        stats = StepStats(
            loss_sum=loss_sum,
            correct=round(correct_sum),
            target_tokens=target_tokens,
            tokens=sum(b.real_tokens for b in micro_batches),
            grad_norm=grad_norm,
        )
        # A gradient that is not finite must not touch the adapter: the caller sees the norm and stops.
        if math.isfinite(grad_norm) and math.isfinite(loss_sum):
            self._optimizer.learning_rate = mx.array(learning_rate)
            self._optimizer.update(self._model, mean)
            mx.eval(self._model.trainable_parameters(), self._optimizer.state)
        return stats

    def evaluate(self, batch: Batch) -> StepStats:
        """See `Student.evaluate`."""
        self._model.eval()
        rows, columns, targets = _targets(batch)
        with self._attention():
            top = self._ascend(self._enter(batch))[rows, columns]
            if self._head is not None:
                loss, correct = evaluate_loss(self._head, top, targets)
            else:
                loss, correct = plain_loss(top, targets)
            mx.eval(loss, correct)
        return StepStats(loss.item(), round(correct.item()), batch.target_tokens, batch.real_tokens)

    def state(self) -> State:
        """See `Student.state`."""
        arrays = {f"adapter.{name}": np.array(value) for name, value in self._adapter().items()}
        for name, value in tree_flatten(self._optimizer.state):
            arrays[f"optimizer.{name}"] = np.array(value)
        for at, value in enumerate(mx.random.state):
            arrays[f"random.{at}"] = np.array(value)
        return State(arrays)

    def restore(self, state: State) -> None:
        """See `Student.restore`."""
        groups: dict[str, list[tuple[str, mx.array]]] = {"adapter": [], "optimizer": [], "random": []}
        for name, value in state.arrays.items():
            group, _, rest = name.partition(".")
            groups[group].append((rest, mx.array(value)))
        self._model.update(tree_unflatten(groups["adapter"]))
        self._optimizer.state = tree_unflatten(groups["optimizer"])
        for _, key in groups["random"]:
            # The state itself is read-only; a seed is its two words.
            mx.random.seed(int(key[0].item()) << 32 | int(key[1].item()))
        mx.eval(self._model.trainable_parameters(), self._optimizer.state)

    def save_adapter(self, folder: Path) -> None:
        """See `Student.save_adapter`."""
        files = layout.RunFolder(folder)
        with layout.atomic_file(files.adapter) as temporary:
            mx.save_safetensors(str(temporary), self._adapter(), metadata={"format": "mlx"})
        adapter_config = {
            "fine_tune_type": "lora",
            "num_layers": self._adapter_layers,
            "lora_parameters": lora_parameters(self._config),
            "model": self._config.model,
        }
        layout.write_text(files.adapter_config, json.dumps(adapter_config, indent=2) + "\n")

    def load_adapter(self, folder: Path) -> None:
        """See `Student.load_adapter`."""
        weights = mx.load(str(layout.RunFolder(folder).adapter))
        assert isinstance(weights, dict)
        self._model.update(tree_unflatten(list(weights.items())))
        mx.eval(self._model.trainable_parameters())

    def peak_memory_bytes(self) -> int:
        """See `Student.peak_memory_bytes`."""
        return device.peak_memory_bytes()

    def _find_frozen_rows(self) -> FrozenRows | None:
        if self._body is None:
            return None
        trunk = find_trunk(self._body, num_adapter_layers(self._model, self._config), length=self._config.max_length)
        if trunk is None:
            return None
        return FrozenRows(trunk, int(device.total_memory_bytes() * MEMORY_SHARE))

    def _attention(self) -> AbstractContextManager[None]:
        return nullcontext() if device.on_gpu() else in_blocks(self._model)

    def _enter(self, batch: Batch) -> mx.array:
        """What the trained part starts from: the frozen part's output, or the tokens where there is no such part."""
        return mx.array(batch.tokens) if self._frozen_rows is None else self._frozen_rows.batch(batch)

    def _ascend(self, start: mx.array) -> mx.array:
        """From what `_enter` gives to the hidden states below the head; to the logits where the head is not known."""
        if self._frozen_rows is not None:
            return self._frozen_rows.trunk.above(start)
        return self._model(start) if self._body is None else self._body(start)

    def _loss(self, start: mx.array, rows: mx.array, columns: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        top = self._ascend(start)[rows, columns]
        return plain_loss(top, targets) if self._head is None else fused_loss(self._head, top, targets)

    def _adapter(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self._model.trainable_parameters()))

    def _dtype_name(self) -> str:
        widest = next(v.dtype for _, v in tree_flatten(self._model.parameters()) if v.dtype != mx.uint32)
        return str(widest).removeprefix("mlx.core.")


def _targets(batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
    """Row and column of every hidden state that predicts a target, and the targets, each (N,)."""
    rows, columns = np.nonzero(batch.loss_mask)
    targets = batch.tokens[rows, columns]
    return mx.array(rows), mx.array(columns - 1), mx.array(targets)


def _make_optimizer(config: TrainConfig) -> optim.Optimizer:
    # The learning rate is set before every update; the schedule lives in the training loop.
    if config.optimizer == "adam":
        return optim.Adam(config.learning_rate, bias_correction=True)
    return optim.AdamW(config.learning_rate, weight_decay=config.weight_decay, bias_correction=True)
