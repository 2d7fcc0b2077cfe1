"""Which results still speak of the present answers: those of earlier ones are left out, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mlx_distill.records import Contender, Generation
from mlx_distill.scores import HeldOutLoss, ScoredAnswer

AnswerKey = tuple[str, Contender, int]


def present_answers(rows: Iterable[Generation], samples: int | None) -> dict[AnswerKey, Generation]:
    """The latest answer by prompt, contender and sample.

    Args:
        samples: Of a comparison's record: answers beyond them are an earlier comparison's.
    """
    return {(row.prompt.id, row.contender, row.sample): row for row in rows if samples is None or row.sample < samples}


def fitting_outcomes(
    rows: Iterable[ScoredAnswer], answers: Mapping[AnswerKey, Generation], tasks: Mapping[str, str]
) -> tuple[tuple[ScoredAnswer, ...], int]:
    """The latest outcome of each present answer, and how many answers have only outdated ones.

    Args:
        tasks: By task, the hash of all that decides how an answer to it is scored; one that is not there is not held.
    """
    fitting: dict[AnswerKey, ScoredAnswer] = {}
    outdated: set[AnswerKey] = set()
    for row in rows:
        key = (row.outcome.task_id, row.contender, row.sample)
        answer = answers.get(key)
        if answer is None:
            continue
        if row.answer_sha256 == answer.answer_sha256 and tasks.get(key[0], row.task_sha256) == row.task_sha256:
            fitting[key] = row
        else:
            outdated.add(key)
    return tuple(fitting.values()), len(outdated - fitting.keys())


def fitting_losses(rows: Iterable[HeldOutLoss], models: Mapping[Contender, str]) -> tuple[tuple[HeldOutLoss, ...], int]:
    """The latest loss of each contender on each row, and how many are of a model that no longer stands for it.

    Args:
        models: What answers, by contender.
    """
    fitting: dict[tuple[str, str], HeldOutLoss] = {}
    outdated: set[tuple[str, str]] = set()
    for row in rows:
        key = (row.row_sha256, row.contender)
        if models.get(row.contender) == row.model:
            fitting[key] = row
        elif row.contender in models:
            outdated.add(key)
    return tuple(fitting.values()), len(outdated - fitting.keys())
