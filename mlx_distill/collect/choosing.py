"""Which of several answers to one prompt become rows: all, the first, the shortest, or the best by a judge.

Chosen is among the answers that nothing else leaves out. How good one is, a `Scorer` says, which is handed in: judges
are another step. What it costs is held by the collection's own wall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mlx_distill.collect.reading import FromLedger, whole
from mlx_distill.config import Choose, CollectConfig
from mlx_distill.errors import TeacherError
from mlx_distill.layout import DataFolder
from mlx_distill.ledger import Entry, Ledger, Spending
from mlx_distill.progress import Progress

NOT_CHOSEN = "not chosen"


class Scorer(Protocol):
    """Says how good answers are."""

    #: What is said to have chosen: "rubric", or the spec of the model that judges.
    name: str

    async def score(
        self, answers: Mapping[str, Entry], spent: Spending, progress: Progress
    ) -> Mapping[str, float | None]:
        """Score answers, each by itself.

        Args:
            answers: By key; each entry has its reply. Read where they are looked at: there may be more than memory
                holds.
            spent: What else counts against the limit on cost.

        Returns:
            By the same keys; higher is better. None where a verdict could not be read: missing, never zero.

        Raises:
            TeacherError: It can answer nothing, or the limit on cost leaves no room for all of them.
        """
        ...

    async def close(self) -> None:
        """Let go of connections and files."""
        ...


@dataclass(frozen=True)
class Candidate:
    """An answer that may become a row.

    Attributes:
        key: Of its request.
        sample: Its number among the answers to the prompt.
        characters: Its length.
        score: None where there is none.
    """

    key: str
    prompt_id: str
    sample: int
    characters: int
    score: float | None = None


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        reasons: Key of each answer that was not → why.
        by: As `Manifest.chosen_by`.
        unscored: Answers that were asked about without a verdict that can be read.
    """

    reasons: Mapping[str, str] = field(default_factory=dict)
    by: str | None = None
    unscored: int = 0


def not_chosen(candidates: Iterable[Candidate], how: Choose) -> dict[str, str]:
    """Why each answer that does not become a row does not, by key: one a prompt is left, or all.

    Of equals the one of the lowest sample number is chosen. One without a score is chosen as the best only where none
    of its prompt's answers has one.
    """
    if how == "all":
        return {}
    place = _PLACES[how]
    groups = _by_prompt(candidates)
    chosen = {min(group, key=place).key for group in groups.values()}
    return {one.key: NOT_CHOSEN for group in groups.values() for one in group if one.key not in chosen}


_PLACES: dict[Choose, Callable[[Candidate], tuple[Any, ...]]] = {
    "first": lambda one: (one.sample,),
    "shortest": lambda one: (one.characters, one.sample),
    "best": lambda one: (one.score is None, -(one.score or 0.0), one.sample),
}


async def choose(
    candidates: Sequence[Candidate], config: CollectConfig, ledger: Ledger, scorer: Scorer | None, progress: Progress
) -> Choice:
    """Choose as the settings say.

    Args:
        candidates: Whose replies the ledger holds.
        scorer: Asked only where there is something to choose; needed only for the best.

    Raises:
        TeacherError: As `Scorer.score`; or it gave no verdict that can be read on any answer.
    """
    if config.choose == "all":
        return Choice()
    if config.choose != "best":
        return Choice(not_chosen(candidates, config.choose), config.choose)
    assert scorer is not None, "see `collect`"
    several = {prompt for prompt, group in _by_prompt(candidates).items() if len(group) > 1}
    asked = [one.key for one in candidates if one.prompt_id in several]
    scores = await scorer.score(FromLedger(ledger, asked, whole), ledger.spending(), progress) if asked else {}
    unscored = sum(score is None for score in scores.values())
    if asked and unscored == len(asked):
        raise TeacherError(
            f"{scorer.name} gave no verdict that can be read on any of {unscored} answers.",
            hint="The same command asks again, but for refusals. Or choose without a judge:  --choose shortest",
        )
    known = [replace(one, score=scores.get(one.key)) for one in candidates]
    return Choice(not_chosen(known, config.choose), scorer.name, unscored)


def spent(ledger: Ledger) -> Spending:
    """What a collection has spent, its judge included."""
    return ledger.spending() + judge_spent(ledger)


def judge_spent(ledger: Ledger) -> Spending:
    """What the judge of a collection has spent, now and before."""
    path = DataFolder(ledger.path.parent).judge_ledger
    if not path.exists():
        return Spending(0.0, 0.0, 0.0, 0)
    with Ledger(path) as judged:
        return judged.spending()


def _by_prompt(candidates: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    groups: dict[str, list[Candidate]] = {}
    for one in candidates:
        groups.setdefault(one.prompt_id, []).append(one)
    return groups
