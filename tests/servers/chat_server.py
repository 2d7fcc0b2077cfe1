"""A strict chat completions API on loopback: it refuses what OpenAI's refuses, and misbehaves on command."""

from __future__ import annotations

import json
import socket
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

MODEL = "tiny-chat"
_KNOWN = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature"}
_LIMITS = {"max_tokens", "max_completion_tokens"}

#: Milliseconds after which the SDK tries again, so that tests need not wait.
_QUICK = {"retry-after-ms": "5"}


@dataclass
class Answer:
    """What to send instead of an answer: a status with a body, text of some other kind, or nothing at all.

    Attributes:
        body: Sent as JSON; a str is sent as it is, and None closes the connection.
    """

    status: int = 200
    body: Any = None


@dataclass
class ChatServer:
    """Serves while it is open as a context.

    Attributes:
        key: What a client must present; None where none is checked.
        limit_names: Names of the token limit that it knows; a request has exactly one of them.
        answers: Used up one a request.
        requests: Headers, with lower-case names, and bodies of all that arrived at chat completions.
    """

    key: str | None = None
    limit_names: frozenset[str] = frozenset({"max_tokens"})
    answers: deque[Answer] = field(default_factory=deque)
    requests: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.api = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"


def completion(text: str | None, *, reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    """A whole answer in OpenAI's layout."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": f"{MODEL}-0001",
        "choices": [
            {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text, **message}}
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def error(message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's layout."""
    return {"error": {"message": message, "type": "invalid_request_error", "code": code, "param": param}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    api: ChatServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silent."""

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self._send(404, error(f"no such path {self.path}"))
            return
        self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "me"}]})

    def do_POST(self) -> None:
        api = self.server.api
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        api.requests.append((headers, body))
        if (refusal := self._refusal(api, headers, body)) is not None:
            self._send(refusal.status, refusal.body)
        elif not api.answers:
            self._send(200, completion(f"Answer to: {body['messages'][-1]['content']}"))
        elif (answer := api.answers.popleft()).body is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self._send(answer.status, answer.body)

    def _refusal(self, api: ChatServer, headers: dict[str, str], body: dict[str, Any]) -> Answer | None:
        if self.path != "/v1/chat/completions":
            return Answer(404, error(f"no such path {self.path}"))
        key = headers.get("authorization", "").removeprefix("Bearer ")
        if api.key is not None and key != api.key:
            # A server that repeats the key: a client must not pass that on.
            return Answer(401, error(f"Incorrect API key provided: {key}", code="invalid_api_key"))
        if unknown := sorted(body.keys() - _KNOWN):
            return Answer(400, error(f"unknown {unknown[0]}", param=unknown[0], code="unknown_parameter"))
        limits = body.keys() & _LIMITS
        if wrong := sorted(limits - api.limit_names):
            return Answer(400, error(f"unsupported {wrong[0]}", param=wrong[0], code="unsupported_parameter"))
        if len(limits) != 1:
            return Answer(400, error("exactly one token limit is wanted"))
        if body["model"] != MODEL:
            return Answer(404, error(f"The model `{body['model']}` does not exist", code="model_not_found"))
        return None

    def _send(self, status: int, body: Any) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "text/html" if isinstance(body, str) else "application/json")
        self.send_header("content-length", str(len(content)))
        for name, value in _QUICK.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
