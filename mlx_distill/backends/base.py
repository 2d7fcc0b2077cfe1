"""What a student is: the seam between the one training loop and the backends that compute."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_distill.batches import Batch
from mlx_distill.run_records import MemoryPlan


@dataclass(frozen=True)
class StepStats:
    """Sums over tokens, never means, so that any two add up exactly.

    Attributes:
        loss_sum: Cross-entropy in nats, summed over the tokens that carry loss.
        correct: Tokens that carry loss and have the highest logit.
        target_tokens: Tokens that carry loss.
        tokens: Real tokens read, padding not counted.
        divergence_sum: From the teacher, in nats, summed over the same tokens; None where none is learned from.
        grad_norm: Norm of the gradient of the mean loss before clipping; None for an evaluation.
    """

    loss_sum: float
    correct: int
    target_tokens: int
    tokens: int
    divergence_sum: float | None = None
    grad_norm: float | None = None

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats a token."""
        return self.loss_sum / self.target_tokens

    @property
    def divergence(self) -> float | None:
        """Mean divergence from the teacher in nats a token."""
        return None if self.divergence_sum is None else self.divergence_sum / self.target_tokens

    @property
    def finite(self) -> bool:
        """Whether loss, divergence and gradient are."""
        return all(math.isfinite(value or 0.0) for value in (self.loss_sum, self.divergence_sum, self.grad_norm))

    @property
    def token_accuracy(self) -> float:
        """Share of tokens predicted right, 0 to 1."""
        return self.correct / self.target_tokens

    def __add__(self, other: StepStats) -> StepStats:
        return StepStats(
            self.loss_sum + other.loss_sum,
            self.correct + other.correct,
            self.target_tokens + other.target_tokens,
            self.tokens + other.tokens,
            _sum(self.divergence_sum, other.divergence_sum),
        )


def _sum(a: float | None, b: float | None) -> float | None:
    return a if b is None else b if a is None else a + b


NO_TOKENS = StepStats(0.0, 0, 0, 0)


@dataclass(frozen=True)
class State:
    """All that exact resume needs of a backend.

    Attributes:
        arrays: Adapter (`adapter.*`), optimizer (`optimizer.*`) and random state (`random.RANK`), by name.
    """

    arrays: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def group(self, name: str) -> dict[str, NDArray[np.generic]]:
        """The arrays whose names begin with `name.`, without that."""
        return {key.removeprefix(f"{name}."): v for key, v in self.arrays.items() if key.startswith(f"{name}.")}


@dataclass(frozen=True)
class Memory:
    """Where memory stands before the first step, in bytes.

    Attributes:
        weights: Of the base model.
        optimizer: The adapter, its gradient and the optimizer's state.
        held: All that is held now, the weights among it.
        available: What the machine lets training take.
    """

    weights: int
    optimizer: int
    held: int
    available: int


class Peers(Protocol):
    """The processes that train one adapter together, each on its share of every batch.

    Attributes:
        rank: Of this process, 0 to size - 1. Rank 0 alone writes the run.
        size: How many there are.
    """

    rank: int
    size: int

    def gather(self, content: bytes) -> list[bytes]:
        """What each process gives, by rank, in every process. All must call it, and they wait for each other."""
        ...


class Alone:
    """Implements `Peers` where there is one process."""

    rank = 0
    size = 1

    def gather(self, content: bytes) -> list[bytes]:
        """See `Peers.gather`."""
        return [content]


ALONE = Alone()


def total(peers: Peers, stats: StepStats) -> StepStats:
    """Sums over all processes, each in float64 and in the order of ranks: the same to the bit in every one."""
    if peers.size == 1:
        return stats
    form = "<d3q?d"
    own = (stats.loss_sum, stats.correct, stats.target_tokens, stats.tokens)
    apart = stats.divergence_sum
    shares = peers.gather(struct.pack(form, *own, apart is not None, apart or 0.0))
    return sum((_unpacked(*struct.unpack(form, share)) for share in shares), NO_TOKENS)


def _unpacked(loss: float, correct: int, targets: int, tokens: int, is_apart: bool, apart: float) -> StepStats:
    return StepStats(loss, correct, targets, tokens, apart if is_apart else None)


class Student(Protocol):
    """A model with a trainable adapter, on some backend."""

    #: What it computes on, such as "Apple M4 Max GPU, bfloat16".
    device: str
    #: How it computes, such as "fused head and loss".
    ways: str
    trainable_parameters: int
    #: Bytes that keeping the frozen layers' output takes for each token; 0 where it cannot be kept.
    prefix_token_bytes: int

    def memory(self) -> Memory:
        """Where memory stands."""
        ...

    def measure(self, batch: Batch, *, checkpointing: bool) -> int:
        """Bytes that loss and gradient of a batch take at their peak, beyond what is held before. Learns nothing."""
        ...

    def measure_writing(self, rows: int, prompt: int, answer: int) -> int:
        """Bytes that `write` takes at its peak, beyond what is held before. Learns nothing.

        Args:
            rows: Answers written at once.
            prompt: Tokens of each prompt.
            answer: Tokens of each answer.
        """
        ...

    def adopt(self, plan: MemoryPlan, folder: Path) -> None:
        """Compute as the plan says; kept rows that go to disk go to a file in the folder."""
        ...

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepStats:
        """One optimizer step on the mean loss over all target tokens of all micro-batches.

        Args:
            micro_batches: This process's share of a batch; it may be empty, where there are more processes than rows.
            learning_rate: Of this step.

        Returns:
            The sums over all processes.
        """
        ...

    def evaluate(self, batch: Batch) -> StepStats:
        """The loss without dropout and without learning, in this process alone.

        Rows seen here are seen again: at the next evaluation.
        """
        ...

    def write(
        self,
        prompts: Sequence[NDArray[np.int32]],
        keys: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        words: int,
    ) -> list[NDArray[np.int32]]:
        """Answers to prompts, sampled without dropout: the tokens of each, its end mark included where it has one.

        Args:
            keys: Of each prompt; the same key and student draw the same answer, whatever is asked beside it.
            words: Tokens that may be drawn, the first so many.
        """
        ...

    def state(self) -> State:
        """A copy of the adapter, optimizer and random states of all processes, each of which must call this."""
        ...

    def restore(self, state: State) -> None:
        """Go on as if this state had just been reached."""
        ...

    def save_adapter(self, folder: Path) -> None:
        """Write `adapters.safetensors` and `adapter_config.json` in mlx-lm's layout, atomically."""
        ...

    def load_adapter(self, folder: Path) -> None:
        """Take the adapter that `save_adapter` wrote; the optimizer stays as it is."""
        ...

    def peak_memory_bytes(self) -> int:
        """Most memory held at once since the student was made."""
        ...
