"""Ask a teacher many requests at once, and keep each reply the moment it arrives.

Reads and writes: a ledger. What it holds a reply to is not asked again. Nothing is retried here: a teacher does
its own retrying, and what failed is asked again by the next run.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mlx_distill.budget import Budget
from mlx_distill.committing import Committer
from mlx_distill.errors import TeacherError, TeacherUnavailableError
from mlx_distill.ledger import Ledger
from mlx_distill.pricing import FREE, PRICES_DATED, price_of
from mlx_distill.progress import SILENT, Bar, Progress
from mlx_distill.records import Reply, Request
from mlx_distill.teachers.base import Teacher
from mlx_distill.teachers.sending import Paced, Sending, watched

T = TypeVar("T")

#: What to ask in place of a request whose reply was this; None where the reply stands.
FollowUp = Callable[[Request, Reply], Request | None]

#: How long an interrupted run waits for the answers under way: they are paid for whether it waits or not.
DRAIN_SECONDS = 60.0

#: Failures told one by one; the ledger has the rest.
_FAILURES_TOLD = 3

#: Workers beside those that send: they commit, before and after, while the others are on the wire.
_COMMITTING_SHARE = 4


@dataclass(frozen=True)
class Asked:
    """How asking ended.

    Attributes:
        left: Requests that were not sent, since their worst case did not fit into the budget.
    """

    left: int = 0


async def ask_all(
    requests: Iterable[Request],
    teacher: Teacher,
    ledger: Ledger,
    *,
    concurrency: int,
    progress: Progress = SILENT,
    title: str = "Asking the teacher",
    budget: Budget | None = None,
    follow_up: FollowUp = lambda _request, _reply: None,
) -> Asked:
    """Send every request that has no reply yet.

    A request that fails is noted as failed and does not stop the others. When the teacher can answer nothing at
    all any more, when the ledger cannot be written, and when this is cancelled, no further request is sent, those
    under way are waited for (at most `DRAIN_SECONDS`) and their replies are kept; then the error is raised.

    Args:
        concurrency: Requests under way at once; fewer where the provider's rate limits say so.
        budget: Holds back what could pass its limit; without it nothing is held back.
        follow_up: What is asked next, where a reply does not stand as it is.

    Raises:
        TeacherUnavailableError: No key, a refused key, a spend limit and the like.
        ResourceError: A reply could not be stored.
    """
    by_key = {request.key: request for request in requests}
    ledger.plan(by_key.values())
    todo = ledger.unsent(by_key)
    if not todo:
        return Asked()
    with progress.task(title, total=len(todo), unit="answers") as bar:
        async with Committer(ledger) as committer:
            queue = deque(by_key[key] for key in todo)
            del by_key
            crew = _Crew(teacher, ledger, committer, queue, budget or Budget(price_of(teacher.spec)), progress, bar)
            crew.follow_up = follow_up
            await crew.run(concurrency)
    return Asked(left=crew.left)


class _Crew:
    """Workers that take requests from one queue."""

    follow_up: FollowUp

    def __init__(
        self,
        teacher: Teacher,
        ledger: Ledger,
        committer: Committer,
        queue: deque[Request],
        budget: Budget,
        progress: Progress,
        bar: Bar,
    ) -> None:
        self._teacher = teacher
        self._pace = teacher if isinstance(teacher, Paced) else None
        self._ledger = ledger
        self._committer = committer
        self._queue = queue
        self._budget = budget
        self._progress = progress
        self._bar = bar
        self._cost = 0.0
        self._failures = 0
        self._under_way = 0
        self._preparing: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.left = 0

    async def run(self, concurrency: int) -> None:
        self._slots = asyncio.Semaphore(concurrency)
        size = min(concurrency + max(1, concurrency // _COMMITTING_SHARE), len(self._queue))
        workers: list[asyncio.Task[None]] = [asyncio.create_task(self._work()) for _ in range(size)]
        try:
            await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            # Also after a cancellation: what is under way is waited for, and its replies are kept.
            self._stopping = True
            await self._drain(workers)
        ends = [worker.exception() for worker in workers if not worker.cancelled()]
        if first := next(filter(None, ends), None):
            raise first

    async def _drain(self, workers: Sequence[asyncio.Task[None]]) -> None:
        for worker in self._preparing:
            worker.cancel()  # It has sent nothing.
        pending = [worker for worker in workers if not worker.done()]
        try:
            if self._under_way:
                self._progress.say(
                    f"Stopping. Waiting for {self._under_way} answers under way; interrupt again not to wait."
                )
            if pending:
                await asyncio.wait(pending, timeout=DRAIN_SECONDS)
        finally:
            for worker in pending:
                worker.cancel()
            # All of them, so that no worker's error is left for the event loop to complain about.
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self) -> None:
        while self._queue and not self._stopping:
            request: Request | None = self._queue.popleft()
            while request is not None and not self._stopping:
                request = await self._ask(request)

    async def _ask(self, request: Request) -> Request | None:
        """Ask one request.

        Returns:
            What to ask next in its place, if its reply does not stand.
        """
        worst = self._budget.worst(request)
        if not await self._prepare(request, worst):
            self.left += 1
            return None

        async def note_cut() -> bool:
            if not self._budget.take(worst):
                return False
            await self._committer.do(lambda: self._ledger.record_cut(request.key))
            return True

        sending = Sending(note_cut)
        spent: float | None = None
        try:
            outcome = await self._send(request, sending)
            if isinstance(outcome, Reply) and self._budget.price is not None:
                spent = self._budget.price.cost(outcome.usage)
        finally:
            # What was taken for a further sending stays taken; so does a last one whose fate is not known.
            await self._budget.settle(worst, worst if sending.cut_last and spent is None else spent)
        if isinstance(outcome, Reply):
            return await self._keep(request, outcome, spent, sending)
        error = outcome
        await self._committer.do(lambda: self._ledger.record_failure(request.key, error.message, cut=sending.cut_last))
        if isinstance(error, TeacherUnavailableError):
            raise error
        self._tell(request, error)
        self._bar.advance()
        return None

    async def _prepare(self, request: Request, worst: float | None) -> bool:
        """Wait until a request may be sent, and mark it as sent. False if the budget has no room for it.

        A cancellation in here leaves the request as it was.
        """
        task = asyncio.current_task()
        assert task is not None
        self._preparing.add(task)
        entered = marked = False
        try:
            if not await self._budget.reserve(worst):
                return False
            if self._pace is not None:
                await self._pace.enter(request)
                entered = True
            marked = True
            await self._committer.do(lambda: self._ledger.mark_sent(request.key, worst_usd=worst))
            await self._slots.acquire()
        except asyncio.CancelledError:
            if entered and self._pace is not None:
                self._pace.leave()
            if marked:
                await self._committer.do(lambda: self._ledger.take_back(request.key))
            raise
        finally:
            self._preparing.discard(task)
        return True

    async def _send(self, request: Request, sending: Sending) -> Reply | TeacherError:
        self._under_way += 1
        try:
            with watched(sending):
                return await self._teacher.ask(request)
        except TeacherError as error:
            # At once, before another worker takes its next request.
            self._stop_if_hopeless(error)
            return error
        finally:
            self._under_way -= 1
            self._slots.release()
            if self._pace is not None:
                self._pace.leave()

    def _stop_if_hopeless(self, error: TeacherError) -> None:
        if isinstance(error, TeacherUnavailableError) and not self._stopping:
            self._stopping = True
            for worker in self._preparing:
                worker.cancel()

    async def _keep(self, request: Request, reply: Reply, cost: float | None, sending: Sending) -> Request | None:
        further = self.follow_up(request, reply)

        def store() -> None:
            self._ledger.record_reply(
                request.key, reply, cost_usd=cost, prices_dated=PRICES_DATED if cost else None, cut=sending.cut_last
            )
            if further is not None:
                self._ledger.plan([further])

        await self._committer.do(store)
        self._cost += cost or 0.0
        if further is not None:
            state = await self._committer.do(lambda: self._ledger.unsent([further.key]))
            if state:
                return further
        if self._budget.price in (None, FREE):
            self._bar.advance()
        else:
            self._bar.advance(cost=f"${self._cost:.2f}")
        return None

    def _tell(self, request: Request, error: TeacherError) -> None:
        self._failures += 1
        if self._failures <= _FAILURES_TOLD:
            self._progress.say(f"{request.prompt_id}: {error.message}")
        elif self._failures == _FAILURES_TOLD + 1:
            self._progress.say("Further failures are noted in the ledger.")


def run_interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine so that Ctrl-C and SIGTERM cancel it at an await, never between a reply and its storing.

    Raises:
        KeyboardInterrupt: It was cancelled by a signal.
    """

    async def whole() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda _number, _frame: loop.call_soon_threadsafe(task.cancel))
        return await work

    # asyncio.run does for SIGINT what is done here for SIGTERM.
    previous = signal.getsignal(signal.SIGTERM)
    try:
        return asyncio.run(whole())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, previous)
