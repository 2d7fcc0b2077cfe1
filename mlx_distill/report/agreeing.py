"""How far several judges agree on the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_distill.report.scores import JudgeLabel, Scorecard
from mlx_distill.stats import agreement_of_scores


@dataclass(frozen=True)
class Consensus:
    """Several judges on the same answers.

    Attributes:
        alpha: Krippendorff's, of the overall scores as intervals: 1 is agreement, 0 what chance would give.
        answers: That more than one judge scored.
    """

    judges: tuple[JudgeLabel, ...]
    alpha: float | None
    answers: int


def consensus_of(cards: Sequence[Scorecard]) -> Consensus | None:
    """What the judges have in common; None where fewer than two scored anything."""
    scored = [card for card in cards if card.overall]
    if len(scored) < 2:
        return None
    scores = [{(name, c): score for name, row in card.prompts.items() for c, score in row.items()} for card in scored]
    alpha, shared = agreement_of_scores(scores)
    return Consensus(tuple(card.judge for card in scored), alpha, shared)
