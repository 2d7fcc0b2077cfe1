"""All that a report says, worked out once: the page, the tables and the charts are drawn from the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_distill.report import findings
from mlx_distill.report.agreeing import Consensus, consensus_of
from mlx_distill.report.cost import CostScaling, cost_scaling
from mlx_distill.report.evidence import Evidence
from mlx_distill.report.losses import Losses, losses_of
from mlx_distill.report.objective import FEWEST_TASKS, Objective, objective_of
from mlx_distill.report.pairs import Pairing, pairings
from mlx_distill.report.rivals import Versus, rivals_of
from mlx_distill.report.scores import Scorecard, scorecards
from mlx_distill.report.training import Course, course_of
from mlx_distill.report.wording import percent, plural, points, title_of


@dataclass(frozen=True)
class Analysis:
    """What follows from the evidence.

    Attributes:
        cards: One a judge.
        objective: What hidden tests say; None where none ran.
        losses: On the teacher's held-out answers.
        pairs: What judges that saw two answers at a time prefer.
        consensus: How far several judges agree; None of fewer than two.
        rivals: Other runs' students against this one.
    """

    evidence: Evidence
    cards: tuple[Scorecard, ...]
    course: Course | None
    scaling: CostScaling | None
    objective: Objective | None
    losses: Losses | None
    pairs: tuple[Pairing, ...]
    consensus: Consensus | None
    rivals: tuple[Versus, ...]

    @property
    def scored(self) -> tuple[Scorecard, ...]:
        """Scorecards of judges that could score something."""
        return tuple(card for card in self.cards if card.overall)

    @property
    def tests_lead(self) -> bool:
        """Whether there are enough tested tasks for the headline to rest on them."""
        change = self.objective.change if self.objective else None
        return change is not None and change.n >= FEWEST_TASKS

    @property
    def missing(self) -> list[findings.Note]:
        """What a full report would have beside this."""
        return findings.missing(self.evidence, self.cards, self.course, tested=self.objective is not None)

    @property
    def cautions(self) -> list[findings.Note]:
        """What to know before believing a number."""
        return findings.cautions(self.evidence, self.cards, self.objective)


def analyse(evidence: Evidence) -> Analysis:
    """Work out all that a report says."""
    cards = scorecards(evidence)
    objective = objective_of(evidence)
    return Analysis(
        evidence=evidence,
        cards=cards,
        course=course_of(evidence),
        scaling=cost_scaling(evidence),
        objective=objective,
        losses=losses_of(evidence),
        pairs=pairings(evidence),
        consensus=consensus_of(cards),
        rivals=rivals_of(evidence, cards, objective),
    )


def headline(analysis: Analysis, *, judged: bool = True) -> str:
    """What changed, in one sentence: by the tests where there are enough, else by the first judge, else by training.

    Args:
        judged: Whether to name the judge that the sentence rests on, where there are several.
    """
    if analysis.tests_lead and analysis.objective:
        return objective_finding(analysis.objective)
    scored = analysis.scored
    if scored and (finding := findings.score_finding(scored[0])):
        return findings.attributed(finding, scored) if judged else finding
    if analysis.course and (finding := findings.training_finding(analysis.course)):
        return f"{finding.partition(',')[0]}; the answers have not been judged yet."
    evidence = analysis.evidence
    who = ", ".join(title_of(c).lower() for c in evidence.contenders)
    return f"{plural(len(evidence.prompts), 'prompt')} answered by {who}, not judged yet."


def objective_finding(objective: Objective) -> str:
    """What the tests say."""
    both = {"base", "distilled"} <= objective.contenders.keys()
    change = objective.change if both else None
    if change is None:
        known = ", ".join(f"{title_of(c).lower()} {percent(t.pass_1.value)}" for c, t in objective.contenders.items())
        return f"Tasks passed at the first try: {known}."
    paired = [task for task in objective.tasks if {"base", "distilled"} <= task.counts.keys()]
    before, after = (sum(task.rate(c) for task in paired) / len(paired) for c in ("base", "distilled"))
    teacher = objective.contenders.get("teacher")
    against = f"; its teacher passes {percent(teacher.pass_1.value)}" if teacher else ""
    known_to = findings.change_in_words(change, points, " points")
    tasks = plural(change.n, "task")
    if change.settled is False:
        verb = (
            f"The student passes {percent(after)} of {tasks} after distillation and {percent(before)} before: "
            f"not distinguishable"
        )
    elif percent(after) == percent(before):
        verb = f"Distillation left the student at {percent(after)} of {tasks} passed"
    elif after > before:
        verb = f"Distillation took the student from {percent(before)} to {percent(after)} of {tasks} passed"
    else:
        verb = f"The distilled student passes less than its base, {percent(after)} after {percent(before)} of {tasks}"
    return f"{verb}{known_to}{against}."


def overall_means(cards: Sequence[Scorecard]) -> dict[str, dict[str, float]]:
    """Overall mean by judge and contender."""
    return {card.judge.spec: {c: mean.value for c, mean in card.overall.items()} for card in cards}
