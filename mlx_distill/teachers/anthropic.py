"""A teacher behind Anthropic's Messages API, over its own SDK: one request, one answer.

The key comes from `ANTHROPIC_API_KEY` and appears nowhere else; `ANTHROPIC_BASE_URL` moves the endpoint. The SDK
retries what is worth it (408, 409, 429, 5xx, connections) twice and minds `retry-after`; nothing is wrapped
around that. No sampling parameter is sent: the API refuses them. Not done here: batches, tools, thinking budgets,
prompt caching, following rate-limit headers.
"""

from __future__ import annotations

import os
import time
from typing import Any

import anthropic
import httpx2
from anthropic.types import Message as ApiMessage
from anthropic.types import MessageParam

from mlx_distill.errors import TeacherError, TeacherUnavailableError
from mlx_distill.records import Reply, Request, StopReason, TeacherTerms, Usage

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
        self._key = _key_from_environment()
        self._client = anthropic.AsyncAnthropic(api_key=self._key)

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
        parameters: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.max_tokens,
            "messages": _messages(request),
        }
        if request.system is not None:
            parameters["system"] = request.system
        start = time.monotonic()
        try:
            if request.max_tokens > STREAM_ABOVE:
                reply = await self._stream(parameters)
            else:
                reply = self._whole(await self._client.messages.create(**parameters))
        except anthropic.APIStatusError as error:
            raise self._refused(error) from None
        except anthropic.APITimeoutError:
            raise TeacherError(
                f"{self.spec} did not answer in time.", hint=f"Try again, or fewer at once. {_SAME_COMMAND}"
            ) from None
        except anthropic.APIConnectionError as error:
            cause = self._clean(str(error.__cause__ or error))
            raise TeacherError(
                f"{self.spec} could not be reached: {cause or 'the connection was closed'}.",
                hint=f"Check the network. {_SAME_COMMAND}",
            ) from None
        except httpx2.HTTPError as error:
            raise TeacherError(
                f"{self.spec} broke off in the middle of an answer: {self._clean(str(error))}.", hint=_SAME_COMMAND
            ) from None
        except (anthropic.AnthropicError, ValueError) as error:
            raise TeacherError(
                f"{self.spec} sent something that is no answer: {self._clean(str(error))}.",
                hint="Check ANTHROPIC_BASE_URL, if it is set.",
            ) from None
        return reply.model_copy(update={"seconds": time.monotonic() - start})

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _whole(self, message: object) -> Reply:
        # The SDK does not check what it receives: a page of text, say from a proxy, comes back as a str.
        if not isinstance(message, ApiMessage) or not isinstance(getattr(message, "content", None), list):
            raise ValueError("expected a message")
        text = "".join(block.text for block in message.content if block.type == "text")
        return self._reply(text, message.stop_reason, _usage(message), getattr(message, "model", None))

    async def _stream(self, parameters: dict[str, Any]) -> Reply:
        text: list[str] = []
        stop_reason: str | None = None
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
                    stop_reason = event.delta.stop_reason
                    # Counts of a delta are totals so far; those left out keep the value they had.
                    usage = usage.model_copy(update={"output_tokens": event.usage.output_tokens})
        if stop_reason is None:
            raise TeacherError(
                f"{self.spec} ended its stream before it said why it stopped; that is not an answer.",
                hint=_SAME_COMMAND,
            )
        return self._reply("".join(text), stop_reason, usage, model)

    def _reply(self, text: str, stop_reason: str | None, usage: Usage, model: object) -> Reply:
        return Reply(
            # JSON may hold half of a surrogate pair, which no file of ours can; a replacement sign stands for it.
            text=text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
            stop=_STOPS.get(stop_reason or "", "other"),
            stop_reason=stop_reason,
            usage=usage,
            model=model if isinstance(model, str) else self._model,
        )

    def _refused(self, error: anthropic.APIStatusError) -> TeacherError:
        said = self._clean(error.api_message or error.message)
        code = error.error_code or ""
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
        if _out_of_money(error, said, code):
            return TeacherUnavailableError(
                f"{self.spec}: a spend limit is reached: {said}.", hint=f"Raise the limit. {_SAME_COMMAND}"
            )
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

    def _clean(self, text: str) -> str:
        """One line of somebody else's text, without the key, should it be repeated there."""
        line = " ".join(text.replace(self._key, "[key]").split())
        return line[:300].rstrip(".")


def _key_from_environment() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise TeacherUnavailableError(
            f"no key for Anthropic: {KEY_VARIABLE} is not set.",
            hint=f"export {KEY_VARIABLE}=…   or take a teacher that needs none:  recorded:data/starter",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        # Told here, because the HTTP library's complaint would repeat the key.
        raise TeacherUnavailableError(
            f"{KEY_VARIABLE} holds a character that no key has.", hint="Look for a space or a line break in it."
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


def _out_of_money(error: anthropic.APIStatusError, said: str, code: str) -> bool:
    if isinstance(error, anthropic.PaymentRequiredError) or error.type == "billing_error":
        return True
    if isinstance(error, anthropic.BadRequestError):
        return "credit balance" in said.lower()
    # A limit on the rate says when to come back. A limit on spending cannot.
    waits = "retry-after" in error.response.headers
    return isinstance(error, anthropic.RateLimitError) and (code.endswith("spend_limit_reached") or not waits)
