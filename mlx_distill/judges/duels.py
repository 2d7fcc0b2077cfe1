"""Answers two by two: which pairs there are, in which order they are shown, and what a judge says of them.

Each pair is shown twice, with the answers in either place; `mlx_distill.verdicts.settled` takes both together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mlx_distill.judges.base import Pair
from mlx_distill.judges.llm import Choice
from mlx_distill.judges.quoting import shown
from mlx_distill.records import Contender, Generation, Verdict, content_hash
from mlx_distill.scores import Duel
from mlx_distill.verdicts import Winner

#: Overall scores, from 0 to 10, that differ by no more are a tie.
SCORE_TIE = 0.05


def pairs_of(contenders: Iterable[Contender]) -> list[tuple[Contender, Contender]]:
    """Who is held against whom: the student against base and teacher, and others against the base."""
    present = list(dict.fromkeys(contenders))
    wanted = [("distilled", "base"), ("distilled", "teacher")]
    wanted += [(name, "base") for name in present if name not in ("teacher", "base", "distilled")]
    return [(one, other) for one, other in wanted if one in present and other in present]


def drawn(generations: Sequence[Generation], names: tuple[str, ...]) -> Iterator[Pair]:
    """Every pair of answers to one prompt, in both orders; which comes first follows from a hash of the texts alone."""
    by_prompt: dict[str, dict[Contender, Generation]] = {}
    for generation in generations:
        by_prompt.setdefault(generation.prompt.id, {})[generation.contender] = generation
    pairs = pairs_of(generation.contender for generation in generations)
    for answers in by_prompt.values():
        for one, other in pairs:
            if one in answers and other in answers:
                first, second = _in_drawn_order(answers[one], answers[other])
                yield Pair(first, second, names)
                yield Pair(second, first, names)


def _in_drawn_order(one: Generation, other: Generation) -> tuple[Generation, Generation]:
    low, high = sorted((one, other), key=lambda generation: generation.text)
    odd = int(content_hash([one.prompt.text, low.text, high.text])[0], 16) % 2
    return (high, low) if odd else (low, high)


def identical(pair: Pair) -> bool:
    """Whether a judge would see the same text twice."""
    return shown(pair.first, pair.names) == shown(pair.second, pair.names)


def duel(
    pair: Pair, judge: str, winner: Winner | None = None, *, rationale: str = "", problem: str | None = None
) -> Duel:
    """What a judge says of a pair, as a row."""
    return Duel(
        prompt_id=pair.first.prompt.id,
        judge=judge,
        first=pair.first.contender,
        second=pair.second.contender,
        first_sha256=pair.first.answer_sha256,
        second_sha256=pair.second.answer_sha256,
        winner=winner,
        rationale=rationale,
        problem=problem,
    )


def chosen(pair: Pair, judge: str, choice: Choice) -> Duel:
    """The duel that a model's choice makes."""
    endings: dict[str, Winner] = {"A": "first", "B": "second", "tie": "tie"}
    return duel(pair, judge, endings[choice.winner], rationale=choice.rationale)


def by_scores(pair: Pair, judge: str, first: Verdict | None, second: Verdict | None) -> Duel:
    """The duel that two verdicts of a judge make: the higher overall score wins."""
    ours, theirs = first.overall if first else None, second.overall if second else None
    if ours is None or theirs is None:
        return duel(pair, judge, problem="one of the answers has no score")
    winner: Winner = "tie" if abs(ours - theirs) <= SCORE_TIE + 1e-9 else "first" if ours > theirs else "second"
    return duel(pair, judge, winner, rationale=f"Overall {ours:.2f} against {theirs:.2f}.")
