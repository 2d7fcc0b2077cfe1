"""Puts questions to a judging model through a ledger: what was answered once is not asked, or paid for, again.

A question whose reply cannot be read is asked again, with a line that says which attempt it is and what was wrong: so
it is another request, and the ledger knows both. Attempts are counted on from one command to the next. A refusal
stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mlx_distill.asking import ask_all
from mlx_distill.budget import Budget
from mlx_distill.judges.reading import UnreadableError
from mlx_distill.ledger import Ledger
from mlx_distill.progress import Progress
from mlx_distill.records import Message, Reply, Request
from mlx_distill.teachers.base import Teacher

F = TypeVar("F")

#: Further attempts at one question within one call, where replies cannot be read.
FURTHER_ATTEMPTS = 2

#: Highest token limit of an attempt that follows a cut reply.
_CEILING = 16_384


@dataclass(frozen=True)
class Question(Generic[F]):
    """Something to ask, and how to read the reply.

    Attributes:
        request: The first attempt.
        read: Raises an `UnreadableError` where the reply is not what was asked for.
    """

    request: Request
    read: Callable[[Reply], F]


@dataclass(frozen=True)
class Heard(Generic[F]):
    """What came of a question.

    Attributes:
        found: What was read; None where nothing could be.
        problem: Why nothing could be read; None where something was, and where there is no reply yet.
        next: The request to send now; None where the question is settled.
        attempt: Number of that request, counted from 1.
    """

    found: F | None = None
    problem: str | None = None
    next: Request | None = None
    attempt: int = 1


def again(first: Request, after: Request, reply: Reply, attempt: int, reason: str) -> Request:
    """The request of a further attempt.

    Args:
        first: Of the same question.
        after: That the unreadable reply was to.
        attempt: Its number.
        reason: Why the reply could not be read, in words of ours: those of the reply may come from an answer that is
            judged, and must not stand outside its quotation.
    """
    line = f"Attempt {attempt}: your last reply could not be read ({reason}). Reply with JSON alone."
    *before, last = first.messages
    limit = min(2 * after.max_tokens, max(_CEILING, first.max_tokens)) if reply.stop == "length" else after.max_tokens
    message = Message(role=last.role, content=f"{last.content}\n\n{line}")
    return first.model_copy(update={"messages": (*before, message), "max_tokens": limit})


def hear(question: Question[F], ledger: Ledger) -> Heard[F]:
    """What the ledger knows of a question. Sends nothing."""
    request, attempt, problem = question.request, 1, None
    while (entry := ledger.entry(request.key)) is not None and entry.reply is not None:
        try:
            return Heard(found=question.read(entry.reply))
        except UnreadableError as error:
            problem = str(error)
            if error.final:
                return Heard(problem=problem)
            attempt += 1
            request = again(question.request, request, entry.reply, attempt, error.reason)
    if problem is None and entry is not None and entry.state == "failed":
        problem = f"no reply: {entry.error}"
    return Heard(problem=problem, next=request, attempt=attempt)


async def put(
    questions: Sequence[Question[F]],
    teacher: Teacher,
    ledger: Ledger,
    *,
    concurrency: int,
    budget: Budget,
    progress: Progress,
    title: str,
) -> int:
    """Ask what is not settled yet; afterwards `hear` knows what came of each.

    Returns:
        How many requests the budget left no room for.

    Raises:
        TeacherUnavailableError, ResourceError, asyncio.CancelledError: As `ask_all`; the ledger has what came.
    """
    places: dict[str, _Place[F]] = {}
    requests = []
    for question in questions:
        heard = hear(question, ledger)
        if heard.next is not None:
            places[heard.next.key] = _Place(question, heard.attempt, FURTHER_ATTEMPTS)
            requests.append(heard.next)

    def follow_up(request: Request, reply: Reply) -> Request | None:
        place = places[request.key]
        try:
            place.question.read(reply)
        except UnreadableError as error:
            if error.final or not place.further:
                return None
            attempt = place.attempt + 1
            then = again(place.question.request, request, reply, attempt, error.reason)
            places[then.key] = _Place(place.question, attempt, place.further - 1)
            return then
        return None

    asked = await ask_all(
        requests,
        teacher,
        ledger,
        concurrency=concurrency,
        progress=progress,
        title=title,
        budget=budget,
        follow_up=follow_up,
    )
    return asked.left


@dataclass(frozen=True)
class _Place(Generic[F]):
    """Where a request stands in the attempts at its question, and how many more there may be now."""

    question: Question[F]
    attempt: int
    further: int
