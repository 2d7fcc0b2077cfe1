"""Verdicts added up: one scorecard a judge.

Means are over the answers that a judge could score. A missing verdict is missing: it is counted, never taken
for 0. Intervals are bootstraps over prompt families; with a handful of them there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_distill.families import same_family
from mlx_distill.judges.base import DIMENSIONS
from mlx_distill.records import Verdict
from mlx_distill.report.evidence import Evidence
from mlx_distill.report.intervals import Estimate, estimate

RUBRIC = "rubric"
RUBRIC_LABEL = "a rubric, not a model's opinion"


@dataclass(frozen=True)
class JudgeLabel:
    """How a judge is named wherever its scores are shown.

    Attributes:
        spec: As it was asked for.
        short: For a chart's corner.
        full: With what has to be known to weigh its word.
        kin: Whether it is of the teacher's own family, and so may favour it and its students.
    """

    spec: str
    short: str
    full: str
    kin: bool = False

    @property
    def is_rubric(self) -> bool:
        """Whether the scores were computed, not given by a model."""
        return self.spec == RUBRIC


@dataclass(frozen=True)
class Scorecard:
    """One judge's scores, added up.

    Attributes:
        dimensions: Mean by dimension id and contender, without intervals.
        overall: Mean of the answers' overall scores by contender.
        prompts: Overall score by prompt id and contender.
        unread: Verdicts that could not be read.
        unjudged: Answers without any verdict of this judge.
        change: distilled − base over the prompts that both were scored on.
        dimension_changes: The same by dimension id.
    """

    judge: JudgeLabel
    dimensions: dict[str, dict[str, Estimate]]
    overall: dict[str, Estimate]
    prompts: dict[str, dict[str, float]]
    unread: tuple[Verdict, ...]
    unjudged: int
    change: Estimate | None
    dimension_changes: dict[str, Estimate]

    def overall_of(self, contender: str) -> float | None:
        """The overall mean of a contender, None where nothing of it was scored."""
        mean = self.overall.get(contender)
        return mean.value if mean else None


def scorecards(evidence: Evidence) -> tuple[Scorecard, ...]:
    """One scorecard a judge, none where nothing was judged: models first, of these the teacher's kin last."""
    cards = (_scorecard(evidence, judge) for judge in evidence.judges)
    return tuple(sorted(cards, key=lambda card: (card.judge.is_rubric, card.judge.kin)))


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
    families = {p.id: p.family for p in evidence.prompts}
    by_dimension: dict[str, dict[str, dict[str, float]]] = {}
    for dimension in dict.fromkeys(known):
        rows = by_dimension.setdefault(dimension, {})
        for verdict in scored:
            if dimension in verdict.scores:
                rows.setdefault(verdict.prompt_id, {})[verdict.contender] = verdict.scores[dimension].score
    changes = {d: paired_change(rows, families) for d, rows in by_dimension.items()}
    return Scorecard(
        judge=label(judge, evidence),
        dimensions={d: _means(rows, evidence, {}) for d, rows in by_dimension.items()},
        overall=_means(prompts, evidence, families),
        prompts={p.id: prompts[p.id] for p in evidence.prompts if p.id in prompts},
        unread=tuple(v for v in verdicts if not v.scores),
        unjudged=len(evidence.generations) - len(verdicts),
        change=paired_change(prompts, families),
        dimension_changes={d: change for d, change in changes.items() if change},
    )


def paired_change(
    rows: Mapping[str, Mapping[str, float]],
    families: Mapping[str, str],
    contender: str = "distilled",
    other: str = "base",
) -> Estimate | None:
    """The mean difference of two contenders' scores over the prompts that both were scored on.

    Args:
        rows: Scores by prompt id and contender.
        families: Of the prompts, by id.
    """
    both = [(name, row[contender] - row[other]) for name, row in rows.items() if {contender, other} <= row.keys()]
    return estimate([change for _, change in both], [families[name] for name, _ in both])


def _means(
    rows: Mapping[str, Mapping[str, float]], evidence: Evidence, families: Mapping[str, str]
) -> dict[str, Estimate]:
    means = {}
    for contender in evidence.contenders:
        own = [(name, row[contender]) for name, row in rows.items() if contender in row]
        # Without families all are of one, of which there is no interval: nobody asks for those of single dimensions.
        if mean := estimate([value for _, value in own], [families.get(name) for name, _ in own]):
            means[contender] = mean
    return means


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
    kin = any(same_family(judge, teacher) for teacher in teachers if teacher)
    relation = "a model's opinion, of the teacher's own family" if kin else "a model's opinion"
    return JudgeLabel(judge, model, f"{model} ({relation})", kin)
