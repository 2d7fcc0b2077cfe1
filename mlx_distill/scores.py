"""What a comparison knows of its answers beside a judge's scores: test results, losses, and duels between two of them.

Each is a row of a file beside `generations.jsonl` and is tied by hashes to what it speaks of, so that a result is never
shown with another answer.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mlx_distill.records import CONTENDER_PATTERN, Contender, Record

#: What came of an answer. "failed": a test saw something else. "error": the code ended or raised before all were run.
Ending = Literal[
    "passed", "failed", "error", "no_code", "not_parsed", "timeout", "memory", "output", "processes", "crashed"
]


class Outcome(Record):
    """What came of one answer.

    Attributes:
        outcome: "passed" is the only good one; "timeout" to "processes" name the limit that was passed.
        detail: What happened, in one line without control characters. May show a test: not for training.
        parses: Whether the code parses; None where there is none, or it was stopped before that was known.
        tests: Hidden tests of the task; of an open task those that the answer brought.
        tests_passed: Those that passed.
        seconds: Wall time of the code.
        isolation: How it was kept apart, such as "process" or "sandbox (Landlock V6 and seccomp)"; None where none ran.
    """

    format: Literal[1] = 1
    task_id: str
    outcome: Ending
    detail: str
    parses: bool | None = None
    tests: int = 0
    tests_passed: int = 0
    seconds: float = 0.0
    isolation: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every test passed."""
        return self.outcome == "passed"


class ScoredAnswer(Record):
    """A row of `outcomes.jsonl`: what came of running one answer's code.

    Attributes:
        task_sha256: Hash of all that decides how an answer to the task is scored.
        family: What the task is about; intervals are over families.
        objective: Whether hidden tests decided; only such answers count for pass@k.
        outcome: Its `task_id` is the id of the prompt.
    """

    format: Literal[1] = 1
    contender: Contender = Field(pattern=CONTENDER_PATTERN)
    sample: int = Field(default=0, ge=0)
    answer_sha256: str
    task_sha256: str
    family: str
    difficulty: str
    objective: bool
    outcome: Outcome


class HeldOutLoss(Record):
    """A row of `heldout.jsonl`: how a local contender likes one held-out answer of the teacher.

    Attributes:
        row_sha256: Of the row's tokens.
        model: What read it.
        nll: Negative log-likelihood of the answer's tokens, their sum in nats.
        tokens: That carry loss.
        divergence: KL(teacher‖model) in nats, summed over these tokens, of the teacher's `top_k` likeliest words and
            all others as one; None where it was not measured, or is no number.
        teacher: Whose distribution that is, MODEL@REVISION.
        top_k: Words of it that were named.
    """

    format: Literal[1] = 1
    row_sha256: str
    contender: Contender = Field(pattern=CONTENDER_PATTERN)
    model: str
    nll: float
    tokens: int = Field(gt=0)
    divergence: float | None = None
    teacher: str | None = None
    top_k: int | None = Field(default=None, gt=0)


class Duel(Record):
    """A row of `duels.jsonl`: which of two answers to one prompt a judge prefers, seen in one order.

    A judge sees each pair in both orders; what it says in only one of them is a tie.

    Attributes:
        first: Whose answer it saw first.
        first_sha256: Hash of that answer.
        winner: None where the verdict could not be read: missing, never a tie.
        problem: Why it could not be read.
    """

    format: Literal[1] = 1
    prompt_id: str
    judge: str
    first: Contender = Field(pattern=CONTENDER_PATTERN)
    second: Contender = Field(pattern=CONTENDER_PATTERN)
    first_sha256: str
    second_sha256: str
    winner: Literal["first", "second", "tie"] | None = None
    rationale: str = ""
    problem: str | None = None
