"""A teacher behind Anthropic's Messages API, over its own SDK: one request, one answer.

The key comes from `ANTHROPIC_API_KEY` or the keyring, and appears nowhere else; `ANTHROPIC_BASE_URL` moves the
endpoint. The SDK retries what is worth it (408, 409, 429, 5xx, connections) twice and minds `retry-after`; nothing is
wrapped around that. A middleware of the SDK sees each sending, follows the rate-limit headers (see `pace.py`) and
counts the sendings that were cut off, and may have been billed. Redirects are not followed: the key would go along.
No sampling parameter is sent: the API refuses them, and draws its answers by itself. Batches are in
`anthropic_batch.py`. Not done here: tools, thinking budgets, prompt caching.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import anthropic
import httpx2
from anthropic.types import Message as ApiMessage
from anthropic.types import MessageParam

from mlx_distill.errors import MlxDistillError, TeacherError, TeacherUnavailableError
from mlx_distill.manifest import TeacherTerms
from mlx_distill.records import Reply, Request, StopReason, Usage
from mlx_distill.teachers.keys import find_key
from mlx_distill.teachers.pace import Pace
from mlx_distill.teachers.sending import current

if TYPE_CHECKING:
    from mlx_distill.teachers.anthropic_batch import AnthropicBatches

KEY_VARIABLE = "ANTHROPIC_API_KEY"

#: Answers allowed to be longer than this are streamed. The SDK refuses to wait in silence for more than 21,333
#: tokens, and for some models for more than 8,192; one limit for all keeps the two ways apart by settings alone.
STREAM_ABOVE = 8_192

_STOPS: dict[str, StopReason] = {
    "end_turn": "end",
    "stop_sequence": "end",
    "max_tokens": "length",
    "refusal": "refusal",
    "model_context_window_exceeded": "context",
}

#: Failures of a connection before anything was sent over it.
_NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)

_SAME_COMMAND = "Nothing that was answered is lost; the same command goes on from there."


class AnthropicTeacher:
    """A Claude model.

    Args:
        model: As the API names it, such as "claude-sonnet-4-6".

    Raises:
        TeacherUnavailableError: There is no key.
    """

    def __init__(self, model: str) -> None:
        self.spec = f"anthropic:{model}"
        self._model = model
        self._key = _key()
        self._pace = Pace()
        self._client = anthropic.AsyncAnthropic(
            api_key=self._key,
            http_client=anthropic.DefaultAsyncHttpxClient(follow_redirects=False),
            middleware=[self._watch],
        )

    def terms(self) -> TeacherTerms:
        """Training on the answers needs the provider's authorisation, which the user must have."""
        return TeacherTerms(
            teacher=self.spec,
            licence="Anthropic Commercial Terms of Service and Usage Policy",
            summary=(
                "Anthropic's usage policy forbids training a model on outputs of its models without prior "
                "authorisation."
            ),
            url="https://www.anthropic.com/legal/aup",
            requires_acceptance=True,
        )

    async def ask(self, request: Request) -> Reply:
        """Ask one request.

        Raises:
            TeacherUnavailableError: The key, the model or the account is refused: no request will be answered.
            TeacherError: This request was not answered, after the SDK's own retries; or its answer broke off.
        """
        parameters = self.parameters(request)
        start = time.monotonic()
        with self.translated():
            if request.max_tokens > STREAM_ABOVE:
                reply = await self._stream(parameters)
            else:
                reply = self.whole(await self._client.messages.create(**parameters))
        self._pace.used(reply.usage.input_tokens, reply.usage.output_tokens)
        return reply.model_copy(update={"seconds": time.monotonic() - start})

    async def enter(self, request: Request) -> None:
        """Wait until the provider's rate limits have room for one more request."""
        await self._pace.enter()

    def leave(self) -> None:
        """A request that entered is no longer under way."""
        self._pace.leave()

    @cached_property
    def batches(self) -> AnthropicBatches:
        """The same model by way of the Message Batches API, at half the price."""
        from mlx_distill.teachers.anthropic_batch import AnthropicBatches

        return AnthropicBatches(self, self._client)

    def parameters(self, request: Request) -> dict[str, Any]:
        """What the API is sent for a request.

        Raises:
            TeacherError: A turn of the conversation, or a temperature, cannot be sent.
        """
        if request.temperature is not None:
            raise TeacherError(f"{self.spec} takes no temperature.")
        parameters: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.max_tokens,
            "messages": _messages(request),
        }
        if request.system is not None:
            parameters["system"] = request.system
        return parameters

    def never_sent(self, error: anthropic.APIConnectionError) -> bool:
        """Whether a connection failed before anything was sent over it."""
        return isinstance(error.__cause__, _NEVER_SENT)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn what the SDK and its HTTP library raise into errors of ours."""
        try:
            yield
        except anthropic.APIStatusError as error:
            if error.status_code < 300:  # An error event inside a stream that had begun well.
                current().cut += 1
            raise self._refused(error) from None
        except anthropic.APITimeoutError:
            raise TeacherError(
                f"{self.spec} did not answer in time.", hint=f"Try again, or fewer at once. {_SAME_COMMAND}"
            ) from None
        except anthropic.APIConnectionError as error:
            cause = self.clean(str(error.__cause__ or error))
            raise TeacherError(
                f"{self.spec} could not be reached: {cause or 'the connection was closed'}.",
                hint=f"Check the network. {_SAME_COMMAND}",
            ) from None
        except httpx2.HTTPError as error:
            current().cut += 1
            raise TeacherError(
                f"{self.spec} broke off in the middle of an answer: {self.clean(str(error))}.", hint=_SAME_COMMAND
            ) from None
        except (anthropic.AnthropicError, ValueError) as error:
            if isinstance(error, MlxDistillError):
                raise
            current().cut += 1
            raise TeacherError(
                f"{self.spec} sent something that is no answer: {self.clean(str(error))}.",
                hint="Check ANTHROPIC_BASE_URL, if it is set.",
            ) from None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _watch(self, request: Any, call_next: Any) -> Any:
        """See one sending, of those that the SDK makes for a call, and what came of it."""
        sending = current()
        if sending.cut > sending.noted:
            if not await sending.note_cut():
                raise TeacherError(
                    f"{self.spec}: the connection broke, and the budget has no room for sending it again.",
                    hint="Raise --max-cost.",
                )
            sending.noted = sending.cut
        try:
            response = await call_next(request)
        except anthropic.APIConnectionError as error:  # A timeout, too.
            if not self.never_sent(error):
                sending.cut += 1
            raise
        self._pace.observe(response.status_code, response.headers)
        return response

    def whole(self, message: object) -> Reply:
        """The reply that a message of the API is.

        Raises:
            ValueError: It is not a message.
        """
        # The SDK does not check what it receives: a page of text, say from a proxy, comes back as a str.
        if not isinstance(message, ApiMessage) or not isinstance(getattr(message, "content", None), list):
            raise ValueError("expected a message")
        text = "".join(block.text for block in message.content if block.type == "text")
        if message.stop_reason is None:
            raise ValueError("expected a reason why it stopped")
        return self._reply(
            text, message.stop_reason, _usage(message), getattr(message, "model", None), _category(message)
        )

    async def _stream(self, parameters: dict[str, Any]) -> Reply:
        text: list[str] = []
        stop_reason: str | None = None
        category: str | None = None
        usage = Usage()
        model = self._model
        async with await self._client.messages.create(**parameters, stream=True) as events:
            async for event in events:
                if event.type == "message_start":
                    usage, model = _usage(event.message), event.message.model
                elif event.type == "content_block_start" and event.content_block.type == "text":
                    text.append(event.content_block.text)
                elif event.type == "content_block_delta" and event.delta.type == "text_delta":
                    text.append(event.delta.text)
                elif event.type == "message_delta":
                    stop_reason, category = event.delta.stop_reason, _category(event.delta)
                    # Counts of a delta are totals so far; those left out keep the value they had.
                    usage = usage.model_copy(update={"output_tokens": event.usage.output_tokens})
        if stop_reason is None:
            current().cut += 1
            raise TeacherError(
                f"{self.spec} ended its stream before it said why it stopped; that is not an answer.",
                hint=_SAME_COMMAND,
            )
        return self._reply("".join(text), stop_reason, usage, model, category)

    def _reply(self, text: str, stop_reason: str, usage: Usage, model: object, category: str | None) -> Reply:
        return Reply(
            # JSON may hold half of a surrogate pair, which no file of ours can; a replacement sign stands for it.
            text=text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
            stop=_STOPS.get(stop_reason, "other"),
            stop_reason=stop_reason,
            category=category,
            usage=usage,
            model=model if isinstance(model, str) else self._model,
        )

    def _refused(self, error: anthropic.APIStatusError) -> TeacherError:
        said = self.clean(error.api_message or error.message)
        if (hopeless := self._hopeless(error, said)) is not None:
            return hopeless
        if isinstance(error, anthropic.RateLimitError):
            return TeacherError(
                f"{self.spec}: too many requests, also after waiting: {said}.",
                hint=f"Lower --concurrency. {_SAME_COMMAND}",
            )
        if isinstance(error, (anthropic.BadRequestError, anthropic.ContentTooLargeError)):
            too_long = "too long" in said or isinstance(error, anthropic.ContentTooLargeError)
            return TeacherError(
                f"{self.spec} refused the request: {said}.", hint="Shorten the prompt." if too_long else None
            )
        if error.status_code < 400:  # An error event inside a stream that had begun well.
            return TeacherError(f"{self.spec} broke off in the middle of an answer: {said}.", hint=_SAME_COMMAND)
        return TeacherError(
            f"{self.spec} failed with HTTP status {error.status_code}, also when asked again: {said}.",
            hint=_SAME_COMMAND,
        )

    def _hopeless(self, error: anthropic.APIStatusError, said: str) -> TeacherUnavailableError | None:
        """What no further request would fare better with."""
        if 300 <= error.status_code < 400:
            return TeacherUnavailableError(
                f"{self.spec}: the address it is asked at sends elsewhere; the key is not sent there.",
                hint="Check ANTHROPIC_BASE_URL.",
            )
        if isinstance(error, anthropic.AuthenticationError):
            return TeacherUnavailableError(
                f"{self.spec}: the key in {KEY_VARIABLE} was refused.", hint=f"Set a valid key. {_SAME_COMMAND}"
            )
        if isinstance(error, anthropic.PermissionDeniedError):
            return TeacherUnavailableError(
                f"{self.spec}: this key may not use it: {said}.", hint="Ask for access, or choose another model."
            )
        if isinstance(error, anthropic.NotFoundError):
            return TeacherUnavailableError(
                f"{self.spec}: there is no such model: {said}.", hint="Check the model's name, and ANTHROPIC_BASE_URL."
            )
        if _out_of_money(error, said):
            return TeacherUnavailableError(
                f"{self.spec}: a spend limit is reached: {said}.", hint=f"Raise the limit. {_SAME_COMMAND}"
            )
        return None

    def clean(self, text: str) -> str:
        """One line of somebody else's text, without the key, should it be repeated there."""
        line = " ".join(text.replace(self._key, "[key]").split())
        return line[:300].rstrip(".")


def _key() -> str:
    key = find_key(KEY_VARIABLE)
    if key is None:
        raise TeacherUnavailableError(
            f"no key for Anthropic: {KEY_VARIABLE} is not set.",
            hint=f"export {KEY_VARIABLE}=…   or take a teacher that needs none:  recorded:data/starter",
        )
    return key


def _messages(request: Request) -> list[MessageParam]:
    messages: list[MessageParam] = []
    for message in request.messages:
        if message.content is not None and message.role == "user":
            messages.append({"role": "user", "content": message.content})
        elif message.content is not None and message.role == "assistant":
            messages.append({"role": "assistant", "content": message.content})
        else:
            raise TeacherError(f"prompt {request.prompt_id}: a turn of role {message.role} cannot be sent.")
    return messages


def _usage(message: ApiMessage) -> Usage:
    usage = getattr(message, "usage", None)

    def tokens(name: str) -> int:
        count = getattr(usage, name, None)
        return count if isinstance(count, int) else 0

    cached = tokens("cache_creation_input_tokens") + tokens("cache_read_input_tokens")
    return Usage(input_tokens=tokens("input_tokens") + cached, output_tokens=tokens("output_tokens"))


def _category(message: object) -> str | None:
    found = getattr(getattr(message, "stop_details", None), "category", None)
    return found if isinstance(found, str) else None


def _out_of_money(error: anthropic.APIStatusError, said: str) -> bool:
    if isinstance(error, anthropic.PaymentRequiredError) or error.type == "billing_error":
        return True
    if isinstance(error, anthropic.BadRequestError):
        return "credit balance" in said.lower()
    code = error.error_code or ""
    # A limit on the rate says when to come back. A limit on spending cannot.
    waits = "retry-after" in error.response.headers
    return isinstance(error, anthropic.RateLimitError) and (code.endswith("spend_limit_reached") or not waits)
