"""Verdicts added up: one scorecard a judge.

Means are over the answers that a judge could score. A missing verdict is missing: it is counted, never taken
for 0. There are no intervals here; with a handful of prompts none would be worth its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mlx_distill.judges.base import DIMENSIONS
from mlx_distill.records import Verdict
from mlx_distill.report.evidence import Evidence

RUBRIC = "rubric"
RUBRIC_LABEL = "a rubric, not a model's opinion"


@dataclass(frozen=True)
class JudgeLabel:
    """How a judge is named wherever its scores are shown.

    Attributes:
        spec: As it was asked for.
        short: For a chart's corner.
        full: With what has to be known to weigh its word.
    """

    spec: str
    short: str
    full: str

    @property
    def is_rubric(self) -> bool:
        """Whether the scores were computed, not given by a model."""
        return self.spec == RUBRIC


@dataclass(frozen=True)
class Mean:
    """A mean and over how many answers."""

    value: float
    n: int


@dataclass(frozen=True)
class Scorecard:
    """One judge's scores, added up.

    Attributes:
        dimensions: Mean by dimension id and contender.
        overall: Mean of the answers' overall scores by contender.
        prompts: Overall score by prompt id and contender.
        unread: Verdicts that could not be read.
        unjudged: Answers without any verdict of this judge.
        paired: Prompts that base and distilled were both scored on.
        paired_change: Mean difference distilled − base over those prompts.
    """

    judge: JudgeLabel
    dimensions: dict[str, dict[str, Mean]]
    overall: dict[str, Mean]
    prompts: dict[str, dict[str, float]]
    unread: tuple[Verdict, ...]
    unjudged: int
    paired: int
    paired_change: float | None

    def overall_of(self, contender: str) -> float | None:
        """The overall mean of a contender, None where nothing of it was scored."""
        mean = self.overall.get(contender)
        return mean.value if mean else None


def scorecards(evidence: Evidence) -> tuple[Scorecard, ...]:
    """One scorecard a judge; none where nothing was judged."""
    return tuple(_scorecard(evidence, judge) for judge in evidence.judges)


def dimension_title(dimension: str) -> str:
    """The title of a dimension id."""
    return DIMENSIONS.get(dimension, dimension)


def _scorecard(evidence: Evidence, judge: str) -> Scorecard:
    verdicts = [v for v in evidence.verdicts if v.judge == judge]
    scored = [v for v in verdicts if v.scores]
    known = [*DIMENSIONS, *(d for v in scored for d in v.scores if d not in DIMENSIONS)]
    prompts: dict[str, dict[str, float]] = {}
    for verdict in scored:
        overall = verdict.overall
        assert overall is not None
        prompts.setdefault(verdict.prompt_id, {})[verdict.contender] = overall
    pairs = [row["distilled"] - row["base"] for row in prompts.values() if {"base", "distilled"} <= row.keys()]
    return Scorecard(
        judge=label(judge, evidence),
        dimensions={
            d: _means(evidence, ((v.contender, v.scores[d].score) for v in scored if d in v.scores))
            for d in dict.fromkeys(known)
        },
        overall=_means(evidence, ((c, value) for row in prompts.values() for c, value in row.items())),
        prompts={p.id: prompts[p.id] for p in evidence.prompts if p.id in prompts},
        unread=tuple(v for v in verdicts if not v.scores),
        unjudged=len(evidence.generations) - len(verdicts),
        paired=len(pairs),
        paired_change=sum(pairs) / len(pairs) if pairs else None,
    )


def _means(evidence: Evidence, values: Iterable[tuple[str, float]]) -> dict[str, Mean]:
    by_contender: dict[str, list[float]] = {}
    for contender, value in values:
        by_contender.setdefault(contender, []).append(value)
    return {
        c: Mean(sum(by_contender[c]) / len(by_contender[c]), len(by_contender[c]))
        for c in evidence.contenders
        if c in by_contender
    }


def label(judge: str, evidence: Evidence) -> JudgeLabel:
    """Name a judge; one of the teacher's family is said to be so."""
    if judge == RUBRIC:
        return JudgeLabel(judge, RUBRIC, f"{RUBRIC} ({RUBRIC_LABEL})")
    model = judge.partition(":")[2] or judge
    teachers = {evidence.models.get("teacher", "")}
    if evidence.teacher:
        teachers.add(evidence.teacher)
    if evidence.manifest:
        teachers.update(evidence.manifest.teacher_models)
    kin = bool(_family(model)) and _family(model) in {_family(t.partition(":")[2] or t) for t in teachers if t}
    relation = "a model's opinion, of the teacher's own family" if kin else "a model's opinion"
    return JudgeLabel(judge, model, f"{model} ({relation})")


def _family(model: str) -> str:
    """ "claude-opus-4-6" and "claude-sonnet-5-5" are of one family, "claude"."""
    match = re.match(r"[a-z]+", model.rsplit("/", 1)[-1].lower())
    return match.group() if match else ""
