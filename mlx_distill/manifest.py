"""What a data set says of itself: what was asked and answered, what was left out and why, what it cost."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mlx_distill.records import Record, Usage


class TeacherTerms(Record):
    """What a teacher's provider allows to be done with its answers.

    Attributes:
        requires_acceptance: Training on the answers needs the user's word that it is allowed.
        accepted: The user gave it.
    """

    teacher: str
    licence: str
    summary: str
    url: str | None = None
    requires_acceptance: bool = False
    accepted: bool = False


class DropCount(Record):
    """How many answers a collection left out of training for one reason.

    Attributes:
        prompt_ids: The prompts that they answer, each once.
    """

    reason: str
    count: int = Field(ge=0)
    prompt_ids: tuple[str, ...] = ()


class VerificationSummary(Record):
    """What running the code of a data set's answers showed.

    Attributes:
        without_code: Answers that hold no Python.
        tests: Tests that ran.
        isolation: How the programs were kept apart from the machine; None where none ran.
        failing: Prompts whose answer's code fails.
    """

    passed: int
    failed: int
    without_code: int
    tests: int = 0
    isolation: str | None = None
    failing: tuple[str, ...] = ()


class Manifest(Record):
    """`data/NAME/manifest.json`: what a data set is made of.

    Attributes:
        samples: Answers asked for to each prompt. All that counts answers counts each of them.
        temperature: That they were drawn with; None where that was left to the teacher.
        rows: Rows a split.
        sha256: Of each split's file.
        cost_usd: At the price table's date; 0 for a teacher without a price.
        max_tokens: Token limit that every prompt was asked with at first.
        max_tokens_ceiling: Limit up to which a cut answer was asked again.
        asked_again: Requests that repeated a cut answer with a higher limit; their cost is in `cost_usd` as well.
        batch_answers: Replies that came by way of a batch, at its price.
        refusals: Refusals by the provider's category; "none given" where it gave none.
        unsent: Requests not sent yet, since the budget had no room for them.
        in_batch: Requests under way in a batch.
        cut_sendings: Sendings that the network or the end of a process cut off: each may have been billed.
        cut_usd: The most that these can have cost; not in `cost_usd`.
        held_out: Prompt files that prompts were held against.
        contaminated: Prompts left out → the held-out prompt that they are too close to.
        credentials: Answers left out, by the kind of credential they seem to hold.
        verification: None where the answers' code was not run.
        chosen_by: Of the answers to a prompt: "first", "shortest" or the judge that chose; None where all are rows.
        unscored: Answers that the judge gave no verdict on that can be read.
        judge_usd: The most that the judge has cost; not in `cost_usd`.
        none_left: Prompts that have whole answers, all of which were left out; not those that are contaminated.
    """

    format: Literal[1] = 1
    name: str
    created: str
    teacher: str
    teacher_models: tuple[str, ...] = ()
    terms: TeacherTerms
    prompts: int
    samples: int = Field(default=1, gt=0)
    temperature: float | None = None
    answered: int
    rows: dict[str, int]
    families: dict[str, int]
    sha256: dict[str, str]
    dropped: tuple[DropCount, ...] = ()
    usage: Usage = Usage()
    cost_usd: float = 0.0
    prices_dated: str | None = None
    collection_seconds: float = 0.0
    max_tokens: int | None = None
    max_tokens_ceiling: int | None = None
    asked_again: int = 0
    batch_answers: int = 0
    refusals: dict[str, int] = Field(default_factory=dict)
    unsent: int = 0
    in_batch: int = 0
    cut_sendings: int = 0
    cut_usd: float = 0.0
    held_out: tuple[str, ...] = ()
    contaminated: dict[str, str] = Field(default_factory=dict)
    credentials: dict[str, int] = Field(default_factory=dict)
    verification: VerificationSummary | None = None
    chosen_by: str | None = None
    unscored: int = 0
    judge_usd: float = 0.0
    none_left: tuple[str, ...] = ()

    @property
    def asked(self) -> int:
        """Answers asked for: every sample of every prompt."""
        return self.prompts * self.samples

    @property
    def unit(self) -> str:
        """What `asked` counts, as a word: "prompts", or "requests" where each has several samples."""
        return unit_of(self.samples)


def unit_of(samples: int) -> str:
    """What a collection that asks for so many answers to each prompt counts: "prompts", or "requests" of several."""
    return "prompts" if samples == 1 else "requests"
