"""What a teacher is that answers whole batches: many requests handed over at once, answered within a day."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO, Literal, Protocol, get_args, runtime_checkable

from mlx_distill.errors import TeacherError
from mlx_distill.records import Reply, Request

#: How a request of a batch ended. Only "succeeded" is billed; a refusal is one.
Outcome = Literal["succeeded", "errored", "canceled", "expired"]

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class BatchFateUnknownError(TeacherError):
    """A batch was sent off, and whether it was accepted is not known."""


@dataclass(frozen=True)
class BatchStatus:
    """A batch as its provider knows it.

    Attributes:
        ended: All its requests ended; the results are ready.
        requests: How many it has.
        counts: How many ended in which way; all zero until it has ended.
        results_url: Where the results are, as the provider says.
    """

    id: str
    ended: bool
    requests: int
    counts: Mapping[Outcome, int]
    created_at: datetime
    results_url: str | None


@dataclass(frozen=True)
class BatchResult:
    """What became of one request of a batch.

    Attributes:
        key: `Request.key`, which the batch knows the request by.
        reply: What was answered, where it succeeded.
        error: Why it was not, in one line.
    """

    key: str
    outcome: Outcome
    reply: Reply | None
    error: str | None


class Batches(Protocol):
    """The batches of one teacher."""

    #: What one batch can hold; the size is that of the encoded body.
    most_requests: int
    most_bytes: int

    #: What stands before, between and after the entries of a body.
    head: bytes
    comma: bytes
    tail: bytes

    def entry(self, request: Request) -> bytes:
        """A request, encoded, as a part of a batch's body."""
        ...

    async def newest(self) -> str | None:
        """The id of the latest batch there is; None where there is none."""
        ...

    async def create(self, body: BinaryIO, size: int) -> BatchStatus:
        """Send a batch off, once: it is never sent again by itself.

        Args:
            body: Read from its start.
            size: Of the body in bytes.

        Raises:
            BatchFateUnknownError: It may have been accepted.
            TeacherError: It was not accepted.
        """
        ...

    def since(self, newest: str | None, not_before: datetime) -> AsyncGenerator[BatchStatus, None]:
        """Batches created after the one that was the newest, latest first; none created before `not_before`."""
        ...

    async def status(self, batch_id: str) -> BatchStatus:
        """How a batch stands.

        Raises:
            TeacherError: It cannot be told, or there is no such batch.
        """
        ...

    def results(self, status: BatchStatus) -> AsyncGenerator[BatchResult, None]:
        """The results of a batch that has ended, in any order, few held at a time.

        Raises:
            TeacherError: The list broke off, or lies on another host than the provider's.
        """
        ...


@runtime_checkable
class Batching(Protocol):
    """A teacher that has batches."""

    @property
    def batches(self) -> Batches:
        """Its batches."""
        ...
