"""Cases judged several at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]], *, at_once: int) -> None:
    """Work on every item, so many at once. The first error ends all, once what is under way was cancelled.

    Args:
        items: Looked at one by one: there may be more than memory holds.
    """
    queue = iter(items)

    async def take() -> None:
        for item in queue:
            await work(item)

    workers = [asyncio.create_task(take()) for _ in range(at_once)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
