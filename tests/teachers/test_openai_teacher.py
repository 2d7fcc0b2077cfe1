"""The OpenAI-compatible teacher against a strict server: what it sends, what it makes of replies and of errors."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from mlx_distill.errors import ConfigError, TeacherError, TeacherUnavailableError
from mlx_distill.pricing import price_of
from mlx_distill.records import Message, Request, StopReason
from mlx_distill.teachers.base import request_name
from mlx_distill.teachers.openai import OpenAITeacher
from mlx_distill.teachers.registry import open_teacher
from tests.servers.chat_server import MODEL, Answer, ChatServer, completion, error

KEY = "sk-test-very-secret-0123"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    # Nothing listens there: a request to this machine must not go through a proxy.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as running:
        yield running


@pytest.fixture
async def teacher(server: ChatServer) -> AsyncIterator[OpenAITeacher]:
    opened = OpenAITeacher(MODEL, base_url=server.url)
    yield opened
    await opened.close()


def ask_for(text: str = "hi", *, system: str | None = None) -> Request:
    return Request(
        prompt_id="p",
        family="p",
        teacher=f"openai:{MODEL}",
        messages=(Message(role="user", content=text),),
        system=system,
        max_tokens=100,
    )


async def test_a_reply_is_whole_and_nothing_is_sent_that_was_not_asked_for(
    server: ChatServer, teacher: OpenAITeacher
) -> None:
    reply = await teacher.ask(ask_for("a prompt", system="S"))
    assert reply.text == "Answer to: a prompt"
    assert (reply.stop, reply.stop_reason, reply.model) == ("end", "stop", f"{MODEL}-0001")
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (7, 3)
    assert reply.seconds > 0
    assert server.requests[0][1] == {
        "model": MODEL,
        "max_tokens": 100,
        "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "a prompt"}],
    }


async def test_a_temperature_is_sent_where_there_is_one(server: ChatServer, teacher: OpenAITeacher) -> None:
    for temperature in (0.0, 0.7):
        await teacher.ask(ask_for().model_copy(update={"temperature": temperature, "sample": 2}))
    # Also when it is asked again under the other name of the limit.
    server.limit_names = frozenset({"max_completion_tokens"})
    await teacher.ask(ask_for().model_copy(update={"temperature": 0.7}))
    sent = [body for _, body in server.requests]
    assert [body.get("temperature") for body in sent] == [0.0, 0.7, 0.7, 0.7]
    assert all(
        body.keys() <= {"model", "messages", "temperature", "max_tokens", "max_completion_tokens"} for body in sent
    )


@pytest.mark.parametrize(
    ("reason", "stop"),
    [
        ("stop", "end"),
        ("length", "length"),
        ("content_filter", "refusal"),
        ("tool_calls", "other"),
        ("something_new", "other"),
    ],
)
async def test_stop_reasons(server: ChatServer, teacher: OpenAITeacher, reason: str, stop: StopReason) -> None:
    server.answers.append(Answer(body=completion("text", reason=reason)))
    reply = await teacher.ask(ask_for())
    assert (reply.stop, reply.stop_reason) == (stop, reason)


async def test_a_refusal_is_kept_as_one(server: ChatServer, teacher: OpenAITeacher) -> None:
    server.answers.append(Answer(body=completion(None, refusal="I will not.")))
    reply = await teacher.ask(ask_for())
    assert (reply.text, reply.stop) == ("I will not.", "refusal")


async def test_an_answer_of_thoughts_alone_has_no_text(server: ChatServer, teacher: OpenAITeacher) -> None:
    server.answers.append(Answer(body=completion(None, reason="length", reasoning_content="Well,")))
    reply = await teacher.ask(ask_for())
    assert (reply.text, reply.stop) == ("", "length")


async def test_a_server_that_does_not_count_costs_no_tokens(server: ChatServer, teacher: OpenAITeacher) -> None:
    body = completion("text")
    del body["usage"]
    server.answers.append(Answer(body=body))
    reply = await teacher.ask(ask_for())
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (0, 0)


async def test_half_of_a_surrogate_pair_becomes_text_that_can_be_stored(
    server: ChatServer, teacher: OpenAITeacher
) -> None:
    server.answers.append(Answer(body=completion("half \ud83d of a pair")))
    assert (await teacher.ask(ask_for())).text == "half \ufffd of a pair"


@pytest.mark.parametrize(
    "body",
    [
        "<html>Please log in</html>",
        {},
        {"choices": []},
        {"choices": [{}]},
        {"choices": [{"message": None, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]},
        {"choices": "abc"},
        ["list"],
        completion("half an ans", reason=None),
        completion("half an ans", reason=""),
    ],
    ids=["page", "empty", "no choice", "bare", "no message", "number", "str", "list", "no reason", "empty reason"],
)
async def test_what_is_no_answer_is_told(server: ChatServer, teacher: OpenAITeacher, body: object) -> None:
    server.answers.append(Answer(body=body))
    with pytest.raises(TeacherError, match=r"no answer.*\n.*/v1"):
        await teacher.ask(ask_for())


@pytest.mark.parametrize("fault", [Answer(500, error("broken")), Answer(429, error("slow")), Answer()])
async def test_the_sdk_tries_again_by_itself(server: ChatServer, teacher: OpenAITeacher, fault: Answer) -> None:
    server.answers.append(fault)
    assert (await teacher.ask(ask_for())).text == "Answer to: hi"
    assert len(server.requests) == 2


async def test_nothing_tries_again_around_the_sdk(server: ChatServer, teacher: OpenAITeacher) -> None:
    server.answers.extend([Answer(503, error("loading"))] * 10)
    with pytest.raises(TeacherError, match="503"):
        await teacher.ask(ask_for())
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "fatal", "words"),
    [
        (Answer(400, error("maximum context length is 10", code="context_length_exceeded")), False, "Shorten"),
        (Answer(400, {"error": "context is too small"}), False, r"context is too small\.\n.*Shorten"),
        (Answer(400, error("bad")), False, "refused the request: bad"),
        (Answer(422, {"detail": "odd field"}), False, "odd field"),
        (Answer(413, error("large")), False, "Shorten"),
        (Answer(402, error("no credit")), True, "spend limit"),
        (Answer(403, error("not for you")), True, "may not use it: not for you"),
        (Answer(429, error("slow")), False, "--concurrency"),
        (Answer(429, error("quota", code="insufficient_quota")), True, "spend limit"),
        (Answer(500, "<html>oops</html>"), False, "500"),
    ],
    ids=["context", "plain context", "bad", "detail", "large", "credit", "forbidden", "rate", "quota", "500"],
)
async def test_errors_say_what_to_do_and_who_is_concerned(
    server: ChatServer, teacher: OpenAITeacher, fault: Answer, fatal: bool, words: str
) -> None:
    server.answers.extend([fault] * 3)
    with pytest.raises(TeacherError, match=words) as caught:
        await teacher.ask(ask_for())
    assert isinstance(caught.value, TeacherUnavailableError) == fatal
    assert caught.value.__cause__ is None


async def test_an_unknown_model_is_answered_with_those_there_are(server: ChatServer) -> None:
    teacher = OpenAITeacher("other", base_url=server.url)
    with pytest.raises(TeacherUnavailableError, match=rf"no such model.*\n.*It has: {MODEL}"):
        await teacher.ask(ask_for())
    await teacher.close()


async def test_a_base_url_without_v1_is_told(server: ChatServer) -> None:
    teacher = OpenAITeacher(MODEL, base_url=server.url.removesuffix("/v1"))
    with pytest.raises(TeacherUnavailableError, match=r"mostly ends in /v1"):
        await teacher.ask(ask_for())
    await teacher.close()


async def test_a_server_that_is_not_running_is_told_with_how_to_start_one() -> None:
    with socket.socket() as reserved:  # Bound, but not listening: refused, and nobody else's.
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/v1"
        teacher = OpenAITeacher(MODEL, base_url=url)
        with pytest.raises(TeacherUnavailableError, match=rf"no server answers at {url}\.\n.*mlx_lm\.server"):
            await teacher.ask(ask_for())
        await teacher.close()


async def test_a_server_that_knows_only_the_new_name_of_the_limit_gets_it(server: ChatServer) -> None:
    server.limit_names = frozenset({"max_completion_tokens"})
    teacher = OpenAITeacher(MODEL, base_url=server.url)
    for _ in range(2):
        assert (await teacher.ask(ask_for())).stop == "end"
    # Learnt once.
    assert [sorted(body.keys() - {"model", "messages"}) for _, body in server.requests] == [
        ["max_tokens"],
        ["max_completion_tokens"],
        ["max_completion_tokens"],
    ]
    await teacher.close()


async def test_a_server_without_keys_is_sent_none(server: ChatServer, teacher: OpenAITeacher) -> None:
    await teacher.ask(ask_for())
    assert server.requests[0][0]["authorization"] == "Bearer no-key"


async def test_the_key_goes_to_the_server(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = KEY
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    teacher = open_teacher(f"openai:{MODEL}")
    assert (await teacher.ask(ask_for())).stop == "end"
    await teacher.close()


async def test_a_missing_key_is_asked_for(server: ChatServer, teacher: OpenAITeacher) -> None:
    server.key = KEY
    with pytest.raises(TeacherUnavailableError, match=r"wants a key.*\n.*export OPENAI_API_KEY"):
        await teacher.ask(ask_for())


async def test_a_refused_key_is_not_repeated(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "another"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    teacher = OpenAITeacher(MODEL, base_url=server.url)
    with pytest.raises(TeacherUnavailableError, match="was refused") as caught:
        await teacher.ask(ask_for())
    assert KEY not in repr(caught.value) + str(caught.value)
    server.key = KEY
    server.answers.append(Answer(400, error(f"odd header {KEY} here")))
    with pytest.raises(TeacherError, match=r"odd header \[key\] here"):
        await teacher.ask(ask_for())
    await teacher.close()


def test_openai_itself_needs_a_key() -> None:
    with pytest.raises(TeacherUnavailableError, match=r"OPENAI_API_KEY is not set.*\n.*--base-url"):
        OpenAITeacher("gpt-5-mini")


@pytest.mark.parametrize("key", ["secret-part\nsecond", "secret-part second", "secret-part\u2019"])
def test_a_broken_key_is_not_repeated(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(TeacherUnavailableError) as caught:
        OpenAITeacher(MODEL)
    assert "secret-part" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret-part@host/v1",
        "https://host/v1?key=secret-part",
        "https://host/v1#secret-part",
        "ftp://host/v1",
        "127.0.0.1:8080/v1",
        "http:///v1",
        "http://host:port/v1",
        "http://[::1/v1",
    ],
)
def test_what_is_no_base_url_is_refused_and_its_secrets_are_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="base URL") as caught:
        OpenAITeacher(MODEL, base_url=url)
    assert "secret-part" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "acceptance", "revision", "licence"),
    [
        (None, True, "api.openai.com", "OpenAI"),
        ("https://EU.api.openai.com/v1/", True, "eu.api.openai.com", "OpenAI"),
        ("http://127.0.0.1:8080/v1", False, "loopback", "unknown"),
        ("http://[::1]:8080/v1", False, "loopback", "unknown"),
        ("http://localhost:11434/v1", False, "loopback", "unknown"),
        ("https://openrouter.ai/api/v1", True, "openrouter.ai", "unknown"),
        # Named to look like what they are not.
        ("https://notopenai.com/v1", True, "notopenai.com", "unknown"),
        ("https://localhost.example.com/v1", True, "localhost.example.com", "unknown"),
        ("https://127.0.0.1.example.com/v1", True, "127.0.0.1.example.com", "unknown"),
    ],
)
async def test_the_host_decides_the_terms_and_is_part_of_what_was_asked(
    monkeypatch: pytest.MonkeyPatch, url: str | None, acceptance: bool, revision: str, licence: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    teacher = open_teacher(f"openai:{MODEL}", base_url=url)
    terms = teacher.terms()
    assert terms.requires_acceptance == acceptance
    assert not terms.accepted
    assert licence in terms.licence
    assert request_name(teacher) == f"openai:{MODEL}@{revision}"
    await teacher.close()


def test_the_price_is_not_known() -> None:
    assert price_of(f"openai:{MODEL}") is None


@pytest.mark.parametrize("spec", ["anthropic:claude-sonnet-4-6", "mlx:smollm2-135m", "recorded:data/starter"])
def test_other_teachers_take_no_base_url(spec: str) -> None:
    with pytest.raises(ConfigError, match="takes no base URL"):
        open_teacher(spec, base_url="http://127.0.0.1:8080/v1")


def test_a_missing_sdk_is_told_with_what_to_type() -> None:
    script = (
        "import sys; sys.modules['openai'] = None\n"
        "from mlx_distill.errors import DependencyError\n"
        "from mlx_distill.teachers.registry import open_teacher\n"
        "try:\n    open_teacher('openai:x', base_url='http://127.0.0.1:1/v1')\n"
        "except DependencyError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "openai is not installed" in run.stdout
    assert "pip install 'mlx-distill[openai]'" in run.stdout
