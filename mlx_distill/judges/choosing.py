"""Judges that say which answers of a collection are best: the rubric, or a model through a ledger of its own.

Reads and writes: `judge.db` beside the collection's ledger, where a model judges. What it replied once is not asked, or
paid for, again, and all that it costs counts against the collection's `max_cost`. The rubric asks nobody and keeps
nothing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from itertools import islice

from mlx_distill.budget import Budget
from mlx_distill.config import CollectConfig
from mlx_distill.errors import ConfigError, TeacherError
from mlx_distill.judges.base import Case
from mlx_distill.judges.hearing import Question, hear, put
from mlx_distill.judges.llm import LlmJudge, read_scores
from mlx_distill.judges.rubric import RubricJudge
from mlx_distill.judges.workers import for_each
from mlx_distill.layout import DataFolder
from mlx_distill.ledger import Entry, Ledger, Spending
from mlx_distill.pricing import FREE, price_of
from mlx_distill.progress import Progress
from mlx_distill.records import Generation, Prompt, Reply
from mlx_distill.teachers.registry import open_teacher

#: Questions held at a time.
_CHUNK = 500

_CONTENDER = "teacher"


def open_scorer(config: CollectConfig) -> RubricScorer | ModelScorer | None:
    """Open the judge that a collection's settings name; None where none is asked.

    Raises:
        ConfigError: There is no such judge, or nothing bounds what it costs.
        MlxDistillError: As `open_teacher`.
    """
    if config.choose != "best" or config.dry_run:
        return None
    if config.judge == RubricJudge.name:
        return RubricScorer(config)
    price = price_of(config.judge)
    if price is None and config.max_cost is not None:
        raise ConfigError(
            f"--max-cost cannot be held: the judge {config.judge} has no listed price.",
            hint="Leave --max-cost away if you know what it costs, or choose by the rubric.",
        )
    if price not in (None, FREE) and config.max_cost is None and not config.yes:
        raise ConfigError(
            f"the judge {config.judge} is paid for every answer that it scores, and nothing bounds that.",
            hint="Set a wall with --max-cost USD, or agree with --yes.",
        )
    return ModelScorer(LlmJudge(open_teacher(config.judge, base_url=config.judge_url)), config)


class RubricScorer:
    """Scores by the offline rubric: the mean of its dimensions. The answers' code runs, confined as settings say."""

    name = RubricJudge.name

    def __init__(self, config: CollectConfig) -> None:
        self._config = config

    async def score(
        self, answers: Mapping[str, Entry], spent: Spending, progress: Progress
    ) -> Mapping[str, float | None]:
        """As many at a time as there are cores: an answer's code is given little time.

        Raises:
            IsolationError, DependencyError: Programs cannot be run as asked for.
        """
        judge = await asyncio.to_thread(RubricJudge.confined, self._config.sandbox, progress)
        found: dict[str, float | None] = {}
        with progress.task("Judging", total=len(answers), unit="answers") as bar:

            async def score(answer: tuple[str, Entry]) -> None:
                key, entry = answer
                found[key] = (await judge.score(_case(entry, self._config))).overall
                bar.advance()

            await for_each(answers.items(), score, at_once=min(os.cpu_count() or 1, self._config.concurrency))
        return found

    async def close(self) -> None:
        """Nothing is held."""


class ModelScorer:
    """Scores by what a model says: the mean of its dimensions.

    Args:
        judge: Open; closed together with this.
    """

    def __init__(self, judge: LlmJudge, config: CollectConfig) -> None:
        self._judge = judge
        self._config = config
        self.name = judge.name

    async def score(
        self, answers: Mapping[str, Entry], spent: Spending, progress: Progress
    ) -> Mapping[str, float | None]:
        """Ask about every answer that the ledger has no verdict on.

        Raises:
            TeacherError: `max_cost` left no room for some of them. Verdicts up to there are kept.
            TeacherUnavailableError, ResourceError, asyncio.CancelledError: As `put`; verdicts up to there are kept.
        """
        found: dict[str, float | None] = {}
        price = price_of(self.name)
        with Ledger(DataFolder(self._config.out).judge_ledger) as ledger:
            for some in _chunks(answers):
                questions = {key: self._question(entry) for key, entry in some.items()}
                left = await put(
                    list(questions.values()),
                    self._judge.teacher,
                    ledger,
                    concurrency=self._config.concurrency,
                    budget=Budget(price, self._config.max_cost, spent + ledger.spending()),
                    progress=progress,
                    title="Judging",
                )
                found.update((key, hear(question, ledger).found) for key, question in questions.items())
                if left:
                    missing = len(answers) - sum(score is not None for score in found.values())
                    raise TeacherError(
                        f"{missing} of {len(answers)} answers have no verdict of {self.name} yet: the worst case of "
                        f"one more could pass --max-cost {self._config.max_cost:g}. No data set was written.",
                        hint="The same command with a higher one goes on. Without a judge:  --choose shortest",
                    )
        return found

    async def close(self) -> None:
        """Close the judge."""
        await self._judge.close()

    def _question(self, entry: Entry) -> Question[float | None]:
        case = _case(entry, self._config)

        def read(reply: Reply) -> float | None:
            return self._judge.verdict(case.generation, scores=read_scores(reply)).overall

        return Question(self._judge.request(case.generation, case.names), read)


def _case(entry: Entry, config: CollectConfig) -> Case:
    request, reply = entry.request, entry.reply
    assert reply is not None
    prompt = Prompt(
        id=request.prompt_id,
        family=request.family,
        text="\n\n".join(message.content or "" for message in request.messages),
        system=request.system,
    )
    generation = Generation(
        prompt=prompt,
        contender=_CONTENDER,
        sample=request.sample,
        model=reply.model,
        text=reply.text,
        stop=reply.stop,
        output_tokens=reply.usage.output_tokens,
        seconds=reply.seconds,
        max_tokens=request.max_tokens,
    )
    return Case(generation, (config.teacher,))


def _chunks(answers: Mapping[str, Entry]) -> Iterator[dict[str, Entry]]:
    items = iter(answers.items())
    while some := dict(islice(items, _CHUNK)):
        yield some
