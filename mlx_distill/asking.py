"""Ask a teacher many requests at once, and keep each reply the moment it arrives.

Reads and writes: a ledger. What it holds a reply to is not asked again. Nothing is retried here: a teacher does
its own retrying, and what failed is asked again by the next run.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from mlx_distill.errors import TeacherError, TeacherUnavailableError
from mlx_distill.ledger import Ledger
from mlx_distill.pricing import FREE, PRICES_DATED, Price, price_of
from mlx_distill.progress import SILENT, Bar, Progress
from mlx_distill.records import Request
from mlx_distill.teachers.base import Teacher

T = TypeVar("T")

#: How long an interrupted run waits for the answers under way: they are paid for whether it waits or not.
DRAIN_SECONDS = 60.0

#: Failures told one by one; the ledger has the rest.
_FAILURES_TOLD = 3


async def ask_all(
    requests: Sequence[Request],
    teacher: Teacher,
    ledger: Ledger,
    *,
    concurrency: int,
    progress: Progress = SILENT,
    title: str = "Asking the teacher",
) -> None:
    """Send every request that has no reply yet.

    A request that fails is noted as failed and does not stop the others. When the teacher can answer nothing at
    all any more, when the ledger cannot be written, and when this is cancelled, no further request is sent, those
    under way are waited for (at most `DRAIN_SECONDS`) and their replies are kept; then the error is raised.

    Args:
        concurrency: Requests under way at once.

    Raises:
        TeacherUnavailableError: No key, a refused key, a spend limit and the like.
        ResourceError: A reply could not be stored.
    """
    ledger.plan(requests)
    by_key = {request.key: request for request in requests}
    todo = ledger.unsent(by_key)
    if not todo:
        return
    with progress.task(title, total=len(todo), unit="answers") as bar:
        crew = _Crew(teacher, ledger, (by_key[key] for key in todo), progress, bar)
        await crew.run(min(concurrency, len(todo)))


class _Crew:
    """Workers that take requests from one queue."""

    def __init__(
        self, teacher: Teacher, ledger: Ledger, queue: Iterator[Request], progress: Progress, bar: Bar
    ) -> None:
        self._teacher = teacher
        self._ledger = ledger
        self._queue = queue
        self._progress = progress
        self._bar = bar
        self._price: Price | None = price_of(teacher.spec)
        self._cost = 0.0
        self._failures = 0
        self._under_way = 0
        self._stopping = False

    async def run(self, size: int) -> None:
        workers = [asyncio.create_task(self._work()) for _ in range(size)]
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
        pending = [worker for worker in workers if not worker.done()]
        try:
            if pending:
                self._progress.say(
                    f"Stopping. Waiting for {self._under_way} answers under way; interrupt again not to wait."
                )
                await asyncio.wait(pending, timeout=DRAIN_SECONDS)
        finally:
            for worker in pending:
                worker.cancel()
            # All of them, so that no worker's error is left for the event loop to complain about.
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self) -> None:
        for request in self._queue:
            if self._stopping:
                return
            self._under_way += 1
            try:
                await self._ask(request)
            finally:
                self._under_way -= 1

    async def _ask(self, request: Request) -> None:
        self._ledger.mark_sent(request.key)
        try:
            reply = await self._teacher.ask(request)
        except TeacherError as error:
            self._ledger.record_failure(request.key, error.message)
            if isinstance(error, TeacherUnavailableError):
                # At once, before another worker takes its next request.
                self._stopping = True
                raise
            self._tell(request, error)
            self._bar.advance()
            return
        cost = self._price.cost(reply.usage) if self._price else None
        self._ledger.record_reply(request.key, reply, cost_usd=cost, prices_dated=PRICES_DATED if cost else None)
        self._cost += cost or 0.0
        if self._price is None or self._price == FREE:
            self._bar.advance()
        else:
            self._bar.advance(cost=f"${self._cost:.2f}")

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
