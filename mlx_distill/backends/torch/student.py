"""The student on PyTorch: the plain way, with whole logits, as a reference for the MLX backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.numpy import save as as_safetensors
from torch import nn
from torch.nn import functional

from mlx_distill import layout
from mlx_distill.backends.adapters import write_adapter_config
from mlx_distill.backends.base import NO_TOKENS, Memory, State, StepStats
from mlx_distill.backends.torch import device as devices
from mlx_distill.backends.torch.distill import divergence_of_logits
from mlx_distill.backends.torch.loading import attach_adapter, load_frozen, put
from mlx_distill.backends.torch.optimizer import AdapterOptimizer
from mlx_distill.batches import Batch
from mlx_distill.config import TrainConfig
from mlx_distill.distillation import Objective
from mlx_distill.errors import ConfigError, ResourceError
from mlx_distill.run_records import MemoryPlan


@dataclass(frozen=True)
class Found:
    """What a batch costs: scalars, each a sum over its targets.

    Attributes:
        minimised: What the gradient is of.
        loss: Cross-entropy in nats.
        correct: Targets predicted right.
        divergence: From the teacher in nats; None without one.
    """

    minimised: torch.Tensor
    loss: torch.Tensor
    correct: torch.Tensor
    divergence: torch.Tensor | None = None

    def stats(self, batch: Batch) -> StepStats:
        """The same as numbers."""
        apart = None if self.divergence is None else self.divergence.item()
        return StepStats(self.loss.item(), int(self.correct.item()), batch.target_tokens, batch.real_tokens, apart)


class TorchStudent:
    """Implements `backends.base.Student`.

    Args:
        folder: The base model, in Hugging Face layout.
        config: Of the run.

    Raises:
        ConfigError: A setting that this backend does not have, or a device that the machine does not.
        ModelError: The model cannot be loaded.
    """

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self._config = config
        self._objective = Objective.of(config)
        if config.on_policy:
            raise ConfigError("--on-policy: the torch backend writes no answers.", hint="Take --backend mlx for it.")
        self._device = devices.choose_device(config.device)
        dtype = devices.choose_dtype(config.dtype, self._device)
        base = load_frozen(folder, dtype, self._device)
        self._weights = sum(p.nbytes for p in base.parameters())
        self._model, self._trained, self._adapter_config = attach_adapter(base, config)
        self._optimizer = AdapterOptimizer(config, self._trained)
        self._peak = devices.Peak(self._device)
        self._seed()

        self.trainable_parameters = sum(one.parameter.numel() for one in self._trained.values())
        self.prefix_token_bytes = 0
        self.ways = "peft, whole logits"
        self.device = f"{devices.describe_device(self._device)}, {str(dtype).removeprefix('torch.')}"

    def memory(self) -> Memory:
        """See `Student.memory`."""
        adapter = sum(one.parameter.nbytes for one in self._trained.values())
        return Memory(
            weights=self._weights,
            # The adapter, its gradient, and the two moments.
            optimizer=4 * adapter,
            held=devices.held_bytes(self._device) + 3 * adapter,
            available=devices.available_bytes(self._device),
        )

    def measure(self, batch: Batch, *, checkpointing: bool) -> int:
        """See `Student.measure`."""
        self._checkpoint(checkpointing)
        self._model.train()
        found = (
            self._profiled(batch)
            if self._device.type == "cpu"
            else devices.grown_by(self._device, lambda: self._differentiate(batch))
        )
        self._optimizer.zero_grad()
        return found

    def adopt(self, plan: MemoryPlan, folder: Path) -> None:
        """See `Student.adopt`."""
        self._checkpoint(plan.checkpointing)
        # Measuring has drawn random numbers where there is dropout.
        self._seed()

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepStats:
        """See `Student.step`."""
        self._model.train()
        self._optimizer.zero_grad()
        stats = NO_TOKENS
        for batch in micro_batches:
            found = self._forward(batch)
            try:
                found.minimised.backward()  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                raise _explained(error) from error
            stats += found.stats(batch)
        parameters = [one.parameter for one in self._trained.values()]
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad /= stats.target_tokens
        norm = nn.utils.clip_grad_norm_(parameters, self._config.grad_clip or math.inf).item()
        # A gradient that is not finite must not touch the adapter: the caller sees the norm and stops.
        stats = replace(stats, grad_norm=norm)
        if stats.finite:
            self._optimizer.update(learning_rate)
        devices.wait(self._device)
        self._peak.look()
        devices.trim(self._device)
        return stats

    def evaluate(self, batch: Batch) -> StepStats:
        """See `Student.evaluate`."""
        self._model.eval()
        with torch.no_grad():
            return self._forward(batch).stats(batch)

    def write(
        self,
        prompts: Sequence[NDArray[np.int32]],
        keys: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        words: int,
    ) -> list[NDArray[np.int32]]:
        """See `Student.write`. Refused when the student is made."""
        raise NotImplementedError

    def measure_writing(self, rows: int, prompt: int, answer: int) -> int:
        """See `Student.measure_writing`. Refused when the student is made."""
        raise NotImplementedError

    def gradients(self) -> dict[str, NDArray[np.float32]]:
        """What the last step learned from, after clipping, by mlx-lm's names."""
        return {n: one.to_mlx(one.parameter.grad) for n, one in self._trained.items() if one.parameter.grad is not None}

    def state(self) -> State:
        """See `Student.state`."""
        arrays: dict[str, NDArray[np.generic]] = {f"adapter.{name}": value for name, value in self._adapter().items()}
        arrays |= {f"optimizer.{name}": value for name, value in self._optimizer.arrays().items()}
        arrays["torch.cpu"] = torch.get_rng_state().numpy().copy()
        if self._device.type != "cpu":
            arrays["torch.device"] = devices.random_of(self._device).get_rng_state().cpu().numpy().copy()
        return State(arrays)

    def restore(self, state: State) -> None:
        """See `Student.restore`. The random state of another backend says nothing here."""
        put(self._trained, state.group("adapter"))
        self._optimizer.restore(state.group("optimizer"))
        random = state.group("torch")
        if "cpu" in random:
            torch.set_rng_state(torch.from_numpy(random["cpu"].copy()))
        if "device" in random and self._device.type != "cpu":
            devices.random_of(self._device).set_rng_state(torch.from_numpy(random["device"].copy()))

    def save_adapter(self, folder: Path) -> None:
        """See `Student.save_adapter`."""
        files = layout.RunFolder(folder)
        with layout.atomic_file(files.adapter) as temporary:
            temporary.write_bytes(as_safetensors(self._adapter(), {"format": "mlx"}))
        write_adapter_config(files, self._adapter_config, self._config)

    def load_adapter(self, folder: Path) -> None:
        """See `Student.load_adapter`."""
        put(self._trained, load_file(layout.RunFolder(folder).adapter))

    def peak_memory_bytes(self) -> int:
        """See `Student.peak_memory_bytes`."""
        return self._peak.bytes()

    def _forward(self, batch: Batch) -> Found:
        """What a batch's targets cost.

        Rows are padded on the right and attention is causal: no target sees padding, so there is no mask to give.
        """
        width = devices.width_on(self._device, batch.tokens.shape[1])
        tokens = np.pad(batch.tokens, ((0, 0), (0, width - batch.tokens.shape[1]))).astype(np.int64)
        rows, columns = np.nonzero(batch.loss_mask)
        targets = torch.from_numpy(tokens[rows, columns]).to(self._device)
        places = torch.from_numpy(rows * width + columns - 1).to(self._device)
        try:
            logits = self._model(input_ids=torch.from_numpy(tokens).to(self._device), use_cache=False).logits
            picked = logits.flatten(0, 1)[places].float()
            loss = functional.cross_entropy(picked, targets, reduction="sum")
            correct = (picked.argmax(-1) == targets).sum()
            if batch.teacher is None or self._objective is None:
                return Found(loss, loss, correct)
            apart = divergence_of_logits(picked, batch.teacher, self._objective)
        except RuntimeError as error:
            raise _explained(error) from error
        weight = self._objective.weight
        return Found((1 - weight) * loss + weight * apart, loss, correct, apart)

    def _differentiate(self, batch: Batch) -> None:
        self._forward(batch).minimised.backward()  # type: ignore[no-untyped-call]

    def _profiled(self, batch: Batch) -> int:
        """The peak of what torch's profiler sees allocated and freed on the CPU."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            self._differentiate(batch)
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
        return int(changes.max(initial=0))

    def _checkpoint(self, wanted: bool) -> None:
        base = self._model.get_base_model()  # type: ignore[operator]
        if wanted:
            base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            base.activation_checkpointing_disable()

    def _seed(self) -> None:
        torch.manual_seed(self._config.seed)

    def _adapter(self) -> dict[str, NDArray[np.float32]]:
        return {name: one.to_mlx(one.parameter) for name, one in self._trained.items()}


def _explained(error: RuntimeError) -> RuntimeError:
    """An allocation that failed, with advice; any other error as it is."""
    if not any(sign in str(error).lower() for sign in ("out of memory", "can't allocate", "not enough memory")):
        return error
    return ResourceError(
        f"The machine is out of memory: {error}",
        hint="The last checkpoint stands. Go on with a smaller --memory-limit, or --micro-batch-size 1.",
    )
