"""Which answers are judged and shown, and which verdicts on them still hold: a comparison can be answered again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mlx_distill.records import Contender, Generation, Verdict


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
