"""The records of a training run: its metrics, and what it was run on."""

from __future__ import annotations

from typing import Any, Literal

from mlx_distill.records import Manifest, ModelRecord, Record

MetricKind = Literal["step", "train", "valid", "test"]


class MetricRow(Record):
    """A row of `metrics.jsonl`.

    Attributes:
        kind: "step" for an optimizer step, else the split that was evaluated.
        step: Optimizer steps taken so far.
        epoch: Position in the data, fractional for a step, whole for an evaluation.
        loss: Mean cross-entropy in nats over the tokens that carry loss.
        token_accuracy: Share of those tokens that greedy decoding would have chosen, 0 to 1.
        target_tokens: How many tokens carried loss.
        tokens: Real tokens read, padding not counted.
    """

    kind: MetricKind
    step: int
    epoch: float
    loss: float
    token_accuracy: float
    target_tokens: int
    tokens: int
    seconds: float
    learning_rate: float | None = None
    grad_norm: float | None = None


class SplitSummary(Record):
    """Size and hash of one split as it was trained on."""

    rows: int
    tokens: int
    target_tokens: int
    sha256: str
    skipped: int = 0


class RunRecord(Record):
    """`adapters/RUN/run.json`: what was run, on what, and how it ended.

    Attributes:
        identity: Hash of all that decides the result. A folder whose identity differs holds another run.
        status: "running" until the last step is taken and the best adapter is written.
        config: The training configuration as used.
        best_step: Optimizer steps taken by the adapter that `adapters.safetensors` holds.
    """

    format: Literal[1] = 1
    identity: str
    status: Literal["running", "finished"]
    created: str
    version: str
    backend: str
    device: str
    model: ModelRecord
    config: dict[str, Any]
    splits: dict[str, SplitSummary]
    trainable_parameters: int
    manifest: Manifest | None = None
    epochs: int = 0
    steps: int = 0
    best_step: int | None = None
    first_valid_loss: float | None = None
    train_loss: float | None = None
    valid_loss: float | None = None
    test_loss: float | None = None
    token_accuracy: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    seconds: float | None = None
