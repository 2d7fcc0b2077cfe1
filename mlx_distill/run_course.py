"""What `metrics.jsonl` tells of a run that is not finished: how far it is, how fast, and its best validation so far.

Reads: adapters/RUN/metrics.jsonl, of whichever version, as far as it goes.  Writes: nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mlx_distill.distillation import Objective

#: Longer lines are none of ours.
_LONGEST_LINE = 1 << 16
#: Last rows that the speed of a run under way is taken from.
_RECENT_ROWS = 64


class RowFacts(BaseModel):
    """Part of a row: what is not known is left out."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    kind: str
    step: int
    epoch: float
    loss: float
    divergence: float | None = None
    token_accuracy: float | None = None
    tokens: int = 0
    seconds: float | None = None


@dataclass
class Course:
    """Of a run.

    Attributes:
        first_valid: The first validation.
        best_valid: The one with the least of what is minimised.
        recent: The last rows.
    """

    first_valid: RowFacts | None = None
    best_valid: RowFacts | None = None
    recent: deque[RowFacts] = field(default_factory=deque)

    @property
    def last(self) -> RowFacts | None:
        """The last row."""
        return self.recent[-1] if self.recent else None

    @property
    def tokens_per_second(self) -> float | None:
        """Over the last steps; the time between a step's row and the row before it is the step's."""
        tokens, seconds = 0, 0.0
        for before, row in pairwise(self.recent):
            if row.kind == "step" and row.seconds is not None and before.seconds is not None:
                tokens += row.tokens
                seconds += row.seconds - before.seconds
        return tokens / seconds if seconds > 0 else None


def read_course(path: Path, objective: Objective | None) -> Course:
    """Read in one pass, of which only evaluations and the last rows are looked at and kept.

    Args:
        objective: What is minimised; None where it is the loss alone.
    """

    def minimised(row: RowFacts) -> float:
        if objective is None or row.divergence is None:
            return row.loss
        return objective.combine(row.loss, row.divergence)

    course = Course()
    recent: deque[bytes] = deque(maxlen=_RECENT_ROWS)
    try:
        with path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                if not line.endswith(b"\n"):
                    continue  # torn, or none of ours
                recent.append(line)
                if b'"valid"' not in line or (row := _row(line)) is None or row.kind != "valid":
                    continue
                course.first_valid = course.first_valid or row
                if course.best_valid is None or minimised(row) < minimised(course.best_valid):
                    course.best_valid = row
    except OSError:
        pass  # No metrics: not a step is known of.
    course.recent.extend(row for line in recent if (row := _row(line)) is not None)
    return course


def _row(line: bytes) -> RowFacts | None:
    try:
        return RowFacts.model_validate_json(line)
    except ValidationError:
        return None
