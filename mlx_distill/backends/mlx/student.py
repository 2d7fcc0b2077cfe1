"""The student on MLX: mlx-lm's model and LoRA layers, our loss and update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from mlx_distill import layout
from mlx_distill.backends.adapters import write_adapter_config
from mlx_distill.backends.base import Memory, State, StepStats, total
from mlx_distill.backends.mlx import device, writing
from mlx_distill.backends.mlx.drawing import Sampling
from mlx_distill.backends.mlx.frozen_rows import InMemory, OnDisk
from mlx_distill.backends.mlx.group import Group
from mlx_distill.backends.mlx.head import find_head
from mlx_distill.backends.mlx.loading import attach_adapter, load_frozen
from mlx_distill.backends.mlx.optimizers import AdapterOptimizer
from mlx_distill.backends.mlx.passes import Passes
from mlx_distill.backends.mlx.projection import Gradients
from mlx_distill.backends.mlx.stack import Found
from mlx_distill.batches import Batch, TeacherBuckets
from mlx_distill.config import DEFAULT_TOP_K, TrainConfig
from mlx_distill.distillation import Objective
from mlx_distill.models.folder import end_tokens
from mlx_distill.run_records import MemoryPlan

_WRITING_ADVICE = (
    "The last checkpoint stands. Go on with a --memory-limit below what was in use: fewer answers are then written at "
    "once; a new --run with fewer --on-policy-tokens saves more."
)


class MlxStudent:
    """Implements `backends.base.Student`.

    Args:
        folder: The base model, in Hugging Face layout.
        config: Of the run.
        group: The processes that train together; None for this one alone.
    """

    def __init__(self, folder: Path, config: TrainConfig, group: Group | None = None) -> None:
        device.prepare_memory()
        self._config = config
        self._group = group
        self._end_tokens = end_tokens(folder)
        # An answer of the student's own comes on top of a row's prompt.
        longest = config.max_length + (config.on_policy_tokens if config.on_policy else 0)
        with self._allocations():
            self._model, _ = load_frozen(folder, dtype=config.dtype)
            parts = find_head(self._model)
            self._adapter_config = attach_adapter(self._model, config)
            layers = self._adapter_config["num_layers"]
            objective = Objective.of(config)
            self._passes = Passes(self._model, parts, trained=layers, max_length=longest, objective=objective)
            self._optimizer = AdapterOptimizer(config, self._model)
        self._seed()

        self.trainable_parameters = sum(v.size for _, v in tree_flatten(self._model.trainable_parameters()))
        self.ways = self._passes.ways
        self.prefix_token_bytes = self._passes.prefix_token_bytes
        self.device = f"{device.describe_device()}, {self._dtype_name()}"

    def memory(self) -> Memory:
        """See `Student.memory`."""
        state = sum(value.nbytes for value in self._optimizer.arrays().values())
        adapter = sum(value.nbytes for value in self._adapter().values())
        total = sum(value.nbytes for _, value in tree_flatten(self._model.parameters()))
        return Memory(
            weights=total - adapter,
            # The gradient, and its scaled copy.
            optimizer=3 * adapter + state,
            held=device.held_memory_bytes() + 2 * adapter,
            available=device.available_memory_bytes(),
        )

    def measure(self, batch: Batch, *, checkpointing: bool) -> int:
        """See `Student.measure`."""
        self._passes.checkpointing = checkpointing
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        with self._allocations():
            self._passes.loss_and_gradients(self._as_taught(batch))
        return int(mx.get_peak_memory() - before)

    def adopt(self, plan: MemoryPlan, folder: Path) -> None:
        """See `Student.adopt`."""
        self._passes.checkpointing = plan.checkpointing
        self._passes.keep_trained = self._config.epochs > 1
        if plan.prefix_cache == "memory":
            self._passes.keep_rows(InMemory(plan.prefix_bytes))
        elif plan.prefix_cache == "disk":
            self._passes.keep_rows(OnDisk(plan.prefix_bytes, folder))
        device.limit_memory(plan.limit_bytes)
        # Measuring has drawn from the random state where there is dropout.
        self._seed()
        mx.reset_peak_memory()

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepStats:
        """See `Student.step`."""
        with self._allocations():
            return self._step(micro_batches, learning_rate)

    def _step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepStats:
        stats = StepStats(0.0, 0, 0, 0)
        gradients: Gradients = {}
        for batch in micro_batches:
            found, more = self._passes.loss_and_gradients(batch)
            stats += _stats(found, batch)
            gradients = {name: gradients[name] + value for name, value in more.items()} if gradients else more
            mx.eval(gradients)
        if self._group is not None:
            gradients = self._group.sum(gradients or {name: mx.zeros_like(v) for name, v in self._adapter().items()})
            stats = total(self._group, stats)
        mean = tree_unflatten([(name, value / stats.target_tokens) for name, value in gradients.items()])
        mean, norm = optim.clip_grad_norm(mean, self._config.grad_clip or math.inf)
        grad_norm = norm.item()
        # A gradient that is not finite must not touch the adapter: the caller sees the norm and stops.
        stats = replace(stats, grad_norm=grad_norm)
        if stats.finite:
            self._optimizer.update(self._model, mean, learning_rate)
        return stats

    def evaluate(self, batch: Batch) -> StepStats:
        """See `Student.evaluate`."""
        with self._allocations():
            found = self._passes.loss(batch)
        return _stats(found, batch)

    def write(
        self,
        prompts: Sequence[NDArray[np.int32]],
        keys: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        words: int,
    ) -> list[NDArray[np.int32]]:
        """See `Student.write`."""
        with device.explained_allocation(_WRITING_ADVICE):
            written = writing.write(
                self._model,
                [prompt.tolist() for prompt in prompts],
                [Sampling(temperature, key, words) for key in keys],
                ends=self._end_tokens,
                max_tokens=max_tokens,
            )
        return [np.array(answer, np.int32) for answer in written]

    def measure_writing(self, rows: int, prompt: int, answer: int) -> int:
        """See `Student.measure_writing`."""
        with device.explained_allocation(_WRITING_ADVICE):
            return writing.measure(self._model, rows, prompt, answer)

    def state(self) -> State:
        """See `Student.state`."""
        arrays = {f"adapter.{name}": np.array(value) for name, value in self._adapter().items()}
        arrays |= {f"optimizer.{name}": value for name, value in self._optimizer.arrays().items()}
        own = np.array(mx.random.state[0])
        for rank, content in enumerate(self._group.gather(own.tobytes()) if self._group else [own.tobytes()]):
            arrays[f"random.{rank}"] = np.frombuffer(content, own.dtype)
        return State(arrays)

    def restore(self, state: State) -> None:
        """See `Student.restore`."""
        self._model.update(tree_unflatten([(name, mx.array(v)) for name, v in state.group("adapter").items()]))
        self._optimizer.restore((name, mx.array(v)) for name, v in state.group("optimizer").items())
        # A process more than there were goes on with its own seed.
        if (key := state.group("random").get(str(self._rank))) is not None:
            # The state itself is read-only; a seed is its two words.
            mx.random.seed(int(key[0]) << 32 | int(key[1]))
        mx.eval(self._model.trainable_parameters())

    def save_adapter(self, folder: Path) -> None:
        """See `Student.save_adapter`."""
        files = layout.RunFolder(folder)
        # Written to a file that Python opened: a full disk is then an OSError.
        with layout.atomic_file(files.adapter) as temporary, temporary.open("wb") as file:
            mx.save_safetensors(file, self._adapter(), metadata={"format": "mlx"})
        write_adapter_config(files, self._adapter_config, self._config)

    def load_adapter(self, folder: Path) -> None:
        """See `Student.load_adapter`."""
        weights = mx.load(str(layout.RunFolder(folder).adapter))
        assert isinstance(weights, dict)
        self._model.update(tree_unflatten(list(weights.items())))
        mx.eval(self._model.trainable_parameters())

    def peak_memory_bytes(self) -> int:
        """See `Student.peak_memory_bytes`."""
        return device.peak_memory_bytes()

    @property
    def _rank(self) -> int:
        return self._group.rank if self._group else 0

    def _seed(self) -> None:
        """Dropout is the only thing here that draws random numbers; each process has other rows, and draws its own."""
        mx.random.seed(self._rank << 32 | self._config.seed)

    def _as_taught(self, batch: Batch) -> Batch:
        """A batch with what some teacher might say, where one is learned from: it takes memory, too."""
        if self._config.distill == "off":
            return batch
        n, top_k = batch.target_tokens, DEFAULT_TOP_K
        ids = np.tile(np.arange(top_k, dtype=np.int32), (n, 1))
        even = np.full((n, top_k + 1), -math.log(top_k + 1), np.float32)
        return replace(batch, teacher=TeacherBuckets(ids, even))

    def _allocations(self) -> AbstractContextManager[None]:
        return device.explained_allocation(
            "The last checkpoint, where there is one, stands. Go on with a --memory-limit below what was in use, or "
            "--micro-batch-size 1; a shorter --max-length or a 4-bit base model saves more."
        )

    def _adapter(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self._model.trainable_parameters()))

    def _dtype_name(self) -> str:
        widest = next(v.dtype for _, v in tree_flatten(self._model.parameters()) if v.dtype != mx.uint32)
        return str(widest).removeprefix("mlx.core.")


def _stats(found: Found, batch: Batch) -> StepStats:
    return StepStats(found.loss, found.correct, batch.target_tokens, batch.real_tokens, found.divergence)
