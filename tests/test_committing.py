"""Commits in groups: nobody goes on before its own change is on the disk, and one that fails spoils no other."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from mlx_distill.committing import Committer
from mlx_distill.errors import ResourceError
from mlx_distill.ledger import Ledger
from mlx_distill.records import Message, Reply, Request


def requests_for(count: int) -> list[Request]:
    return [
        Request(prompt_id="p", family="f", teacher="t", messages=(Message(role="user", content=str(n)),), max_tokens=9)
        for n in range(count)
    ]


async def test_what_returned_is_committed_and_many_go_together(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    requests = requests_for(60)
    commits = 0

    def count(statement: str) -> None:
        nonlocal commits
        commits += statement == "COMMIT"

    with Ledger(path) as ledger:
        ledger.plan(requests)
        ledger.db.set_trace_callback(count)

        async def mark(request: Request) -> None:
            await committer.do(lambda: ledger.mark_sent(request.key))
            # Seen by another connection: it is committed.
            other = sqlite3.connect(path)
            row = other.execute("SELECT state FROM requests WHERE key = ?", (request.key,)).fetchone()
            other.close()
            assert row == ("sent",)

        async with Committer(ledger) as committer:
            await asyncio.gather(*map(mark, requests))
        assert ledger.counts()["sent"] == 60
    assert 1 <= commits < 30


async def test_a_change_that_does_not_fit_fails_alone(tmp_path: Path) -> None:
    requests = requests_for(10)
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.plan(requests[:9])
        async with Committer(ledger) as committer:
            outcomes = await asyncio.gather(
                *(committer.do(lambda key=request.key: ledger.mark_sent(key)) for request in requests),  # type: ignore[misc]
                return_exceptions=True,
            )
        assert [type(outcome) for outcome in outcomes] == [type(None)] * 9 + [ValueError]
        assert ledger.counts()["sent"] == 9


async def test_a_cancelled_callers_change_is_committed(tmp_path: Path) -> None:
    (request,) = requests_for(1)
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.plan([request])
        async with Committer(ledger) as committer:
            task = asyncio.create_task(committer.do(lambda: ledger.mark_sent(request.key)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert ledger.state(request.key) == "sent"


async def test_a_full_disk_is_told_to_all_who_waited(tmp_path: Path) -> None:
    requests = requests_for(3)
    reply = Reply(text="x" * 100_000, stop="end", model="m")
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.plan(requests)
        for request in requests:
            ledger.mark_sent(request.key)
        pages = ledger.db.execute("PRAGMA page_count").fetchone()[0]
        ledger.db.execute(f"PRAGMA max_page_count = {pages}")
        async with Committer(ledger) as committer:
            outcomes = await asyncio.gather(
                *(committer.do(lambda key=request.key: ledger.record_reply(key, reply)) for request in requests),  # type: ignore[misc]
                return_exceptions=True,
            )
        assert {type(outcome) for outcome in outcomes} == {ResourceError}
        assert ledger.counts()["sent"] == 3
