"""Which answers are judged and shown, which verdicts and duels on them still hold, and what both duels of a pair say.

A comparison can be answered again after it was judged. A judge sees each pair of answers twice, with each in either
place. What it says in only one of the two orders is a tie: then it went by the place, not by the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_distill.records import Contender, Generation, Verdict
from mlx_distill.scores import Duel

#: Of a pair: who wins, as seen from one of its two sides.
Winner = Literal["first", "second", "tie"]

_SWAPPED: dict[Winner, Winner] = {"first": "second", "second": "first", "tie": "tie"}


def first_answers(rows: Iterable[Generation]) -> dict[tuple[str, Contender], Generation]:
    """The answers that are judged and shown, by prompt and contender: the first sample of each, the latest made."""
    return {(row.prompt.id, row.contender): row for row in rows if row.sample == 0}


def fitting_verdicts(
    verdicts: Iterable[Verdict], generations: Mapping[tuple[str, Contender], Generation]
) -> tuple[tuple[Verdict, ...], int]:
    """The latest verdict of each judge on each present answer, and how many answers have only outdated ones.

    Args:
        generations: The present answers, by prompt and contender.
    """
    fitting: dict[tuple[str, str, str], Verdict] = {}
    outdated: set[tuple[str, str, str]] = set()
    for verdict in verdicts:
        answer = generations.get((verdict.prompt_id, verdict.contender))
        key = (verdict.judge, verdict.prompt_id, verdict.contender)
        if answer is None:
            continue
        if verdict.answer_sha256 == answer.answer_sha256:
            fitting[key] = verdict
        else:
            outdated.add(key)
    return tuple(fitting.values()), len(outdated - fitting.keys())


def fitting_duels(
    rows: Iterable[Duel], generations: Mapping[tuple[str, Contender], Generation]
) -> tuple[tuple[Duel, ...], int]:
    """The latest duel of each judge between two present answers in one order, and how many are outdated.

    Args:
        generations: The present answers that are judged, by prompt and contender.
    """
    fitting: dict[tuple[str, str, str, str], Duel] = {}
    outdated: set[tuple[str, str, str, str]] = set()
    for row in rows:
        key = (row.judge, row.prompt_id, row.first, row.second)
        first, second = (generations.get((row.prompt_id, contender)) for contender in (row.first, row.second))
        if first is None or second is None:
            continue
        if (row.first_sha256, row.second_sha256) == (first.answer_sha256, second.answer_sha256):
            fitting[key] = row
        else:
            outdated.add(key)
    return tuple(fitting.values()), len(outdated - fitting.keys())


@dataclass(frozen=True)
class Settled:
    """Both orders of a pair taken together, as seen from `one`.

    Attributes:
        winner: None where one order is missing or could not be read.
        contradicted: Whether the orders named two different winners.
    """

    prompt_id: str
    winner: Winner | None
    contradicted: bool = False


def settled(duels: Iterable[Duel], one: Contender, other: Contender) -> list[Settled]:
    """The duels of one judge between two contenders, one a prompt; "first" is `one`."""
    orders: dict[str, list[Winner | None]] = {}
    for row in duels:
        if (row.first, row.second) == (one, other):
            orders.setdefault(row.prompt_id, []).append(row.winner)
        elif (row.first, row.second) == (other, one):
            orders.setdefault(row.prompt_id, []).append(_SWAPPED[row.winner] if row.winner else None)
    return [_together(prompt, winners) for prompt, winners in orders.items()]


def _together(prompt_id: str, winners: Sequence[Winner | None]) -> Settled:
    if len(winners) < 2 or None in winners:
        return Settled(prompt_id, None)
    named = set(winners)
    if len(named) == 1:
        return Settled(prompt_id, winners[0])
    return Settled(prompt_id, "tie", contradicted=named == {"first", "second"})
