"""The loopback server is strict: a client that passes here has sent what the real API takes."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers.messages_server import KEY, MODEL, MessagesServer

GOOD_HEADERS = {"x-api-key": KEY, "anthropic-version": "2026-10-21"}
GOOD_BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def server() -> Iterator[MessagesServer]:
    with MessagesServer() as running:
        yield running


def post(server: MessagesServer, headers: dict[str, str], body: Any) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=5)
    connection.request("POST", "/v1/messages", json.dumps(body), headers)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def test_answers_and_bills_what_is_right(server: MessagesServer) -> None:
    status, reply = post(server, GOOD_HEADERS, GOOD_BODY)
    assert status == 200
    assert reply["content"] == [{"type": "text", "text": "Answer to: hi"}]
    assert server.journal == ["hi"]


@pytest.mark.parametrize(
    ("headers", "change", "status", "named"),
    [
        ({"anthropic-version": "2026-10-21"}, {}, 401, "key"),
        ({**GOOD_HEADERS, "x-api-key": "other"}, {}, 401, "key"),
        ({"x-api-key": KEY}, {}, 400, "anthropic-version"),
        (GOOD_HEADERS, {"temperature": 0.5}, 400, "temperature"),
        (GOOD_HEADERS, {"top_k": 4}, 400, "top_k"),
        (GOOD_HEADERS, {"max_tokens": None}, 400, "max_tokens"),
        (GOOD_HEADERS, {"max_tokens": 0}, 400, "max_tokens"),
        (GOOD_HEADERS, {"prompt_id": "x"}, 400, "prompt_id"),
        (GOOD_HEADERS, {"messages": []}, 400, "messages"),
        (GOOD_HEADERS, {"messages": [{"role": "user", "content": " "}]}, 400, "messages"),
        (GOOD_HEADERS, {"model": "claude-1"}, 404, "claude-1"),
    ],
)
def test_refuses_and_does_not_bill(
    server: MessagesServer, headers: dict[str, str], change: dict[str, Any], status: int, named: str
) -> None:
    body = {key: value for key, value in {**GOOD_BODY, **change}.items() if value is not None}
    got, reply = post(server, headers, body)
    assert got == status
    assert named in reply["error"]["message"]
    assert server.journal == []


def test_older_versions_take_sampling_parameters(server: MessagesServer) -> None:
    headers = {**GOOD_HEADERS, "anthropic-version": "2023-06-01"}
    assert post(server, headers, {**GOOD_BODY, "temperature": 0.5})[0] == 200
