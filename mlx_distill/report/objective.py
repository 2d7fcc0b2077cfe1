"""What hidden tests made of the answers: pass@k by contender, and what distillation changed.

pass@k is of Chen et al., "Evaluating Large Language Models Trained on Code" (2021). Intervals are bootstraps over
families of tasks, since tasks of a family are alike. A contender's missing results are missing: they count as
neither passed nor failed, and a difference is over the tasks that both have results for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mlx_distill.evaluation.passing import mean_pass_at_k, pass_at_k
from mlx_distill.records import Generation
from mlx_distill.report.evidence import Evidence
from mlx_distill.report.intervals import Estimate, estimate
from mlx_distill.scores import ScoredAnswer

#: As few tasks as these do not make the headline.
FEWEST_TASKS = 20


@dataclass(frozen=True)
class Task:
    """A task with hidden tests.

    Attributes:
        counts: By contender, its answers and how many of them pass.
    """

    id: str
    family: str
    difficulty: str
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def rate(self, contender: str) -> float:
        """The share of a contender's answers that pass."""
        n, c = self.counts[contender]
        return c / n


@dataclass(frozen=True)
class Tested:
    """What the tests made of one contender.

    Attributes:
        answers: All samples of all tasks.
        pass_1: The chance that an answer passes.
        pass_k: The chance that one of k does; None where k is 1, or it has fewer answers.
        parses: Share of answers whose code parses; one without code does not, one stopped before that is left out.
        finishes: Share of answers that ended by themselves.
        tokens: Of an answer, the mean.
        endings: How many answers ended each way.
    """

    tasks: int
    answers: int
    pass_1: Estimate
    pass_k: Estimate | None
    parses: float | None
    finishes: float
    tokens: float
    endings: dict[str, int]


@dataclass(frozen=True)
class Group:
    """Tasks of one family or difficulty.

    Attributes:
        pass_1: By contender.
        change: distilled − base, paired.
    """

    tasks: int
    pass_1: dict[str, Estimate]
    change: Estimate | None


@dataclass(frozen=True)
class Objective:
    """All that the tests say.

    Attributes:
        k: The answers that pass@k allows; 1 where each task was answered once.
        changes: By contender, its pass@1 − the base's, paired by task.
        gained: Tasks of which the distilled student's answers pass more often than the base's.
        lost: Less often.
    """

    tasks: tuple[Task, ...]
    k: int
    contenders: dict[str, Tested]
    changes: dict[str, Estimate]
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    families: dict[str, Group]
    difficulties: dict[str, Group]

    @property
    def change(self) -> Estimate | None:
        """What distillation changed."""
        return self.changes.get("distilled")


def objective_of(evidence: Evidence) -> Objective | None:
    """The results of the tests; None where no answer was tested by hidden tests."""
    rows = [row for row in evidence.outcomes if row.objective]
    if not rows:
        return None
    tasks = _tasks(rows)
    contenders = [c for c in evidence.contenders if any(c in task.counts for task in tasks)]
    fewest = {c: min(task.counts[c][0] for task in tasks if c in task.counts) for c in contenders}
    k = max(fewest.values())
    answers = {(g.prompt.id, g.contender, g.sample): g for g in evidence.samples}
    changes = {c: paired_change(tasks, c, "base") for c in contenders if c != "base"}
    both = [task for task in tasks if {"base", "distilled"} <= task.counts.keys()]
    return Objective(
        tasks=tasks,
        k=k,
        contenders={c: _tested(c, tasks, rows, answers, k if k > 1 and fewest[c] >= k else None) for c in contenders},
        changes={c: change for c, change in changes.items() if change},
        gained=tuple(task.id for task in both if task.rate("distilled") > task.rate("base")),
        lost=tuple(task.id for task in both if task.rate("distilled") < task.rate("base")),
        families=_groups({task.id: task.family for task in tasks}, tasks, contenders),
        difficulties=_groups({task.id: task.difficulty for task in tasks}, tasks, contenders),
    )


def paired_change(tasks: Sequence[Task], contender: str, other: str) -> Estimate | None:
    """pass@1 of one contender − that of another, over the tasks that both have results for."""
    both = [task for task in tasks if {contender, other} <= task.counts.keys()]
    changes = [task.rate(contender) - task.rate(other) for task in both]
    return estimate(changes, [task.family for task in both], kind="share difference")


def _tasks(rows: Sequence[ScoredAnswer]) -> tuple[Task, ...]:
    tasks: dict[str, Task] = {}
    for row in rows:
        task = tasks.setdefault(row.outcome.task_id, Task(row.outcome.task_id, row.family, row.difficulty))
        n, c = task.counts.get(row.contender, (0, 0))
        task.counts[row.contender] = (n + 1, c + row.outcome.passed)
    return tuple(tasks.values())


def _tested(
    contender: str,
    tasks: Sequence[Task],
    rows: Sequence[ScoredAnswer],
    answers: Mapping[tuple[str, str, int], Generation],
    k: int | None,
) -> Tested:
    own = [task for task in tasks if contender in task.counts]
    counts = [task.counts[contender] for task in own]
    families = [task.family for task in own]
    pass_1 = estimate([pass_at_k(n, c, 1) for n, c in counts], families, kind="share")
    assert pass_1 is not None
    pass_k = None
    if k is not None and (spread := estimate([pass_at_k(n, c, k) for n, c in counts], families, kind="share")):
        pass_k = Estimate(mean_pass_at_k(counts, k), spread.n, spread.groups, spread.interval)
    scored = [row for row in rows if row.contender == contender]
    texts = [answers[row.outcome.task_id, contender, row.sample] for row in scored]
    known = [row for row in scored if row.outcome.parses is not None or row.outcome.outcome == "no_code"]
    return Tested(
        tasks=len(own),
        answers=len(scored),
        pass_1=pass_1,
        pass_k=pass_k,
        parses=sum(row.outcome.parses is True for row in known) / len(known) if known else None,
        finishes=sum(answer.finished for answer in texts) / len(texts),
        tokens=sum(answer.output_tokens for answer in texts) / len(texts),
        endings=dict(Counter(row.outcome.outcome for row in scored)),
    )


def _groups(names: Mapping[str, str], tasks: Sequence[Task], contenders: Sequence[str]) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for name in sorted(set(names.values())):
        members = [task for task in tasks if names[task.id] == name]
        means = {}
        for contender in contenders:
            own = [task for task in members if contender in task.counts]
            if mean := estimate([task.rate(contender) for task in own], [task.family for task in own], kind="share"):
                means[contender] = mean
        groups[name] = Group(len(members), means, paired_change(members, "distilled", "base"))
    return groups
