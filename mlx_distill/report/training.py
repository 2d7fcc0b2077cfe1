"""The course of a training run, as the charts and tables show it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_distill.report.evidence import Evidence
from mlx_distill.run_records import MetricRow, RunRecord


@dataclass(frozen=True)
class Epoch:
    """A row of the progress table.

    Attributes:
        number: 0 is before the first step.
        train_loss: Mean over all target tokens of the epoch's steps, in nats.
        kept: Whether the adapter that was kept is from this epoch's end.
        train_divergence: Mean divergence from the teacher over the same tokens, in nats; None where none was learned.
    """

    number: int
    steps: int
    train_loss: float | None
    train_accuracy: float | None
    valid_loss: float | None
    valid_accuracy: float | None
    learning_rate: float | None
    kept: bool
    train_divergence: float | None = None
    valid_divergence: float | None = None


@dataclass(frozen=True)
class Minimised:
    """The divergence from a teacher that training minimised, over its own rows.

    Attributes:
        name: Which it is, such as "reverse KL divergence".
        teacher: Whose distribution was learned, where that is known.
        first: Over the validation rows before the first step, in nats a token.
        best: The same with the adapter that was kept.
        own: Whether some steps were on answers that the student wrote; these are no part of means over training rows.
    """

    name: str
    teacher: str | None
    first: float | None
    best: float | None
    own: bool


@dataclass(frozen=True)
class Course:
    """A training run from its first step to its last.

    Attributes:
        steps: One a step, with the loss on its own batch.
        valid: One an evaluation, the one before training included where there was one.
        test: The final test, if there was a test split.
        epochs: The progress table.
        best: The evaluation of the adapter that was kept.
        minimised: None where text alone was learned.
    """

    steps: tuple[MetricRow, ...]
    valid: tuple[MetricRow, ...]
    test: MetricRow | None
    epochs: tuple[Epoch, ...]
    best: MetricRow | None
    minimised: Minimised | None = None

    @property
    def of_rows(self) -> tuple[MetricRow, ...]:
        """The steps on training rows; all steps, where each was on answers that the student wrote."""
        return _of_rows(self.steps)

    @property
    def steps_title(self) -> str:
        """What the loss of `of_rows` is on."""
        own = bool(self.steps) and all(row.on_policy for row in self.steps)
        return "the student's own answers" if own else "training rows"

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
    minimised = _minimised(evidence.run, steps, valid, best)
    return Course(steps, valid, tests[-1] if tests else None, _epochs(steps, valid, best), best, minimised)


def _minimised(
    run: RunRecord | None, steps: Sequence[MetricRow], valid: Sequence[MetricRow], best: MetricRow | None
) -> Minimised | None:
    recorded = (run.first_divergence, run.divergence) if run else ()
    if all(value is None for value in (*recorded, *(row.divergence for row in (*steps, *valid)))):
        return None
    first, last = (valid[0].divergence if valid else None), (best.divergence if best else None)
    if run is not None:
        first = first if run.first_divergence is None else run.first_divergence
        last = last if run.divergence is None else run.divergence
    return Minimised(
        name=_name_of(run.config if run else {}),
        teacher=run.distilled_from if run else None,
        first=first,
        best=last,
        own=any(row.on_policy for row in steps),
    )


def _name_of(config: Mapping[str, Any]) -> str:
    """The divergence that a training was told to minimise, in words."""
    names = {
        "forward-kl": "forward KL divergence",
        "reverse-kl": "reverse KL divergence",
        "jsd": f"generalised Jensen-Shannon divergence, beta {config.get('distill_beta')}",
    }
    name = names.get(str(config.get("distill")), "divergence")
    temperature, weight = config.get("distill_temperature", 1), config.get("distill_weight", 1)
    name += f", at temperature {temperature}" if temperature != 1 else ""
    return name + (f", at a weight of {weight} against the loss" if weight != 1 else "")


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
    rows = _of_rows(steps)
    return Epoch(
        number=number,
        steps=len(steps),
        train_loss=_mean((row.loss, row.target_tokens) for row in rows),
        train_accuracy=_mean((row.token_accuracy, row.target_tokens) for row in rows),
        valid_loss=valid.loss if valid else None,
        valid_accuracy=valid.token_accuracy if valid else None,
        learning_rate=steps[-1].learning_rate if steps else None,
        kept=valid is not None and best is not None and valid.step == best.step,
        train_divergence=_mean((row.divergence, row.target_tokens) for row in rows),
        valid_divergence=valid.divergence if valid else None,
    )


def _of_rows(steps: Sequence[MetricRow]) -> tuple[MetricRow, ...]:
    # What the student wrote says nothing of the rows, as the loop has it too.
    return tuple(row for row in steps if not row.on_policy) or tuple(steps)


def _mean(values: Iterable[tuple[float | None, int]]) -> float | None:
    """The mean of what is known, each as often as it has tokens."""
    known = [(value, tokens) for value, tokens in values if value is not None]
    total = sum(tokens for _, tokens in known)
    return sum(value * tokens for value, tokens in known) / total if total else None


def _epoch_of(row: MetricRow) -> int:
    # A step that ends exactly on an epoch's end belongs to it, whatever the rounding.
    return max(1, math.ceil(row.epoch - 1e-6))
