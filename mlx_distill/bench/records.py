"""What the processes of a bench tell each other, and what is kept of it."""

from __future__ import annotations

from typing import Any, Literal

from mlx_distill.records import Record
from mlx_distill.run_records import MemoryPlan


class Task(Record):
    """What one process is to do.

    Attributes:
        config: Of `TrainConfig`: backend, model, data and all else.
        plan: How to compute batches, where an earlier process has found it out.
        peer: Who is to train instead of a backend of ours; see `peers`.
        steps: Steps after which to stop; None for all epochs.
    """

    config: dict[str, Any]
    plan: MemoryPlan | None = None
    peer: str | None = None
    steps: int | None = None


class Epoch(Record):
    """One pass over the rows.

    Attributes:
        seconds: From the first batch to the end of the last step, everything in between.
        tokens: Real ones.
        step_seconds: Of each optimizer step.
    """

    seconds: float
    tokens: int
    step_seconds: list[float]


class Timing(Record):
    """What one process measured.

    Attributes:
        device: What it computed on, and in which type.
        first_step_seconds: From the start of the process to the end of its first, warming, step.
        losses: Mean loss of each step, in nats a token.
        peak_bytes: Most memory that the process had.
        device_bytes: The same as its device tells.
        joules: What the machine took while the epochs ran, where the system tells it.
        plan: How batches were computed.
    """

    backend: str
    device: str
    ways: str
    trainable: int
    first_step_seconds: float
    epochs: list[Epoch]
    losses: list[float]
    peak_bytes: int
    device_bytes: int
    joules: float | None = None
    plan: MemoryPlan | None = None


class Turn(Record):
    """One process of a bench: what it measured, or why it failed."""

    backend: str
    number: int
    timing: Timing | None = None
    failure: str | None = None


class Spread(Record):
    """A figure over several turns: the median, the least and the most."""

    median: float
    least: float
    most: float


class Figures(Record):
    """What a backend is worth.

    Attributes:
        first_epoch, later_epoch: Seconds; of those after the first, the mean.
        tokens_per_second: Real tokens, over all epochs.
        step_p50, step_p95: Seconds.
        first_step: Seconds from the start of the process.
        joules_per_token: Of real tokens; None where the system does not tell.
    """

    backend: str
    device: str | None = None
    ways: str | None = None
    first_epoch: Spread | None = None
    later_epoch: Spread | None = None
    tokens_per_second: Spread | None = None
    step_p50: float | None = None
    step_p95: float | None = None
    first_step: Spread | None = None
    peak_bytes: int | None = None
    device_bytes: int | None = None
    joules_per_token: float | None = None
    failure: str | None = None


class Projection(Record):
    """How long a training would take, going by this bench.

    Attributes:
        rows: To train on; each as long as the bench's on average.
        seconds: By backend.
    """

    name: str
    rows: int
    epochs: int
    seconds: dict[str, float]


class Parity(Record):
    """Whether all backends compute the same: the largest relative difference of a step's loss.

    Attributes:
        limit: What rounding in the type they compute in explains.
    """

    steps: int
    largest: float
    limit: float
    backends: list[str]


class BenchRecord(Record):
    """`bench.json`: a whole bench.

    Attributes:
        command: What was typed.
        ratios: Tokens a second of the first backend by those of each other, turn by turn.
    """

    format: Literal[1] = 1
    created: str
    command: str
    machine: dict[str, str]
    model: str
    rows: int
    tokens: int
    epochs: int
    settings: dict[str, Any]
    parity: Parity | None = None
    figures: list[Figures]
    ratios: dict[str, Spread]
    projections: list[Projection]
    turns: list[Turn]
