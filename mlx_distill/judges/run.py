"""The step `judge`.

Reads: visuals/NAME/generations.jsonl.  Writes: visuals/NAME/{verdicts.jsonl,duels.jsonl,judge.db}.

The verdicts of several judges stand in one file, and of two by one judge for one answer the later counts. One whose
answer has not changed since is not made again; one that could not be read is. What a model replied is kept in the
ledger the moment it arrives, and verdicts are read from there: an interrupted call is gone on with, and nothing is paid
for twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mlx_distill.asking import run_interruptible
from mlx_distill.budget import Budget
from mlx_distill.config import JudgeConfig
from mlx_distill.errors import ConfigError, InputError, MlxDistillError, TeacherError
from mlx_distill.judges.base import Case, Judge, Pair
from mlx_distill.judges.book import Book
from mlx_distill.judges.duels import by_scores, chosen, drawn, duel, identical
from mlx_distill.judges.hearing import Question, hear, put
from mlx_distill.judges.llm import LlmJudge, read_choice, read_scores
from mlx_distill.judges.rubric import RubricJudge
from mlx_distill.judges.workers import for_each
from mlx_distill.layout import ComparisonFolder, lock, read_rows
from mlx_distill.ledger import Ledger
from mlx_distill.pricing import price_of
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import Generation, Reply, Verdict
from mlx_distill.scores import Duel
from mlx_distill.teachers.registry import base_urls, open_teacher
from mlx_distill.verdicts import first_answers

#: Raised when a change makes the rubric score the same answers differently.
CODE_FORMAT = 1


@dataclass(frozen=True)
class Judged:
    """What judges made of a comparison.

    Attributes:
        verdicts: By judge, on the present answers, in their order.
        duels: By judge, of the present answers; empty where pairs were not asked for.
        unsent: By judge, how many questions the budget left no room for.
    """

    verdicts: dict[str, list[Verdict]]
    duels: dict[str, list[Duel]]
    unsent: dict[str, int]


def judges_from_spec(config: JudgeConfig, progress: Progress = SILENT) -> list[Judge]:
    """Open the judges that the settings name.

    Raises:
        ConfigError: There is no such judge or teacher, or one has no use for the base URL.
        TeacherError: It cannot be used: no key, for instance.
        DependencyError, IsolationError: The rubric cannot run the answers' code as is asked.
    """
    urls = base_urls(config.judges, config.base_url, what="judges")
    opened: list[Judge] = []
    try:
        for spec, base_url in urls.items():
            if spec == RubricJudge.name:
                opened.append(RubricJudge.confined(config.sandbox, progress))
            else:
                opened.append(LlmJudge(open_teacher(spec, base_url=base_url)))
    except MlxDistillError:
        asyncio.run(_close(opened))
        raise
    return opened


def judge(config: JudgeConfig, judge: Judge, progress: Progress = SILENT) -> list[Verdict]:
    """Score every answer of a comparison that this judge has not scored yet.

    Args:
        judge: Open; it is closed at the end.

    Returns:
        This judge's verdicts on all present answers, in their order; what the budget left no room for is not there.

    Raises:
        MlxDistillError: As `judge_all`.
    """
    return judge_all(config, [judge], progress).verdicts[judge.name]


def judge_all(config: JudgeConfig, judges: Sequence[Judge], progress: Progress = SILENT) -> Judged:
    """Let judges, one after the other, score every answer of a comparison, and compare pairs where that is set.

    Args:
        judges: Open, and of different names; they are closed at the end.

    Raises:
        InputError: There are no answers, or a row cannot be read.
        ConfigError: `max_cost` cannot be held, or there are no pairs. Nothing is sent.
        FolderError: Another process uses the folder.
        TeacherUnavailableError: A judging model will answer nothing until the user acts; what it said is kept.
        KeyboardInterrupt: Interrupted; what was under way was waited for and is kept.
    """
    return run_interruptible(_judge_all(config, judges, progress))


def require_verdicts(judged: Judged) -> None:
    """Refuse to go on with a judge that was not asked everything, or gave no verdict that can be read.

    Raises:
        TeacherError: Says which, and what to do.
    """
    for name, verdicts in judged.verdicts.items():
        if unsent := judged.unsent[name]:
            raise TeacherError(
                f"{name} was not asked {unsent} questions, since the budget had no room for them.",
                hint="Raise judge.max_cost.",
            )
        if not any(verdict.scores for verdict in verdicts):
            first = f" The first: {verdicts[0].problem}" if verdicts else ""
            raise TeacherError(f"{name} gave no verdict that can be read.{first}", hint="The same command asks again.")


async def _judge_all(config: JudgeConfig, judges: Sequence[Judge], progress: Progress) -> Judged:
    try:
        folder = ComparisonFolder(config.comparison)
        if not folder.generations.exists():
            raise InputError(
                "there are no answers to judge.",
                path=folder.generations,
                hint="Let the contenders answer:  mlx-distill compare adapters/NAME "
                "--prompts data/prompts/heldout.toml",
            )
        for one in judges:
            if isinstance(one, LlmJudge):
                Budget(price_of(one.name), config.max_cost)  # Says so, where the limit cannot be held.
        with lock(folder.root):
            return await _Session(config, folder, progress).hold(judges)
    finally:
        await _close(judges)


async def _close(judges: Iterable[Judge]) -> None:
    for one in judges:
        await one.close()


def latest_generations(folder: ComparisonFolder) -> list[Generation]:
    """The answers of a comparison that are judged.

    Raises:
        InputError: There are none, or a row cannot be read.
    """
    found = first_answers(read_rows(folder.generations, Generation))
    if not found:
        raise InputError("holds no answers.", path=folder.generations, hint="Run  mlx-distill compare  again.")
    return list(found.values())


def names_in(generations: Iterable[Generation]) -> tuple[str, ...]:
    """What no judge may read: the contenders of a comparison and their models, in an order of their own."""
    return tuple(sorted({name for one in generations for name in (one.contender, one.model)}))


@dataclass(frozen=True)
class _Wanted:
    """A question, and the row that stands for it where no reply can be read."""

    question: Question[Verdict | Duel]
    unread: Callable[[str], Verdict | Duel]


class _Session:
    """Judges, one after the other, over one comparison."""

    def __init__(self, config: JudgeConfig, folder: ComparisonFolder, progress: Progress) -> None:
        self._config, self._folder, self._progress = config, folder, progress
        self._answers = latest_generations(folder)
        self._book = Book(folder)
        names = names_in(self._answers)
        self._cases = [Case(answer, names) for answer in self._answers]
        self._pairs = list(drawn(self._answers, names)) if config.pairwise else []
        if config.pairwise and not self._pairs:
            contenders = dict.fromkeys(answer.contender for answer in self._answers)
            raise ConfigError(
                f"--pairwise: no two answers are held against each other; there are those of {', '.join(contenders)}.",
                hint="Pairs are of distilled with base and teacher, and of others with base. Leave --pairwise out.",
            )

    async def hold(self, judges: Sequence[Judge]) -> Judged:
        unsent = {}
        for one in judges:
            unsent[one.name] = 0
            if isinstance(one, LlmJudge):
                unsent[one.name] = await self._hear(one)
            else:
                await self._score(one)
        return Judged(
            {one.name: self._book.verdicts(one.name, self._answers) for one in judges},
            {one.name: self._book.duels(one.name, self._pairs) for one in judges},
            unsent,
        )

    def _unscored(self, judge: Judge) -> list[Case]:
        found = [(case, self._book.verdict(judge.name, case.generation)) for case in self._cases]
        todo = [case for case, verdict in found if verdict is None or not verdict.scores]
        if not todo:
            self._progress.say("Every answer has its verdict already.")
        return todo

    async def _score(self, judge: Judge) -> None:
        """A judge that asks nobody; of a pair, its scores say which is better."""
        if todo := self._unscored(judge):
            with self._progress.task("Judging", total=len(todo), unit="answers") as bar:

                async def score(case: Case) -> None:
                    self._book.keep(await judge.score(case))
                    bar.advance()

                await for_each(todo, score, at_once=min(self._config.concurrency, len(todo)))
        for pair in self._pairs:
            first, second = (self._book.verdict(judge.name, answer) for answer in (pair.first, pair.second))
            self._book.keep(by_scores(pair, judge.name, first, second))

    async def _hear(self, judge: LlmJudge) -> int:
        """A judge that is a model.

        Returns:
            How many questions the budget left no room for.
        """
        wanted = [_about_answer(judge, case) for case in self._unscored(judge)]
        for pair in self._pairs:
            known = self._book.duel(judge.name, pair)
            if known is not None and known.winner is not None:
                continue
            if identical(pair):
                self._book.keep(duel(pair, judge.name, "tie", rationale="The answers are the same; nobody was asked."))
            else:
                wanted.append(_about_pair(judge, pair))
        if not wanted:
            return 0
        with Ledger(self._folder.judge_ledger) as ledger:
            try:
                return await put(
                    [one.question for one in wanted],
                    judge.teacher,
                    ledger,
                    concurrency=self._config.concurrency,
                    budget=Budget(price_of(judge.name), self._config.max_cost, ledger.spending()),
                    progress=self._progress,
                    title="Judging",
                )
            finally:
                for one in wanted:
                    heard = hear(one.question, ledger)
                    if heard.found is not None:
                        self._book.keep(heard.found)
                    elif heard.problem is not None:
                        self._book.keep(one.unread(heard.problem))


def _about_answer(judge: LlmJudge, case: Case) -> _Wanted:
    def read(reply: Reply) -> Verdict:
        return judge.verdict(case.generation, scores=read_scores(reply))

    question = Question[Verdict | Duel](judge.request(case.generation, case.names), read)
    return _Wanted(question, lambda problem: judge.verdict(case.generation, problem=problem))


def _about_pair(judge: LlmJudge, pair: Pair) -> _Wanted:
    def read(reply: Reply) -> Duel:
        return chosen(pair, judge.name, read_choice(reply))

    question = Question[Verdict | Duel](judge.pair_request(pair), read)
    return _Wanted(question, lambda problem: duel(pair, judge.name, problem=problem))
