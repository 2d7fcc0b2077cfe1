"""A teacher behind any server that speaks OpenAI's chat completions, over the openai SDK: one request, one answer.

The server is OpenAI's own, or the one at `base_url` or in `OPENAI_BASE_URL`: vLLM, LM Studio, Ollama,
`mlx_lm.server`, or somebody's service. The key comes from `OPENAI_API_KEY` and appears nowhere else; it goes to
the server that was named, and a server without keys is sent a word that is none.

The SDK retries what is worth it (408, 409, 429, 5xx, connections) twice and minds `retry-after`; nothing is wrapped
around that. Which host answers is part of what was asked, its port is not: another provider's answers, which come
with other terms, are never taken for those that are there. Answers are not streamed, since OpenAI streams some
models to verified organisations only. A temperature is sent where a request has one. Not done here: other sampling
parameters, tools, and taking a reasoning model's thoughts out of an answer where the server leaves them in it.
"""

from __future__ import annotations

import ipaddress
import os
import time
from typing import Any
from urllib.parse import urlsplit

from mlx_distill.errors import ConfigError, DependencyError, TeacherError, TeacherUnavailableError
from mlx_distill.manifest import TeacherTerms
from mlx_distill.records import Reply, Request, StopReason, Usage

try:
    import httpx2
    import openai
    from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
except ImportError as missing:
    raise DependencyError("openai", extra="openai") from missing

KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
OPENAI_URL = "https://api.openai.com/v1"

#: Seconds to wait for an answer. A server of one's own may first have to load its model, and queues what it is
#: asked; a provider that says nothing for ten minutes, the SDK's own limit, has lost the request.
_PATIENCE = 3600.0
_PROVIDER_PATIENCE = 600.0
_CONNECT_SECONDS = 5.0

#: Sent where there is no key. The SDK wants one, and servers that check none take any.
_NO_KEY = "no-key"

_STOPS: dict[str, StopReason] = {"stop": "end", "length": "length", "content_filter": "refusal"}

_SAME_COMMAND = "Nothing that was answered is lost; the same command goes on from there."
_START_A_SERVER = "Start it, for example:  mlx_lm.server --model FOLDER --port 8080   or  ollama serve"
_MODELS_NAMED = 8


class OpenAITeacher:
    """A model behind a chat completions server.

    Args:
        model: As the server names it, such as "gpt-5-mini" or "qwen2.5:7b".
        base_url: Of the server, with its `/v1`. None takes `OPENAI_BASE_URL`, and without it OpenAI's own.

    Attributes:
        revision: The host that answers; "loopback" for this machine.

    Raises:
        ConfigError: The URL is none, or has a key in it.
        TeacherUnavailableError: OpenAI's own server is to be asked, and there is no key.
    """

    def __init__(self, model: str, *, base_url: str | None = None) -> None:
        self.spec = f"openai:{model}"
        self._model = model
        self._url, self._host = _checked_url(base_url or os.environ.get(URL_VARIABLE, "").strip() or OPENAI_URL)
        self._is_openai = self._host == "openai.com" or self._host.endswith(".openai.com")
        self._is_local = _is_loopback(self._host)
        self.revision = "loopback" if self._is_local else self._host
        self._key = _key_from_environment(required=self._is_openai)
        self._client = openai.AsyncOpenAI(
            api_key=self._key or _NO_KEY,
            base_url=self._url,
            timeout=httpx2.Timeout(_PROVIDER_PATIENCE if self._is_openai else _PATIENCE, connect=_CONNECT_SECONDS),
            # A proxy for the outside world cannot reach this machine.
            http_client=openai.DefaultAsyncHttpx2Client(trust_env=False) if self._is_local else None,
        )
        # OpenAI's reasoning models refuse the old name; most other servers know it alone.
        self._limit_name = "max_completion_tokens" if self._is_openai else "max_tokens"

    def terms(self) -> TeacherTerms:
        """OpenAI's own where it is OpenAI; else they depend on the model, which only the user knows.

        A server on this machine runs a model that the user has, under its licence: nothing to accept. Any other
        is somebody's service until the user says that training on its answers is allowed.
        """
        if self._is_openai:
            return TeacherTerms(
                teacher=self.spec,
                licence="OpenAI Services Agreement",
                summary="OpenAI's terms forbid using output to develop models that compete with OpenAI.",
                url="https://openai.com/policies/services-agreement/",
                requires_acceptance=True,
            )
        if self._is_local:
            return TeacherTerms(
                teacher=self.spec,
                licence="unknown",
                summary=(
                    f"{self._model}, served on this machine: its own licence decides what its answers may be used "
                    "for, and the server does not tell it. Record it with the data set."
                ),
            )
        return TeacherTerms(
            teacher=self.spec,
            licence="unknown",
            summary=(
                f"{self._model}, served by {self._host}: the terms of that service and the licence of the model decide "
                "whether a model may be trained on its answers, and the server tells neither. Record them with the "
                "data set."
            ),
            requires_acceptance=True,
        )

    async def ask(self, request: Request) -> Reply:
        """Ask one request.

        Raises:
            TeacherUnavailableError: The key, the model or the account is refused, or no server is running on this
                machine: no request will be answered.
            TeacherError: This request was not answered, after the SDK's own retries.
        """
        start = time.monotonic()
        try:
            completion = await self._create(request)
        except openai.APIStatusError as error:
            raise await self._refused(error) from None
        except openai.APITimeoutError:
            raise TeacherError(
                f"{self.spec} did not answer in time.", hint=f"Lower --concurrency. {_SAME_COMMAND}"
            ) from None
        except openai.APIConnectionError as error:
            raise self._unreached(error) from None
        except httpx2.HTTPError as error:
            raise TeacherError(
                f"{self.spec} broke off in the middle of an answer: {self._clean(str(error))}.", hint=_SAME_COMMAND
            ) from None
        except (openai.OpenAIError, ValueError) as error:
            raise self._no_answer(self._clean(str(error))) from None
        return self._reply(completion, time.monotonic() - start)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _create(self, request: Request) -> object:
        messages = _messages(request)
        name = self._limit_name
        settings = {} if request.temperature is None else {"temperature": request.temperature}
        try:
            return await self._send(messages, {name: request.max_tokens, **settings})
        except openai.BadRequestError as error:
            if name != "max_tokens" or error.param != "max_tokens" or error.code != "unsupported_parameter":
                raise
        # OpenAI's models behind another host, such as Azure's. A refused request costs nothing.
        self._limit_name = "max_completion_tokens"
        return await self._send(messages, {self._limit_name: request.max_tokens, **settings})

    async def _send(self, messages: list[ChatCompletionMessageParam], settings: dict[str, Any]) -> object:
        return await self._client.chat.completions.create(model=self._model, messages=messages, **settings)

    def _reply(self, completion: object, seconds: float) -> Reply:
        # The SDK does not check what it receives: a page of text comes back as a str, a missing field as None.
        choices = getattr(completion, "choices", None)
        if not isinstance(completion, ChatCompletion) or not isinstance(choices, list) or not choices:
            raise self._no_answer("there is no choice in it")
        choice = choices[0]
        message, reason = getattr(choice, "message", None), getattr(choice, "finish_reason", None)
        content, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
        if message is None or not isinstance(content or "", str):
            raise self._no_answer("there is no text in it")
        if not isinstance(reason, str) or not reason:
            raise self._no_answer("it does not say why it stopped")
        stop = _STOPS.get(reason, "other")
        if isinstance(refusal, str) and refusal:
            content, stop = content or refusal, "refusal"
        return Reply(
            # JSON may hold half of a surrogate pair, which no file of ours can; a replacement sign stands for it.
            text=(content or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
            stop=stop,
            stop_reason=reason,
            usage=_usage(completion),
            model=completion.model if isinstance(getattr(completion, "model", None), str) else self._model,
            seconds=seconds,
        )

    def _no_answer(self, why: str) -> TeacherError:
        return TeacherError(
            f"{self.spec} at {self._url} sent something that is no answer: {why}.",
            hint="Check the base URL; it mostly ends in /v1.",
        )

    def _unreached(self, error: openai.APIConnectionError) -> TeacherError:
        cause = error.__cause__
        if self._is_local and isinstance(cause, httpx2.ConnectError):
            # The same for every request, and waiting does not help.
            return TeacherUnavailableError(f"{self.spec}: no server answers at {self._url}.", hint=_START_A_SERVER)
        return TeacherError(
            f"{self.spec} at {self._url} could not be reached: {self._clean(str(cause or error)) or 'no answer'}.",
            hint=f"Check the network and the base URL. {_SAME_COMMAND}",
        )

    async def _refused(self, error: openai.APIStatusError) -> TeacherError:
        said = self._clean(_said(error))
        if isinstance(error, openai.AuthenticationError):
            refused = f"the key in {KEY_VARIABLE} was refused" if self._key else f"it wants a key: {said}"
            return TeacherUnavailableError(
                f"{self.spec} at {self._url}: {refused}.", hint=f"export {KEY_VARIABLE}=…   {_SAME_COMMAND}"
            )
        if isinstance(error, openai.PermissionDeniedError):
            return TeacherUnavailableError(
                f"{self.spec}: this key may not use it: {said}.", hint="Ask for access, or choose another model."
            )
        if isinstance(error, openai.NotFoundError):
            return TeacherUnavailableError(
                f"{self.spec}: there is no such model at {self._url}: {said}.", hint=await self._models_there()
            )
        if error.status_code == 402 or error.code == "insufficient_quota":
            return TeacherUnavailableError(
                f"{self.spec}: a spend limit is reached: {said}.", hint=f"Raise the limit. {_SAME_COMMAND}"
            )
        if isinstance(error, openai.RateLimitError):
            return TeacherError(
                f"{self.spec}: too many requests, also after waiting: {said}.",
                hint=f"Lower --concurrency. {_SAME_COMMAND}",
            )
        if error.status_code < 500:
            too_long = error.status_code == 413 or error.code == "context_length_exceeded" or "context" in said.lower()
            return TeacherError(
                f"{self.spec} refused the request: {said}.",
                hint="Shorten the prompt, or lower --max-tokens." if too_long else None,
            )
        return TeacherError(
            f"{self.spec} failed with HTTP status {error.status_code}, also when asked again: {said}.",
            hint=_SAME_COMMAND,
        )

    async def _models_there(self) -> str:
        """A hint that names what the server has, if it tells."""
        try:
            page = await self._client.with_options(max_retries=0, timeout=_CONNECT_SECONDS).models.list()
            names = [model.id for model in page.data]
        except (openai.OpenAIError, httpx2.HTTPError, ValueError, AttributeError, TypeError):
            return "Check the model's name and the base URL, which mostly ends in /v1."
        more = " …" if len(names) > _MODELS_NAMED else ""
        return f"It has: {', '.join(self._clean(str(name)) for name in names[:_MODELS_NAMED])}{more}"

    def _clean(self, text: str) -> str:
        """One line of somebody else's text, without the key, should it be repeated there."""
        line = " ".join((text.replace(self._key, "[key]") if self._key else text).split())
        return line[:300].rstrip(".")


def _checked_url(url: str) -> tuple[str, str]:
    """The URL without a slash at its end, and its host in lower case."""
    hint = "For example --base-url http://127.0.0.1:8080/v1"
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - reading it checks it
    except ValueError:
        raise ConfigError("the base URL is not a URL.", hint=hint) from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        # Not repeated: what is in it may be a key.
        raise ConfigError(
            f"the base URL of {parts.hostname or 'the server'} holds more than scheme, host, port and path.",
            hint=f"A key belongs into {KEY_VARIABLE}.",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"the base URL {url!r} does not begin with http:// or https:// and a host.", hint=hint)
    return url.rstrip("/"), parts.hostname.lower()


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _key_from_environment(*, required: bool) -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key and required:
        raise TeacherUnavailableError(
            f"no key for OpenAI: {KEY_VARIABLE} is not set.",
            hint=f"export {KEY_VARIABLE}=…   or name another server:  --base-url http://127.0.0.1:8080/v1",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        # Told here, because the HTTP library's complaint would repeat the key.
        raise TeacherUnavailableError(
            f"{KEY_VARIABLE} holds a character that no key has.", hint="Look for a space or a line break in it."
        )
    return key


def _messages(request: Request) -> list[ChatCompletionMessageParam]:
    messages: list[ChatCompletionMessageParam] = []
    if request.system is not None:
        messages.append({"role": "system", "content": request.system})
    for message in request.messages:
        if message.content is not None and message.role == "user":
            messages.append({"role": "user", "content": message.content})
        elif message.content is not None and message.role == "assistant":
            messages.append({"role": "assistant", "content": message.content})
        elif message.content is not None and message.role == "system":
            messages.append({"role": "system", "content": message.content})
        else:
            raise TeacherError(f"prompt {request.prompt_id}: a turn of role {message.role} cannot be sent.")
    return messages


def _usage(completion: ChatCompletion) -> Usage:
    """As the server counts; nothing where it does not. A reasoning model's thoughts are part of what it wrote."""

    def tokens(name: str) -> int:
        count = getattr(getattr(completion, "usage", None), name, None)
        return count if isinstance(count, int) and count > 0 else 0

    return Usage(input_tokens=tokens("prompt_tokens"), output_tokens=tokens("completion_tokens"))


def _said(error: openai.APIStatusError) -> str:
    """What the server said, without the SDK's frame: OpenAI's layout, or `{"error": "…"}` of smaller servers."""
    body = error.body
    if isinstance(body, dict):
        said = body.get("message") or body.get("detail") or body.get("error")
        if isinstance(said, str) and said:
            return said
    return body if isinstance(body, str) and body else error.message
