"""The Anthropic teacher against a strict server: what it sends, what it makes of replies and of errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from mlx_distill.errors import TeacherError, TeacherUnavailableError
from mlx_distill.records import Message, Request, StopReason
from mlx_distill.teachers.anthropic import STREAM_ABOVE, AnthropicTeacher
from tests.servers.messages_server import KEY, MODEL, Fault, MessagesServer

QUICK = 0.01  # Seconds; a `retry-after` that lets the SDK try again at once.


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MessagesServer]:
    with MessagesServer() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
async def teacher(server: MessagesServer) -> AsyncIterator[AnthropicTeacher]:
    opened = AnthropicTeacher(MODEL)
    yield opened
    await opened.close()


def ask_for(text: str = "hi", *, system: str | None = None, max_tokens: int = 100) -> Request:
    return Request(
        prompt_id="p",
        family="p",
        teacher=f"anthropic:{MODEL}",
        messages=(Message(role="user", content=text),),
        system=system,
        max_tokens=max_tokens,
    )


BOTH_WAYS = pytest.mark.parametrize("max_tokens", [100, STREAM_ABOVE + 1, 64_000], ids=["whole", "stream", "long"])


@BOTH_WAYS
async def test_a_reply_is_whole(server: MessagesServer, teacher: AnthropicTeacher, max_tokens: int) -> None:
    server.answer = lambda prompt: "three small words \U0001f600\u2028"
    reply = await teacher.ask(ask_for("four words are here", system="S", max_tokens=max_tokens))
    assert reply.text == "three small words \U0001f600\u2028"
    assert (reply.stop, reply.stop_reason) == ("end", "end_turn")
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (4, 4)
    assert reply.model == f"{MODEL}-20260101"
    assert reply.seconds > 0
    headers, body = server.requests[0]
    assert body["system"] == "S"
    assert body["max_tokens"] == max_tokens
    assert bool(body.get("stream")) == (max_tokens > STREAM_ABOVE)
    assert headers["anthropic-version"] >= "2026-10-21"


async def test_a_temperature_is_never_left_out_in_silence(server: MessagesServer, teacher: AnthropicTeacher) -> None:
    request = ask_for().model_copy(update={"temperature": 0.5})
    with pytest.raises(TeacherError, match="takes no temperature"):
        await teacher.ask(request)
    with pytest.raises(TeacherError, match="takes no temperature"):
        teacher.batches.entry(request)
    assert server.requests == []


@BOTH_WAYS
@pytest.mark.parametrize(
    ("reason", "stop"),
    [
        ("end_turn", "end"),
        ("stop_sequence", "end"),
        ("max_tokens", "length"),
        ("refusal", "refusal"),
        ("model_context_window_exceeded", "context"),
        ("pause_turn", "other"),
        ("something_new", "other"),
    ],
)
async def test_stop_reasons(
    server: MessagesServer, teacher: AnthropicTeacher, max_tokens: int, reason: str, stop: StopReason
) -> None:
    server.faults["hi"].append(Fault("stop", stop_reason=reason))
    reply = await teacher.ask(ask_for(max_tokens=max_tokens))
    assert (reply.stop, reply.stop_reason) == (stop, reason)


async def test_a_refusal_without_text_is_a_reply(server: MessagesServer, teacher: AnthropicTeacher) -> None:
    server.faults["hi"].append(Fault("stop", stop_reason="refusal", text=""))
    reply = await teacher.ask(ask_for())
    assert (reply.text, reply.stop) == ("", "refusal")


@pytest.mark.parametrize("kind", ["cut stream", "break stream", "error event"])
async def test_a_stream_that_breaks_off_is_no_answer(
    server: MessagesServer, teacher: AnthropicTeacher, kind: str
) -> None:
    server.faults["hi"].append(Fault(kind))  # type: ignore[arg-type]
    with pytest.raises(TeacherError, match=r"broke off|ended its stream") as caught:
        await teacher.ask(ask_for(max_tokens=STREAM_ABOVE + 1))
    assert not isinstance(caught.value, TeacherUnavailableError)
    assert server.journal == ["hi"]


async def test_half_of_a_surrogate_pair_becomes_text_that_can_be_stored(
    server: MessagesServer, teacher: AnthropicTeacher
) -> None:
    server.faults["hi"].append(Fault("half surrogate"))
    assert (await teacher.ask(ask_for())).text == "half \ufffd of a pair"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=429, error_type="rate_limit_error", retry_after=QUICK),
        Fault("status", status=500, retry_after=QUICK),
        Fault("status", status=529, error_type="overloaded_error", retry_after=QUICK),
        Fault("drop before"),
    ],
    ids=["429", "500", "529", "drop"],
)
async def test_the_sdk_tries_again_by_itself(server: MessagesServer, teacher: AnthropicTeacher, fault: Fault) -> None:
    server.faults["hi"].append(fault)
    assert (await teacher.ask(ask_for())).text == "Answer to: hi"
    assert len(server.requests) == 2


async def test_nothing_tries_again_around_the_sdk(server: MessagesServer, teacher: AnthropicTeacher) -> None:
    server.faults["hi"].extend([Fault("status", status=500, retry_after=QUICK)] * 10)
    with pytest.raises(TeacherError, match="500"):
        await teacher.ask(ask_for())
    assert len(server.requests) == 3


RATE = Fault("status", status=429, error_type="rate_limit_error", message="slow down", retry_after=QUICK)


@pytest.mark.parametrize(
    ("fault", "fatal", "words"),
    [
        (RATE, False, "--concurrency"),
        (Fault("status", status=529, error_type="overloaded_error", retry_after=QUICK), False, "529"),
        (Fault("status", status=400, error_type="invalid_request_error"), False, "refused the request"),
        (Fault("status", status=413, error_type="request_too_large"), False, "Shorten"),
        (Fault("status", status=402, error_type="billing_error"), True, "spend limit"),
        (Fault("status", status=403, error_type="permission_error"), True, "may not use"),
        (
            Fault("status", status=400, error_type="invalid_request_error", message="Your credit balance is too low"),
            True,
            "credit balance",
        ),
        (
            Fault("status", status=429, error_code="enforced_spend_limit_reached", retry_after=QUICK),
            True,
            "spend limit",
        ),
    ],
    ids=["rate", "overloaded", "bad", "too large", "billing", "permission", "credit", "spend code"],
)
async def test_errors_say_what_to_do_and_who_is_concerned(
    server: MessagesServer, teacher: AnthropicTeacher, fault: Fault, fatal: bool, words: str
) -> None:
    server.faults["hi"].extend([fault] * 3)
    with pytest.raises(TeacherError, match=words) as caught:
        await teacher.ask(ask_for())
    assert isinstance(caught.value, TeacherUnavailableError) == fatal


async def test_a_429_that_cannot_say_when_is_a_spend_limit(server: MessagesServer, teacher: AnthropicTeacher) -> None:
    # `x-should-retry` would be the only way to keep the SDK from its own two slow retries; the server has none.
    server.faults["hi"].extend([Fault("status", status=429, error_type="rate_limit_error")] * 3)
    with pytest.raises(TeacherUnavailableError, match="spend limit"):
        await teacher.ask(ask_for())


async def test_a_prompt_that_is_too_long(server: MessagesServer, teacher: AnthropicTeacher) -> None:
    with pytest.raises(TeacherError, match=r"too long.*\n.*Shorten"):
        await teacher.ask(ask_for("x" * 200_001))


async def test_an_unknown_model(server: MessagesServer) -> None:
    teacher = AnthropicTeacher("claude-0")
    with pytest.raises(TeacherUnavailableError, match="no such model: model: claude-0"):
        await teacher.ask(ask_for())
    await teacher.close()


async def test_a_page_from_a_proxy_is_no_answer(server: MessagesServer, teacher: AnthropicTeacher) -> None:
    server.faults["hi"].append(Fault("text page"))
    with pytest.raises(TeacherError, match="ANTHROPIC_BASE_URL"):
        await teacher.ask(ask_for())


async def test_nobody_there(monkeypatch: pytest.MonkeyPatch, server: MessagesServer) -> None:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:1")
    teacher = AnthropicTeacher(MODEL)
    with pytest.raises(TeacherError, match="could not be reached") as caught:
        await teacher.ask(ask_for())
    assert not isinstance(caught.value, TeacherUnavailableError)
    await teacher.close()


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_no_key(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("ANTHROPIC_API_KEY", value)
    with pytest.raises(TeacherUnavailableError, match="ANTHROPIC_API_KEY is not set"):
        AnthropicTeacher(MODEL)


@pytest.mark.parametrize("key", ["secret-part\nsecond", "secret-part second", "secret-part\u2019"])
def test_a_broken_key_is_not_repeated(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", key)
    with pytest.raises(TeacherUnavailableError) as caught:
        AnthropicTeacher(MODEL)
    assert "secret-part" not in str(caught.value)


async def test_a_refused_key_is_not_repeated(server: MessagesServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-wrong-secret")
    teacher = AnthropicTeacher(MODEL)
    with pytest.raises(TeacherUnavailableError, match="was refused") as caught:
        await teacher.ask(ask_for())
    assert "sk-wrong-secret" not in repr(caught.value) + str(caught.value)
    assert caught.value.__cause__ is None
    await teacher.close()


async def test_a_key_repeated_by_the_server_is_taken_out(server: MessagesServer, teacher: AnthropicTeacher) -> None:
    fault = Fault("status", status=400, error_type="invalid_request_error", message=f"odd header {KEY} here")
    server.faults["hi"].append(fault)
    with pytest.raises(TeacherError, match=r"odd header \[key\] here"):
        await teacher.ask(ask_for())


async def test_the_terms_ask_for_consent(teacher: AnthropicTeacher) -> None:
    terms = teacher.terms()
    assert terms.requires_acceptance
    assert not terms.accepted
    assert "authorisation" in terms.summary
