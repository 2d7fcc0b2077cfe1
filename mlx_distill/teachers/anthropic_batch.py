"""Anthropic's Message Batches API: half the price, an answer within a day.

`create` is sent once: the SDK would send it again after a broken connection, and both batches would be billed. The
body is streamed from a file, and results are read line by line: nothing here grows with the batch. A `results_url`
on another host than the API's is refused before anything is sent there, and no redirect is followed.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

import anthropic
import httpx2
from anthropic.types import Message as ApiMessage
from anthropic.types.messages import MessageBatch
from pydantic_core import from_json

from mlx_distill.errors import TeacherError, TeacherUnavailableError
from mlx_distill.records import Request
from mlx_distill.teachers.batches import OUTCOMES, BatchFateUnknownError, BatchResult, BatchStatus, Outcome

if TYPE_CHECKING:
    from mlx_distill.teachers.anthropic import AnthropicTeacher

_PATH = "/v1/messages/batches"

#: Bytes read from a file at a time.
_CHUNK = 1 << 16

#: Statuses below 500 that leave open whether a batch was accepted.
_OPEN = (408, 409)

_READ_AGAIN = "What was read is kept; the same command reads the results again. They are kept for 29 days."


class AnthropicBatches:
    """The batches of a Claude model.

    Args:
        teacher: The same model online; turns messages and errors into ours.
        client: Its client.
    """

    most_requests = 100_000
    most_bytes = 256_000_000
    head, comma, tail = b'{"requests":[', b",", b"]}"

    def __init__(self, teacher: AnthropicTeacher, client: anthropic.AsyncAnthropic) -> None:
        self._teacher = teacher
        self._client = client
        # Asked for a response as it is, the SDK checks its status, and tries again, only where no middleware is.
        self._plain = client.with_options(middleware=[])

    def entry(self, request: Request) -> bytes:
        """A request as a part of the body; its custom id is `Request.key`, 64 hexadecimal digits."""
        entry = {"custom_id": request.key, "params": self._teacher.parameters(request)}
        return json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode()

    async def newest(self) -> str | None:
        """The id of the latest batch of the workspace."""
        with self._read_as_meant():
            page = await self._client.messages.batches.list(limit=1)
            return page.data[0].id if page.data else None

    async def create(self, body: BinaryIO, size: int) -> BatchStatus:
        """Send a batch off, once.

        Raises:
            BatchFateUnknownError: The connection broke, or the provider failed, after it may have been accepted.
            TeacherError: It was refused, or nothing was sent.
        """
        try:
            with self._teacher.translated():
                try:
                    batch = await self._client.post(
                        _PATH,
                        cast_to=MessageBatch,
                        content=_read(body),
                        options={
                            "max_retries": 0,
                            "headers": {"content-type": "application/json", "content-length": str(size)},
                        },
                    )
                    return _status(batch)
                except anthropic.APIStatusError as error:
                    if error.status_code >= 500 or error.status_code in _OPEN:
                        raise _UnknownFateError(f"HTTP status {error.status_code}") from None
                    raise
                except anthropic.APIConnectionError as error:
                    if self._teacher.never_sent(error):
                        raise
                    raise _UnknownFateError("the connection broke") from None
                except (ValueError, AttributeError):
                    raise _UnknownFateError("the answer is no batch") from None
        except _UnknownFateError as error:
            raise BatchFateUnknownError(
                f"{self._teacher.spec}: whether a batch was accepted is not known: {error}."
            ) from None

    async def since(self, newest: str | None, not_before: datetime) -> AsyncGenerator[BatchStatus, None]:
        """Batches of the workspace created after another, latest first."""
        with self._read_as_meant():
            async for batch in self._client.messages.batches.list(limit=100):
                if batch.id == newest or batch.created_at < not_before:
                    return
                yield _status(batch)

    async def status(self, batch_id: str) -> BatchStatus:
        """How a batch stands."""
        try:
            with self._read_as_meant():
                return _status(await self._client.messages.batches.retrieve(batch_id))
        except TeacherUnavailableError as error:
            # The teacher takes "not found" for a model.
            raise TeacherUnavailableError(f"batch {batch_id}: {error.message}", hint=error.hint) from None

    async def results(self, status: BatchStatus) -> AsyncGenerator[BatchResult, None]:
        """The results of a batch, line by line.

        Raises:
            TeacherError: They lie on another host, or the list broke off or is not a list of results.
        """
        url = self._own(status)
        number = 0
        try:
            with self._read_as_meant():
                response = cast(
                    httpx2.Response,
                    await self._plain.get(
                        url, cast_to=httpx2.Response, stream=True, options={"headers": {"accept": "application/binary"}}
                    ),
                )
                try:
                    async for line in _lines(response):
                        number += 1
                        yield self._result(line)
                finally:
                    await response.aclose()
        except TeacherUnavailableError:
            raise
        except TeacherError as error:
            raise TeacherError(
                f"the results of batch {status.id} broke off after {number:,} of {status.requests:,}: {error.message}",
                hint=_READ_AGAIN,
            ) from None

    @contextmanager
    def _read_as_meant(self) -> Iterator[None]:
        """Translate errors, also of what reads like no answer of this API: a page of text of a proxy, for instance."""
        with self._teacher.translated():
            try:
                yield
            except (AttributeError, KeyError, TypeError) as error:
                raise ValueError(f"expected batches or results ({error})") from None

    def _own(self, status: BatchStatus) -> str:
        if status.results_url is None:
            raise TeacherError(f"batch {status.id} has ended, and says not where its results are.", hint=_READ_AGAIN)
        url, own = urlsplit(status.results_url), urlsplit(str(self._client.base_url))
        if (url.scheme, url.hostname, _port(url)) != (own.scheme, own.hostname, _port(own)):
            raise TeacherUnavailableError(
                f"batch {status.id}: its results are said to lie on {url.hostname}, not on {own.hostname}; the key is "
                "not sent there.",
                hint="Check ANTHROPIC_BASE_URL.",
            )
        return status.results_url

    def _result(self, line: bytes) -> BatchResult:
        row = from_json(line)
        key, result = row["custom_id"], row["result"]
        outcome = result["type"]
        if not isinstance(key, str) or outcome not in OUTCOMES:
            raise ValueError(f"expected a result, found one of type {str(outcome)[:40]}")
        if outcome == "succeeded":
            reply = self._teacher.whole(ApiMessage.construct(**result["message"]))
            return BatchResult(key, outcome, reply, None)
        error = outcome
        if outcome == "errored":
            inner = result.get("error", {})
            inner = inner.get("error", inner)
            error = f"errored: {inner.get('type', 'unknown')}: {inner.get('message', '')}"
        return BatchResult(key, outcome, None, self._teacher.clean(error))


class _UnknownFateError(Exception):
    """Carries the reason to where the error is made."""


async def _read(body: BinaryIO) -> AsyncIterator[bytes]:
    body.seek(0)
    while chunk := body.read(_CHUNK):
        yield chunk


async def _lines(response: httpx2.Response) -> AsyncIterator[bytes]:
    # Not the library's own lines: these end at every character that Unicode calls a line break, also inside a text.
    rest = b""
    # And as they arrive, not in chunks of a size: a last chunk not filled would be lost where the list breaks off.
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
    if rest.strip():
        yield rest


def _status(batch: Any) -> BatchStatus:
    if not isinstance(batch, MessageBatch):
        raise ValueError("expected a batch")
    counts: dict[Outcome, int] = {outcome: int(getattr(batch.request_counts, outcome)) for outcome in OUTCOMES}
    return BatchStatus(
        id=batch.id,
        ended=batch.processing_status == "ended",
        requests=sum(counts.values()) + int(batch.request_counts.processing),
        counts=counts,
        created_at=batch.created_at,
        results_url=batch.results_url,
    )


def _port(url: Any) -> int | None:
    return url.port or {"https": 443, "http": 80}.get(url.scheme)
