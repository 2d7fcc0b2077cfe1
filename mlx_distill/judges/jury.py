"""What several judges make of the same answers: each one's means and gap, and how far they agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlx_distill.records import Contender, Verdict
from mlx_distill.stats import agreement_of_scores


@dataclass(frozen=True)
class Gap:
    """The mean difference of overall scores, distilled − base, over the prompts that both were scored on."""

    mean: float
    prompts: int


@dataclass(frozen=True)
class JuryAgreement:
    """How far judges agree.

    Attributes:
        alpha: Krippendorff's, for intervals, of overall scores: 1 is perfect, 0 what chance gives. None where it is
            not defined, as where all scores are the same.
        answers: That at least two of the judges scored.
    """

    alpha: float | None
    answers: int


def means(verdicts: Iterable[Verdict]) -> dict[Contender, dict[str, float]]:
    """Mean score by contender and dimension, with "overall" for the mean over both; what is missing is left out."""
    by_contender: dict[Contender, list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.scores:
            by_contender.setdefault(verdict.contender, []).append(verdict)
    found: dict[Contender, dict[str, float]] = {}
    for contender, scored in by_contender.items():
        dimensions = dict.fromkeys(name for verdict in scored for name in verdict.scores)
        rows = {name: [v.scores[name].score for v in scored if name in v.scores] for name in dimensions}
        found[contender] = {name: sum(values) / len(values) for name, values in rows.items()}
        found[contender]["overall"] = sum(v.overall or 0.0 for v in scored) / len(scored)
    return found


def gap(verdicts: Iterable[Verdict]) -> Gap | None:
    """A judge's gap; None where no prompt has a score of both."""
    by_prompt: dict[str, dict[Contender, float]] = {}
    for verdict in verdicts:
        if verdict.overall is not None:
            by_prompt.setdefault(verdict.prompt_id, {})[verdict.contender] = verdict.overall
    found = [row["distilled"] - row["base"] for row in by_prompt.values() if {"base", "distilled"} <= row.keys()]
    return Gap(sum(found) / len(found), len(found)) if found else None


def jury_agreement(verdicts: Mapping[str, Sequence[Verdict]]) -> JuryAgreement | None:
    """How far the judges of a jury agree; None where there is only one.

    Args:
        verdicts: By judge.
    """
    if len(verdicts) < 2:
        return None
    scores = [
        {(v.prompt_id, v.contender): v.overall for v in rows if v.overall is not None} for rows in verdicts.values()
    ]
    return JuryAgreement(*agreement_of_scores(scores))
