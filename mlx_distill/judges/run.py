"""The step `judge`.

Reads: visuals/NAME/generations.jsonl.  Writes: visuals/NAME/verdicts.jsonl.

Each verdict is appended the moment it arrives. One whose answer has not changed since is not made again; one that
could not be read is. The verdicts of several judges stand in one file, and of two by one judge for one answer
the later counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

from mlx_distill.asking import run_interruptible
from mlx_distill.config import JudgeConfig
from mlx_distill.errors import InputError
from mlx_distill.execution import isolation_level
from mlx_distill.judges.base import Case, Judge
from mlx_distill.judges.llm import LlmJudge
from mlx_distill.judges.rubric import RubricJudge
from mlx_distill.layout import ComparisonFolder, append_row, drop_torn_line, lock, read_rows
from mlx_distill.progress import SILENT, Bar, Progress
from mlx_distill.records import Generation, Verdict
from mlx_distill.teachers.registry import open_teacher
from mlx_distill.verdicts import first_answers

#: Raised when a change makes the rubric score the same answers differently.
CODE_FORMAT = 1

_Key = tuple[str, str, str, str]


def judge_from_spec(config: JudgeConfig, progress: Progress = SILENT) -> Judge:
    """Open the judge that the settings name.

    Raises:
        ConfigError: There is no such judge or teacher.
        TeacherError: It cannot be used: no key, for instance.
    """
    if config.judge == RubricJudge.name:
        level = isolation_level()
        progress.say(
            f"The rubric runs the answers' Python and SQL in child processes with limits (isolation: {level.name}; "
            f"not covered: {', '.join(level.not_covered)})."
        )
        return RubricJudge()
    return LlmJudge(open_teacher(config.judge))


def judge(config: JudgeConfig, judge: Judge, progress: Progress = SILENT) -> list[Verdict]:
    """Score every answer of a comparison that this judge has not scored yet.

    Args:
        judge: Open; it is closed at the end.

    Returns:
        This judge's verdicts on all present answers, in their order.

    Raises:
        InputError: There are no answers, or a row cannot be read.
        FolderError: Another process uses the folder.
        TeacherUnavailableError: The judging model will answer nothing until the user acts; what it said is kept.
    """
    folder = ComparisonFolder(config.comparison)
    if not folder.generations.exists():
        raise InputError(
            "there are no answers to judge.",
            path=folder.generations,
            hint="Let the contenders answer:  mlx-distill compare adapters/NAME --prompts data/prompts/heldout.toml",
        )
    with lock(folder.root):
        generations = latest_generations(folder)
        drop_torn_line(folder.verdicts)
        known = {_key(v): v for v in read_rows(folder.verdicts, Verdict) if v.judge == judge.name}
        todo = [g for g in generations if not (found := known.get(_wanted(g, judge))) or not found.scores]
        if not todo:
            progress.say("Every answer has its verdict already.")
        with progress.task("Judging", total=len(todo), unit="answers") if todo else nullcontext(Bar()) as bar:

            def keep(verdict: Verdict) -> None:
                append_row(folder.verdicts, verdict)
                known[_key(verdict)] = verdict
                bar.advance()

            run_interruptible(_score_all([Case(g) for g in todo], judge, config.concurrency, keep))
        return [known[_wanted(g, judge)] for g in generations]


def latest_generations(folder: ComparisonFolder) -> list[Generation]:
    """The answers of a comparison that are judged.

    Raises:
        InputError: There are none, or a row cannot be read.
    """
    found = first_answers(read_rows(folder.generations, Generation))
    if not found:
        raise InputError("holds no answers.", path=folder.generations, hint="Run  mlx-distill compare  again.")
    return list(found.values())


async def _score_all(cases: Sequence[Case], judge: Judge, concurrency: int, keep: Callable[[Verdict], None]) -> None:
    queue = iter(cases)

    async def work() -> None:
        for case in queue:
            keep(await judge.score(case))

    workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(cases)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await judge.close()


def _key(verdict: Verdict) -> _Key:
    return verdict.prompt_id, verdict.contender, verdict.judge, verdict.answer_sha256


def _wanted(generation: Generation, judge: Judge) -> _Key:
    return generation.prompt.id, generation.contender, judge.name, generation.answer_sha256


def means(verdicts: Iterable[Verdict]) -> dict[str, dict[str, float]]:
    """Mean score by contender and dimension, with "overall" for the mean over both; what is missing is left out."""
    by_contender: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.scores:
            by_contender.setdefault(verdict.contender, []).append(verdict)
    found: dict[str, dict[str, float]] = {}
    for contender, scored in by_contender.items():
        dimensions = dict.fromkeys(name for verdict in scored for name in verdict.scores)
        rows = {name: [v.scores[name].score for v in scored if name in v.scores] for name in dimensions}
        found[contender] = {name: sum(values) / len(values) for name, values in rows.items()}
        found[contender]["overall"] = sum(v.overall or 0.0 for v in scored) / len(scored)
    return found
