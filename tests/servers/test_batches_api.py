"""The Batches part of the loopback server is as strict as the real one."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers.messages_server import KEY, MODEL, Fault, MessagesServer

HEADERS = {"x-api-key": KEY, "anthropic-version": "2026-10-21"}
PARAMS: dict[str, Any] = {"model": MODEL, "max_tokens": 10, "messages": [{"role": "user", "content": "hi there"}]}


@pytest.fixture
def server() -> Iterator[MessagesServer]:
    with MessagesServer() as running:
        yield running


def call(server: MessagesServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=5)
    connection.request(method, path, json.dumps(body) if body is not None else None, {**HEADERS, **headers})
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    return response.status, content


def entry(custom_id: str, **changes: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "params": {**PARAMS, **changes}}


@pytest.mark.parametrize(
    "requests",
    [
        [],
        [entry("with space")],
        [entry("x" * 65)],
        [entry("a"), entry("a")],
        [{"custom_id": "a"}],
        [{**entry("a"), "extra": 1}],
    ],
    ids=["none", "space", "long", "twice", "no params", "extra"],
)
def test_what_is_not_a_batch_is_refused(server: MessagesServer, requests: Any) -> None:
    status, content = call(server, "POST", "/v1/messages/batches", {"requests": requests})
    assert (status, json.loads(content)["error"]["type"]) == (400, "invalid_request_error")
    assert server.journal == []


def test_a_request_that_is_wrong_ends_errored_and_is_not_billed(server: MessagesServer) -> None:
    requests = [entry("a"), entry("b", temperature=0.5), entry("c")]
    server.looks = 1
    _, content = call(server, "POST", "/v1/messages/batches", {"requests": requests})
    created = json.loads(content)
    assert created["request_counts"] == {"processing": 3, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
    path = f"/v1/messages/batches/{created['id']}"
    assert json.loads(call(server, "GET", path)[1])["results_url"] is None
    ended = json.loads(call(server, "GET", path)[1])
    assert (ended["processing_status"], ended["request_counts"]["errored"]) == ("ended", 1)
    results = [json.loads(line) for line in call(server, "GET", f"{path}/results")[1].splitlines()]
    assert [(row["custom_id"], row["result"]["type"]) for row in results] == [
        ("a", "succeeded"),
        ("b", "errored"),
        ("c", "succeeded"),
    ]
    assert server.journal == ["hi there", "hi there"]


def test_the_list_has_pages_latest_first(server: MessagesServer) -> None:
    for n in range(5):
        call(server, "POST", "/v1/messages/batches", {"requests": [entry(f"a{n}")]})
    first = json.loads(call(server, "GET", "/v1/messages/batches?limit=2")[1])
    assert ([batch["id"][-1] for batch in first["data"]], first["has_more"]) == (["4", "3"], True)
    last = json.loads(call(server, "GET", f"/v1/messages/batches?limit=9&after_id={first['last_id']}")[1])
    assert ([batch["id"][-1] for batch in last["data"]], last["has_more"]) == (["2", "1", "0"], False)


def test_it_asks_for_a_key_and_knows_its_batches(server: MessagesServer) -> None:
    assert call(server, "GET", "/v1/messages/batches", **{"x-api-key": "other"})[0] == 401
    assert call(server, "GET", "/v1/messages/batches/msgbatch_none")[0] == 404


def test_tokens_are_counted_and_not_billed(server: MessagesServer) -> None:
    body = {name: value for name, value in PARAMS.items() if name != "max_tokens"}
    assert json.loads(call(server, "POST", "/v1/messages/count_tokens", body)[1]) == {"input_tokens": 2}
    assert call(server, "POST", "/v1/messages/count_tokens", {**body, "temperature": 1})[0] == 400
    server.faults["count_tokens"].append(Fault("status", status=529, error_type="overloaded_error"))
    assert call(server, "POST", "/v1/messages/count_tokens", body)[0] == 529
    assert server.journal == []
