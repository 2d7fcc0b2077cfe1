"""Collect by way of a provider's batches.

Reads and writes: the ledger, and a temporary file beside it for the body of a batch that is about to be created.

    intend (on the disk) → create (once) → poll → read the results → reconcile with the provider's counts

Any arrow can be cut, by the network or by `kill -9`. A batch whose creation was cut is an orphan: the provider may
have it. It is looked for in the provider's list, among what was created since it was intended. Where exactly one
batch can be it, it is adopted, and its results say for sure; otherwise the user is told what can be done. Nothing
that may have been accepted is sent again in silence.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import BinaryIO

from mlx_distill.budget import Budget
from mlx_distill.collect.batch_book import BatchBook, OpenBatch
from mlx_distill.errors import ConfigError, TeacherError, TeacherUnavailableError
from mlx_distill.ledger import Ledger
from mlx_distill.progress import Progress
from mlx_distill.records import Request
from mlx_distill.teachers.batches import Batches, BatchFateUnknownError, BatchResult, BatchStatus, Outcome

#: Seconds between two looks at a batch: the first, and the longest; each is half as long again as the one before.
POLL_SECONDS = (0.2, 30.0)

#: Looks that may fail one after another before the run gives up; the batch does not mind.
_FAILED_LOOKS = 5

#: By how much the provider's clock may be behind ours.
_CLOCKS = timedelta(hours=1)

#: Results kept with one commit. They can be read again, so a commit each would gain nothing.
_KEEP_TOGETHER = 500


class BatchCollection:
    """Hands requests over in batches, and keeps what comes back.

    Args:
        teacher: Spec of the teacher whose batches these are.
    """

    def __init__(self, teacher: str, batches: Batches, ledger: Ledger, budget: Budget, progress: Progress) -> None:
        self._teacher = teacher
        self._batches = batches
        self._ledger = ledger
        self._budget = budget
        self._progress = progress
        self._book = BatchBook(ledger)

    @property
    def open(self) -> bool:
        """Whether the provider has a batch, or may have one."""
        return bool(self._book.open(self._teacher))

    async def settle_orphans(self, decision: str | None) -> bool:
        """Find out what became of batches whose creation was cut off.

        Args:
            decision: What the user says is to be done where that cannot be told: "adopt=ID", "resubmit" or "abandon".

        Returns:
            Whether something was abandoned, so that this run is not to send it again.

        Raises:
            TeacherError: It cannot be told, and there is no decision; names the options.
            ConfigError: The decision does not fit.
        """
        abandoned = False
        for batch in self._book.open(self._teacher):
            if batch.state != "intended":
                continue
            likely = await self._candidates(batch)
            if decision and decision.startswith("adopt="):
                self._adopt(batch, await self._batches.status(decision.removeprefix("adopt=")))
            elif len(likely) == 1:
                self._progress.say(f"A batch whose creation was cut off was found: {likely[0].id}.")
                self._adopt(batch, likely[0])
            elif decision in ("resubmit", "abandon"):
                self._book.give_up(batch.number, send_again=decision == "resubmit")
                abandoned = abandoned or decision == "abandon"
            else:
                raise _orphaned(batch, likely)
        return abandoned

    async def submit(self, requests: Iterable[Request]) -> int:
        """Hand requests over, in as few batches as hold them.

        Returns:
            How many were left, since their worst case did not fit into the budget.

        Raises:
            TeacherError: The provider did not accept a batch, or it is not known whether it did. Batches before it
                stand.
        """
        left = 0
        affordable: list[float | None] = []

        def within_budget() -> Iterator[Request]:
            nonlocal left
            for request in requests:
                worst = self._budget.worst(request, batch=True)
                if self._budget.take(worst):
                    affordable.append(worst)
                    yield request
                else:
                    left += 1

        packer = _Packer(self._batches, within_budget())
        while True:
            with tempfile.TemporaryFile(dir=self._ledger.path.parent) as body:
                part = packer.fill(body)
                if part is None:
                    return left
                members = list(zip(part.keys, affordable, strict=False))
                del affordable[: len(members)]
                await self._create(body, part, members)

    async def collect(self, *, wait: bool) -> None:
        """Read the results of every batch that has ended; wait for the others, or leave them.

        Raises:
            TeacherError: Results broke off or do not tally with the provider's counts; what was read is kept.
        """
        open_batches = self._book.open(self._teacher)
        for batch in open_batches:
            assert batch.provider_id is not None
            total = f"{batch.requests:,} requests"
            with self._progress.task(f"Batch {batch.provider_id}", total=batch.requests, unit="answers") as bar:
                status = await self._ended(batch.provider_id, total, wait=wait)
                if status is None:
                    continue
                await self._read(batch, status, bar.advance)

    async def _create(self, body: BinaryIO, part: _Part, members: list[tuple[str, float | None]]) -> None:
        newest = await self._batches.newest()
        number = self._book.intend(self._teacher, members, size=part.size, sha256=part.sha256, newest=newest)
        try:
            status = await self._batches.create(body, part.size)
        except BatchFateUnknownError as error:
            self._progress.say(f"{error.message} Looking for it in the provider's list.")
            await self.settle_orphans(None)
            return
        except TeacherError as error:
            self._book.refused(number, error.message)
            raise
        self._book.submitted(number, status.id)
        self._progress.say(f"Batch {status.id}: {len(members):,} requests, {part.size / 1e6:,.1f} MB.")

    async def _candidates(self, batch: OpenBatch) -> list[BatchStatus]:
        """Batches of the provider that can be the one whose creation was cut off."""
        known = self._book.provider_ids() | set(batch.not_ours)
        found = []
        async with aclosing(self._batches.since(batch.newest, batch.intended_at - _CLOCKS)) as listed:
            async for status in listed:
                if status.id not in known and status.requests == batch.requests:
                    found.append(status)
        # Results name their requests: where a batch has some, they say for sure.
        return [status for status in found if not status.ended or await self._is(batch, status)]

    async def _is(self, batch: OpenBatch, status: BatchStatus) -> bool:
        async with aclosing(self._batches.results(status)) as results:
            async for result in results:
                return not self._book.foreign(batch.number, [result.key])
        return False

    def _adopt(self, batch: OpenBatch, status: BatchStatus) -> None:
        if status.requests != batch.requests:
            raise ConfigError(
                f"batch {status.id} has {status.requests:,} requests, and the one looked for has {batch.requests:,}.",
                hint="Look for another, or give it up with --batch-orphan resubmit.",
            )
        if status.id in self._book.provider_ids():
            raise ConfigError(f"batch {status.id} is known, and is not the one looked for.")
        self._book.submitted(batch.number, status.id, adopted=True)

    async def _ended(self, batch_id: str, total: str, *, wait: bool) -> BatchStatus | None:
        """The status of a batch once it has ended; None if it has not, and is not waited for."""
        seconds, longest = POLL_SECONDS
        failures = 0
        for look in count():
            try:
                status = await self._batches.status(batch_id)
                failures = 0
            except TeacherUnavailableError:
                raise
            except TeacherError as error:
                failures += 1
                if failures == _FAILED_LOOKS or not wait:
                    raise
                self._progress.say(f"{error.message} Looking again.")
            else:
                if status.ended:
                    return status
                if not wait:
                    return None
                if look == 0:
                    self._progress.say(f"{total} are being answered; leave at any time, the same command comes back.")
            await asyncio.sleep(seconds)
            seconds = min(longest, seconds * 1.5)
        raise AssertionError("unreachable")

    async def _read(self, batch: OpenBatch, status: BatchStatus, advance: Callable[[float], None]) -> None:
        kept: list[BatchResult] = []

        def keep() -> None:
            if foreign := self._book.foreign(batch.number, (result.key for result in kept)):
                self._refuse_foreign(batch, status, foreign[0])
            self._book.record(batch.number, kept, self._budget.price)
            advance(len(kept))
            kept.clear()

        try:
            async with aclosing(self._batches.results(status)) as results:
                async for result in results:
                    kept.append(result)
                    if len(kept) == _KEEP_TOGETHER:
                        keep()
        finally:
            # Also of a list that broke off.
            keep()
        counts = self._book.counts(batch.number)
        if counts != {outcome: n for outcome, n in status.counts.items() if n}:
            raise TeacherError(
                f"batch {status.id} has results for {sum(counts.values()):,} of {batch.requests:,} requests, and its "
                f"provider counts {_told(status.counts)}; found: {_told(counts)}.",
                hint="What was read is kept; the same command reads the results again.",
            )
        self._book.read(batch.number)

    def _refuse_foreign(self, batch: OpenBatch, status: BatchStatus, key: str) -> None:
        if not batch.adopted:
            raise TeacherError(f"batch {status.id} has a result for {key}, which was not in it.")
        self._book.disown(batch)
        raise TeacherError(
            f"batch {status.id} was taken for one whose creation was cut off, and is another.",
            hint="The same command looks again.",
        )


@dataclass(frozen=True)
class _Part:
    """What a body was filled with: the keys of its requests, its size in bytes and the hash of its content."""

    keys: list[str]
    size: int
    sha256: str


class _Packer:
    """Fills one body after another with requests, as full as a batch may be."""

    def __init__(self, batches: Batches, requests: Iterator[Request]) -> None:
        self._batches = batches
        self._entries = ((request.key, batches.entry(request)) for request in requests)
        self._next = next(self._entries, None)

    def fill(self, body: BinaryIO) -> _Part | None:
        """Write a body; None where no request is left.

        Raises:
            TeacherError: A request is larger than a batch may be.
        """
        if self._next is None:
            return None
        keys: list[str] = []
        digest = hashlib.sha256()
        size = 0

        def write(content: bytes) -> None:
            nonlocal size
            body.write(content)
            digest.update(content)
            size += len(content)

        first = self._next[0]
        write(self._batches.head)
        while self._next is not None and len(keys) < self._batches.most_requests:
            key, entry = self._next
            comma = self._batches.comma if keys else b""
            if size + len(comma) + len(entry) + len(self._batches.tail) > self._batches.most_bytes:
                break
            write(comma + entry)
            keys.append(key)
            self._next = next(self._entries, None)
        if not keys:
            raise TeacherError(f"request {first} is larger than a batch may be.", hint="Shorten the prompt.")
        write(self._batches.tail)
        body.flush()
        return _Part(keys, size, digest.hexdigest())


def _told(counts: Mapping[Outcome, int]) -> str:
    return ", ".join(f"{n:,} {outcome}" for outcome, n in counts.items() if n) or "none"


def _orphaned(batch: OpenBatch, likely: list[BatchStatus]) -> TeacherError:
    when = batch.intended_at.strftime("%Y-%m-%d %H:%M:%S UTC")
    if likely:
        found = "the provider has several that it can be: " + ", ".join(status.id for status in likely)
    else:
        found = "the provider lists none that it can be, so it was probably never accepted; one may still appear"
    return TeacherError(
        f"the creation of a batch of {batch.requests:,} requests was cut off at {when}: {found}. Nothing was sent "
        "again.",
        hint="Look again with the same command, or add  --batch-orphan adopt=ID  (it is that one),  --batch-orphan "
        "resubmit  (send its requests again; if it was accepted after all, they are billed twice)  or  --batch-orphan "
        "abandon  (give it up; its prompts fail, and a later command asks them again).",
    )
