"""What a message of the Messages API is: which requests are refused, and what an answer looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.servers.faults import Fault
from tests.servers.refusals import RefusedError, invalid

KEY = "sk-test-0123456789"
MODEL = "claude-sonnet-4-6"
CONTEXT_CHARACTERS = 200_000

#: The version from which on sampling parameters are refused.
NO_SAMPLING_FROM = "2026-10-21"

_REQUIRED = {"model", "messages", "max_tokens"}
_SAMPLING = {"temperature", "top_p", "top_k"}
_KNOWN = _REQUIRED | _SAMPLING | {"system", "stream", "stop_sequences", "metadata"}


def check_message(body: dict[str, Any], headers: dict[str, str], *, counting: bool = False) -> None:
    """Refuse what the real API refuses in the parameters of a message."""
    required = _REQUIRED - {"max_tokens"} if counting else _REQUIRED
    if missing := sorted(required - body.keys()):
        raise invalid(f"{missing[0]}: Field required")
    if extra := sorted(body.keys() - _KNOWN):
        raise invalid(f"{extra[0]}: Extra inputs are not permitted")
    if (sampling := sorted(_SAMPLING & body.keys())) and headers["anthropic-version"] >= NO_SAMPLING_FROM:
        raise invalid(f"{sampling[0]}: not supported in this version")
    if not counting and (not isinstance(body["max_tokens"], int) or body["max_tokens"] < 1):
        raise invalid("max_tokens: must be at least 1")
    _check_messages(body["messages"])
    if body["model"] != MODEL:
        raise RefusedError(404, "not_found_error", f"model: {body['model']}")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages or messages[0].get("role") != "user":
        raise invalid("messages: first message must use the user role")
    for message in messages:
        if message.get("role") not in ("user", "assistant") or not message.get("content", "").strip():
            raise invalid("messages: text content blocks must be non-empty")
    if (length := sum(len(message["content"]) for message in messages)) > CONTEXT_CHARACTERS:
        raise invalid(f"prompt is too long: {length} tokens > {CONTEXT_CHARACTERS} maximum")


def message_for(answer: Callable[[str], str], body: dict[str, Any], fault: Fault | None) -> dict[str, Any]:
    """The answer to a request, cut where it is longer than the request allows, in words."""
    prompt = body["messages"][-1]["content"]
    text = answer(prompt) if fault is None or fault.text is None else fault.text
    stop, details = "end_turn", None
    if fault is not None and fault.kind == "half surrogate":
        text = "half \ud83d of a pair"
    if fault is not None and fault.kind == "stop":
        stop = fault.stop_reason
        details = {"type": "refusal", "category": fault.category} if fault.category else None
    elif len(words := text.split()) > body["max_tokens"]:
        text, stop = " ".join(words[: body["max_tokens"]]), "max_tokens"
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": f"{body['model']}-20260101",
        "content": [{"type": "text", "text": text}] if text else [],
        "stop_reason": stop,
        "stop_sequence": None,
        "stop_details": details,
        "usage": {"input_tokens": tokens_of(prompt), "output_tokens": tokens_of(text)},
    }


def tokens_of(text: str) -> int:
    return len(text.split())
