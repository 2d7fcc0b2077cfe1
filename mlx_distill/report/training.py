"""The course of a training run, as the charts and tables show it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_distill.report.evidence import Evidence
from mlx_distill.run_records import MetricRow


@dataclass(frozen=True)
class Epoch:
    """A row of the progress table.

    Attributes:
        number: 0 is before the first step.
        train_loss: Mean over all target tokens of the epoch's steps, in nats.
        kept: Whether the adapter that was kept is from this epoch's end.
    """

    number: int
    steps: int
    train_loss: float | None
    train_accuracy: float | None
    valid_loss: float | None
    valid_accuracy: float | None
    learning_rate: float | None
    kept: bool


@dataclass(frozen=True)
class Course:
    """A training run from its first step to its last.

    Attributes:
        steps: One a step, with the loss on its own batch.
        valid: One an evaluation, the one before training included where there was one.
        test: The final test, if there was a test split.
        epochs: The progress table.
        best: The evaluation of the adapter that was kept.
    """

    steps: tuple[MetricRow, ...]
    valid: tuple[MetricRow, ...]
    test: MetricRow | None
    epochs: tuple[Epoch, ...]
    best: MetricRow | None

    @property
    def first(self) -> MetricRow | None:
        """The first evaluation."""
        return self.valid[0] if self.valid else None


def course_of(evidence: Evidence) -> Course | None:
    """The course of the run; None where it left no metrics."""
    if not evidence.metrics:
        return None
    steps = tuple(row for row in evidence.metrics if row.kind == "step")
    valid = tuple(row for row in evidence.metrics if row.kind == "valid")
    tests = [row for row in evidence.metrics if row.kind == "test"]
    best_step = evidence.run.best_step if evidence.run else None
    best = next((row for row in valid if row.step == best_step), None)
    if best is None and valid:
        best = min(valid, key=lambda row: row.loss)
    return Course(steps, valid, tests[-1] if tests else None, _epochs(steps, valid, best), best)


def epoch_ends(course: Course) -> list[tuple[int, int]]:
    """(epoch, last step of it) of every epoch that was begun."""
    last: dict[int, int] = {}
    for row in course.steps:
        last[_epoch_of(row)] = row.step
    return sorted(last.items())


def smooth(values: Sequence[float], window: int) -> list[float]:
    """A centred moving mean that narrows towards the ends, as long as its input."""
    half = window // 2
    return [
        sum(part) / len(part)
        for i in range(len(values))
        for part in [values[max(0, i - min(half, i, len(values) - 1 - i)) : i + min(half, i, len(values) - 1 - i) + 1]]
    ]


def _epochs(steps: Sequence[MetricRow], valid: Sequence[MetricRow], best: MetricRow | None) -> tuple[Epoch, ...]:
    evaluations = {round(row.epoch): row for row in valid}
    numbers = sorted({_epoch_of(row) for row in steps} | set(evaluations))
    return tuple(_epoch(n, [s for s in steps if _epoch_of(s) == n], evaluations.get(n), best) for n in numbers)


def _epoch(number: int, steps: Sequence[MetricRow], valid: MetricRow | None, best: MetricRow | None) -> Epoch:
    tokens = sum(row.target_tokens for row in steps)
    return Epoch(
        number=number,
        steps=len(steps),
        train_loss=sum(row.loss * row.target_tokens for row in steps) / tokens if tokens else None,
        train_accuracy=sum(row.token_accuracy * row.target_tokens for row in steps) / tokens if tokens else None,
        valid_loss=valid.loss if valid else None,
        valid_accuracy=valid.token_accuracy if valid else None,
        learning_rate=steps[-1].learning_rate if steps else None,
        kept=valid is not None and best is not None and valid.step == best.step,
    )


def _epoch_of(row: MetricRow) -> int:
    # A step that ends exactly on an epoch's end belongs to it, whatever the rounding.
    return max(1, math.ceil(row.epoch - 1e-6))
