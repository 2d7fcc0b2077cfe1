"""What judges prefer who see two answers to a prompt at a time, each pair in both orders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mlx_distill.report.evidence import Evidence
from mlx_distill.report.intervals import FEWEST_GROUPS, Estimate, estimate
from mlx_distill.report.scores import JudgeLabel, label
from mlx_distill.scores import Duel
from mlx_distill.stats import Choice, Interval, flip_rate, length_controlled_win_rate, position_bias
from mlx_distill.verdicts import settled

#: What a pair counts for one who wins it, ties, or loses it.
_WORTH = {"first": 1.0, "tie": 0.5, "second": 0.0}


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
    pairs = settled(duels, contender, opponent)
    results = {pair.prompt_id: _WORTH[pair.winner] for pair in pairs if pair.winner is not None}
    families = {p.id: p.family for p in evidence.prompts}
    values, groups = list(results.values()), [families[prompt] for prompt in results]
    choices = list(_choices(duels, contender, results))
    lengths = [_length(evidence, prompt, contender) - _length(evidence, prompt, opponent) for prompt in results]
    return Pairing(
        judge=label(judge, evidence),
        contender=contender,
        opponent=opponent,
        wins=values.count(1.0),
        ties=values.count(0.5),
        losses=values.count(0.0),
        unread=len(pairs) - len(results),
        rate=estimate(values, groups, kind="share"),
        controlled=_estimate(length_controlled_win_rate(values, lengths, groups))
        if len(set(groups)) >= FEWEST_GROUPS
        else None,
        flips=_estimate(flip_rate(choices, groups=groups)),
        bias=_estimate(position_bias(choices, groups=groups)),
        results=results,
    )


def _choices(duels: Sequence[Duel], contender: str, prompts: Iterable[str]) -> Iterator[tuple[Choice, Choice]]:
    """What was said of each pair with the contender's answer seen first, and with it seen second."""
    said = {(duel.prompt_id, duel.first == contender): duel.winner for duel in duels}
    for prompt in prompts:
        own_first, own_second = said[prompt, True], said[prompt, False]
        assert own_first is not None and own_second is not None
        yield own_first, own_second


def _estimate(found: Interval | None) -> Estimate | None:
    if found is None:
        return None
    return Estimate(found.mean, found.n, found.groups, found if found.groups >= FEWEST_GROUPS else None)


def _length(evidence: Evidence, prompt: str, contender: str) -> int:
    answer = evidence.answer(prompt, contender)
    return len(answer.text) if answer else 0
