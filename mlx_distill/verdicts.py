"""Which answers are judged and shown, and which verdicts and duels on them still hold.

A comparison can be answered again after it was judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mlx_distill.records import Contender, Generation, Verdict
from mlx_distill.scores import Duel


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
