"""What judges prefer who see two answers to a prompt at a time, each pair in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_distill.report.evidence import Evidence
from mlx_distill.report.intervals import FEWEST_GROUPS, Estimate, estimate
from mlx_distill.report.scores import JudgeLabel, label
from mlx_distill.scores import Duel
from mlx_distill.stats import Choice, Interval, flip_rate, length_controlled_win_rate, position_bias


@dataclass(frozen=True)
class Pairing:
    """One judge on one contender against another.

    Attributes:
        wins: Prompts on which it prefers the contender in both orders.
        ties: On which it prefers neither, or not the same in both.
        unread: On which a verdict is missing or could not be read; they count as nothing.
        rate: Wins and half the ties, of all.
        controlled: The same as it would be at equal length, in characters; None where that cannot be told.
        flips: Share of the pairs on which the judge says something else once the answers are swapped.
        bias: Share of the verdicts for a side that are for the answer seen first, less a half.
        results: By prompt, 1 for a win, 0.5 for a tie, 0 for a loss.
    """

    judge: JudgeLabel
    contender: str
    opponent: str
    wins: int
    ties: int
    losses: int
    unread: int
    rate: Estimate | None
    controlled: Estimate | None
    flips: Estimate | None
    bias: Estimate | None
    results: dict[str, float]


def pairings(evidence: Evidence) -> tuple[Pairing, ...]:
    """Every pair that a judge saw, seen from the distilled student, else from the one that comes later in display."""
    order = list(evidence.contenders)
    found: dict[tuple[str, str, str], list[Duel]] = {}
    for duel in evidence.duels:
        sides = sorted((duel.first, duel.second), key=lambda c: (c != "distilled", -order.index(c)))
        found.setdefault((duel.judge, sides[0], sides[1]), []).append(duel)
    pairs = [_pairing(evidence, *key, duels) for key, duels in found.items()]
    return tuple(sorted(pairs, key=lambda p: (p.judge.kin, p.contender != "distilled", order.index(p.opponent))))


def _pairing(evidence: Evidence, judge: str, contender: str, opponent: str, duels: Sequence[Duel]) -> Pairing:
    by_prompt: dict[str, dict[bool, Duel]] = {}
    for duel in duels:
        by_prompt.setdefault(duel.prompt_id, {})[duel.first == contender] = duel
    whole = {
        prompt: (both[True], both[False])
        for prompt, both in by_prompt.items()
        if len(both) == 2 and all(duel.winner is not None for duel in both.values())
    }
    results = {prompt: _result(*both) for prompt, both in whole.items()}
    families = {p.id: p.family for p in evidence.prompts}
    values, groups = list(results.values()), [families[prompt] for prompt in results]
    choices = [(_choice(own_first), _choice(own_second)) for own_first, own_second in whole.values()]
    lengths = [_length(evidence, prompt, contender) - _length(evidence, prompt, opponent) for prompt in results]
    return Pairing(
        judge=label(judge, evidence),
        contender=contender,
        opponent=opponent,
        wins=values.count(1.0),
        ties=values.count(0.5),
        losses=values.count(0.0),
        unread=len(by_prompt) - len(whole),
        rate=estimate(values, groups, kind="share"),
        controlled=_estimate(length_controlled_win_rate(values, lengths, groups))
        if len(set(groups)) >= FEWEST_GROUPS
        else None,
        flips=_estimate(flip_rate(choices, groups=groups)),
        bias=_estimate(position_bias(choices, groups=groups)),
        results=results,
    )


def _choice(duel: Duel) -> Choice:
    assert duel.winner is not None
    return duel.winner


def _estimate(found: Interval | None) -> Estimate | None:
    if found is None:
        return None
    return Estimate(found.mean, found.n, found.groups, found if found.groups >= FEWEST_GROUPS else None)


def _length(evidence: Evidence, prompt: str, contender: str) -> int:
    answer = evidence.answer(prompt, contender)
    return len(answer.text) if answer else 0


def _result(own_first: Duel, own_second: Duel) -> float:
    if own_first.winner == "first" and own_second.winner == "second":
        return 1.0
    if own_first.winner == "second" and own_second.winner == "first":
        return 0.0
    return 0.5
