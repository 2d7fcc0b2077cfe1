"""Commit to a ledger from many tasks at once, with one trip to the disk for all that wait.

A commit that reaches the disk takes milliseconds, and hundreds of answers arrive a second. So changes are made in a
thread of their own, and those that came in while it was busy are committed together. Each caller goes on only when
its own change is on the disk: nothing counts as stored before that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from mlx_distill.errors import MlxDistillError
from mlx_distill.ledger import Ledger

T = TypeVar("T")

_Change = Callable[[], Any]
_Waiting = tuple[_Change, asyncio.Future[Any]]


class Committer:
    """Makes changes to a ledger while it is open as a context; nothing else may use the ledger meanwhile."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: list[_Waiting] = []
        self._flush: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also what a cancelled caller no longer waits for is committed.
        while self._flush is not None:
            await asyncio.shield(self._flush)
        self._thread.shutdown()

    async def do(self, change: Callable[[], T]) -> T:
        """Make a change, and return when it is committed. It is committed also if the caller is cancelled.

        Raises:
            ResourceError: The ledger could not be written; none of the changes committed with it were made.
            Exception: What the change raises; the others are not touched by it.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((change, future))
        if self._flush is None:
            self._flush = asyncio.create_task(self._flush_all())
        return await future

    async def _flush_all(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                try:
                    outcomes = await loop.run_in_executor(self._thread, self._commit, [change for change, _ in group])
                except MlxDistillError as error:
                    outcomes = [error] * len(group)
                for (_, future), outcome in zip(group, outcomes, strict=True):
                    if future.done():  # Its caller was cancelled.
                        continue
                    if isinstance(outcome, Exception):
                        future.set_exception(outcome)
                    else:
                        future.set_result(outcome)
        finally:
            self._flush = None

    def _commit(self, changes: Sequence[_Change]) -> list[Any]:
        outcomes: list[Any] = []
        with self._ledger.transaction():
            for change in changes:
                try:
                    outcomes.append(change())
                except ValueError as error:
                    # A change that does not fit the state of its request has changed nothing.
                    if isinstance(error, MlxDistillError):
                        raise
                    outcomes.append(error)
        return outcomes
