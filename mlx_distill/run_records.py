"""The records of a training run: its metrics, what it was run on, and how its fused model was checked."""

from __future__ import annotations

import math
from typing import Any, Literal

from mlx_distill.manifest import Manifest
from mlx_distill.records import ModelRecord, Record, Split

MetricKind = Literal["step", "train", "valid", "test"]

PrefixPlace = Literal["memory", "disk"]

ProbeSource = Split | Literal["prompts"]


class MetricRow(Record):
    """A row of `metrics.jsonl`.

    Attributes:
        kind: "step" for an optimizer step, else the split that was evaluated.
        step: Optimizer steps taken so far.
        epoch: Position in the data, fractional within an epoch, whole at its end.
        loss: Mean cross-entropy in nats over the tokens that carry loss.
        token_accuracy: Share of those tokens that greedy decoding would have chosen, 0 to 1.
        target_tokens: How many tokens carried loss.
        tokens: Real tokens read, padding not counted.
        divergence: Mean divergence from the teacher in nats over the same tokens, where one is learned from.
        on_policy: True for a step on answers that the student wrote: what carried loss are its own tokens. Of a mean
            over an epoch: true where all of its steps were, and else those steps are not in it.
        writing_seconds: That it took to write them, and `scoring_seconds` that the teacher took to score them.
        stopped_early: True for the validation after which no step was taken, as patience had run out.
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
    divergence: float | None = None
    on_policy: bool | None = None
    writing_seconds: float | None = None
    scoring_seconds: float | None = None
    stopped_early: bool | None = None


class SplitSummary(Record):
    """Size and hash of one split as it was trained on."""

    rows: int
    tokens: int
    target_tokens: int
    sha256: str
    skipped: int = 0


class MemoryPlan(Record):
    """What training was expected to take, in bytes, and how batches are computed.

    Attributes:
        limit_bytes: What was to be stayed under.
        optimizer_bytes: The adapter, its gradient and the optimizer's state.
        activation_bytes: Of the widest batch, as many rows of it at once as `micro_batch_size`.
        prefix_bytes: What kept rows of the frozen layers may take, where `prefix_cache` says; None keeps none.
        teacher_bytes: The weights of a teacher that is in memory beside the student.
        scoring_bytes: That it takes to read the longest row; it reads one at a time.
        said_bytes: What it said of the validation rows and is kept.
        writing_bytes: That the student's writing of its own answers takes, `writing_rows` of them at once.
        writing_width: Tokens of the longest prompt and its answer: of shorter ones, more are written at once.
        peak_bytes: All in all. Training, scoring and writing follow one another: the most that one of them takes.
        fixed_bytes: With `token_bytes` and `square_bytes`, what B rows of T tokens take:
            fixed + B·T·token + B·T²·square.
        checkpointing: Whether trained layers are computed twice.
    """

    limit_bytes: int
    weights_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    prefix_bytes: int = 0
    teacher_bytes: int = 0
    scoring_bytes: int = 0
    said_bytes: int = 0
    writing_bytes: int = 0
    writing_rows: int | None = None
    writing_width: int | None = None
    peak_bytes: int
    fixed_bytes: float
    token_bytes: float
    square_bytes: float
    micro_batch_size: int
    checkpointing: bool
    prefix_cache: PrefixPlace | None = None


class Agreement(Record):
    """How far two models are apart on a few rows. The first is the reference.

    Attributes:
        positions: Whose logits were compared.
        largest_difference: Of two logits of one token.
        mean_difference: Mean absolute difference, over all tokens of all positions.
        kl: Mean Kullback-Leibler divergence of the second from the reference, in nats a position.
        same_choice: Share of positions where both hold the same token for the likeliest.
        loss_reference: Mean cross-entropy of the token that follows, in nats.
        loss: The same, of the second.
        answers: Compared.
        greedy_agreement: Share of the tokens of the greedy answers, up to the first that differs; None without any.
    """

    positions: int
    largest_difference: float
    mean_difference: float
    kl: float
    same_choice: float
    loss_reference: float
    loss: float
    answers: int = 0
    greedy_agreement: float | None = None

    @property
    def finite(self) -> bool:
        """Whether all of it are numbers; they are not where a model gives what is none."""
        found = (self.largest_difference, self.mean_difference, self.kl, self.loss_reference, self.loss)
        return all(map(math.isfinite, found))


class FuseCheck(Record):
    """How a fused model was held against the base and adapter that it was made from.

    Attributes:
        way: "plain" where the adapted layers were not quantized before; else what became of them.
        dtype: That the fused matrices were rounded to, or the scales of quantized ones.
        tolerance_kl: Mean divergence that is passed, in nats a position.
        tolerance_loss: The same of the difference of the losses, in nats.
        passed: Whether it is within both; one that is not is kept only where that was asked for.
        source: The split that the rows are from; "prompts" where prompts of our own stood in.
        rows: That were read.
        agreement: What was found.
        refused: The same of the model quantized again, where that was not close enough and another way was taken.
    """

    way: Literal["plain", "requantized", "dequantized"]
    dtype: str
    tolerance_kl: float
    tolerance_loss: float
    passed: bool
    source: ProbeSource
    rows: int
    agreement: Agreement
    refused: Agreement | None = None


class RunRecord(Record):
    """`adapters/RUN/run.json`: what was run, on what, and how it ended.

    Attributes:
        identity: Hash of all that decides the result. A folder whose identity differs holds another run.
        status: "running" until the last step is taken and the best adapter is written.
        config: The training configuration as used.
        processes: That shared each batch.
        epochs: Whole ones done.
        stopped_early: Whether it ended before its last step, as what was minimised no longer fell on validation rows.
        cut_short: The same, as `--finish` asked for it.
        best_step: Optimizer steps taken by the adapter that `adapters.safetensors` holds.
        distilled_from: The teacher whose distribution was learned; None where text alone was.
        teacher_sha256: Hash of all that decides what it says.
        teacher_licence: As its files state it.
        first_divergence: Mean divergence from it in nats a token over the validation rows, before the first step.
        divergence: The same with the adapter of `best_step`.
        fusing: How the model that was last fused from it was checked; None before.
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
    processes: int = 1
    manifest: Manifest | None = None
    plan: MemoryPlan | None = None
    epochs: int = 0
    steps: int = 0
    stopped_early: bool = False
    cut_short: bool = False
    best_step: int | None = None
    first_valid_loss: float | None = None
    train_loss: float | None = None
    valid_loss: float | None = None
    test_loss: float | None = None
    token_accuracy: float | None = None
    distilled_from: str | None = None
    teacher_sha256: str | None = None
    teacher_licence: str | None = None
    first_divergence: float | None = None
    divergence: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    seconds: float | None = None
    fusing: FuseCheck | None = None
