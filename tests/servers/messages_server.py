"""A strict Messages API on loopback: it refuses what the real one refuses, keeps a journal of what it would bill,
and misbehaves on command.

Runs in threads of the test's own process, so that a child process can be killed while the journal lives on.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

KEY = "sk-test-0123456789"
MODEL = "claude-sonnet-4-6"
CONTEXT_CHARACTERS = 200_000

#: The version from which on sampling parameters are refused.
NO_SAMPLING_FROM = "2026-10-21"

_REQUIRED = {"model", "messages", "max_tokens"}
_SAMPLING = {"temperature", "top_p", "top_k"}
_KNOWN = _REQUIRED | _SAMPLING | {"system", "stream", "stop_sequences", "metadata"}

Kind = Literal[
    "status",  # answer with an error status
    "drop before",  # close the connection, nothing accepted
    "drop after",  # accept (and bill), then close the connection without an answer
    "stop",  # answer, and give this stop reason
    "cut stream",  # accept, stream half of the answer, then end the stream as if it were whole
    "break stream",  # accept, stream half of the answer, then close the connection in the middle of a chunk
    "error event",  # accept, stream half of the answer, then an error event
    "text page",  # answer 200 with a page of text, as a proxy does
    "half surrogate",  # answer with half of a surrogate pair
]


@dataclass(frozen=True)
class Fault:
    """What to do to one request instead of answering it."""

    kind: Kind
    status: int = 500
    error_type: str = "api_error"
    message: str = "broken on command"
    error_code: str | None = None
    retry_after: float | None = None
    stop_reason: str = "end_turn"
    text: str | None = None


@dataclass
class MessagesServer:
    """Serves while it is open as a context.

    Attributes:
        delay: Seconds an answer takes.
        faults: Prompt text → faults, used up one a request; the key "" applies to every prompt.
        journal: The prompt of every request that was accepted, and would be billed, in order.
        requests: Every request that arrived: its headers, with lower-case names, and its body.
    """

    delay: float = 0.0
    answer: Callable[[str], str] = field(default=lambda prompt: f"Answer to: {prompt}")
    faults: defaultdict[str, deque[Fault]] = field(default_factory=lambda: defaultdict(deque))
    journal: list[str] = field(default_factory=list)
    requests: list[tuple[dict[str, str], Any]] = field(default_factory=list)
    most_at_once: int = 0

    def __enter__(self) -> Self:
        self._lock = threading.Lock()
        self._at_once = 0
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
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find the server."""
        return {"ANTHROPIC_BASE_URL": self.url, "ANTHROPIC_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}

    @property
    def billed(self) -> Counter[str]:
        """How often each prompt was accepted."""
        with self._lock:
            return Counter(self.journal)

    def wait_for_journal(self, length: int, *, timeout: float = 60.0) -> None:
        """Wait until that many requests were accepted."""
        deadline = time.monotonic() + timeout
        while len(self.journal) < length:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self.journal)} requests accepted, {length} expected")
            time.sleep(0.005)

    def take_fault(self, prompt: str) -> Fault | None:
        with self._lock:
            for key in (prompt, ""):
                if self.faults[key]:
                    return self.faults[key].popleft()
        return None

    def accept(self, prompt: str) -> None:
        with self._lock:
            self.journal.append(prompt)

    def count_at_once(self, change: int) -> None:
        with self._lock:
            self._at_once += change
            self.most_at_once = max(self.most_at_once, self._at_once)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    api: MessagesServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed breaks its connections; that is what it is killed for."""


class _RefusedError(Exception):
    def __init__(self, status: int, error_type: str, message: str) -> None:
        super().__init__(message)
        self.status, self.error_type, self.message = status, error_type, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silent."""

    def do_POST(self) -> None:
        api = self.server.api
        api.count_at_once(+1)
        try:
            self._serve(api)
        finally:
            api.count_at_once(-1)

    def _serve(self, api: MessagesServer) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            body = _checked(self.path, headers, raw)
        except _RefusedError as refusal:
            api.requests.append((headers, raw))
            self._error(refusal.status, refusal.error_type, refusal.message)
            return
        api.requests.append((headers, body))
        prompt = body["messages"][-1]["content"]
        fault = api.take_fault(prompt)
        if fault is not None and fault.kind in ("status", "drop before", "text page"):
            self._before(fault)
            return
        api.accept(prompt)
        time.sleep(api.delay)
        if fault is not None and fault.kind == "drop after":
            self._hang_up()
            return
        text = api.answer(prompt) if fault is None or fault.text is None else fault.text
        if fault is not None and fault.kind == "half surrogate":
            text = "half \ud83d of a pair"
        stop = fault.stop_reason if fault is not None and fault.kind == "stop" else "end_turn"
        if body.get("stream"):
            self._stream(body, text, stop, fault)
        else:
            content = [{"type": "text", "text": text}] if text else []
            self._json(200, _message(body, content, stop, output_tokens=_tokens(text)))

    def _before(self, fault: Fault) -> None:
        if fault.kind == "drop before":
            self._hang_up()
        elif fault.kind == "text page":
            self._bytes(200, b"<html>Please log in</html>", {"content-type": "text/html"})
        else:
            extra = {} if fault.retry_after is None else {"retry-after": str(fault.retry_after)}
            self._error(fault.status, fault.error_type, fault.message, fault.error_code, extra)

    def _stream(self, body: dict[str, Any], text: str, stop: str, fault: Fault | None) -> None:
        kind = fault.kind if fault is not None else None
        half = len(text) // 2
        events: list[dict[str, Any]] = [
            {"type": "message_start", "message": _message(body, [], None, output_tokens=1)},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "ping"},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text[:half]}},
        ]
        if kind == "error event":
            events.append({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})
        elif kind not in ("cut stream", "break stream"):
            events += [
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text[half:]}},
                {"type": "content_block_stop", "index": 0},
                {
                    "type": "message_delta",
                    "delta": {"stop_reason": stop, "stop_sequence": None},
                    "usage": {"output_tokens": _tokens(text)},
                },
                {"type": "message_stop"},
            ]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for event in events:
            data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if kind == "break stream":
            self.wfile.write(b"400\r\nevent: content_bl")
            self._hang_up()
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _error(
        self,
        status: int,
        error_type: str,
        message: str,
        code: str | None = None,
        extra: dict[str, str] | None = None,
    ) -> None:
        error: dict[str, Any] = {"type": error_type, "message": message}
        if code is not None:
            error["details"] = {"error_code": code}
        self._json(status, {"type": "error", "error": error}, extra)

    def _json(self, status: int, value: Any, extra: dict[str, str] | None = None) -> None:
        self._bytes(status, json.dumps(value).encode(), {"content-type": "application/json", **(extra or {})})

    def _bytes(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _checked(path: str, headers: dict[str, str], raw: bytes) -> dict[str, Any]:
    if path != "/v1/messages":
        raise _RefusedError(404, "not_found_error", f"no such path {path}")
    key = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
    if key != KEY:
        # A server that repeats the key: a client must not pass that on.
        raise _RefusedError(401, "authentication_error", f"invalid key {key}")
    if "anthropic-version" not in headers:
        raise _invalid("anthropic-version: header is required")
    try:
        body: dict[str, Any] = json.loads(raw)
    except ValueError:
        raise _invalid("the body is not JSON") from None
    if missing := sorted(_REQUIRED - body.keys()):
        raise _invalid(f"{missing[0]}: Field required")
    if extra := sorted(body.keys() - _KNOWN):
        raise _invalid(f"{extra[0]}: Extra inputs are not permitted")
    if (sampling := sorted(_SAMPLING & body.keys())) and headers["anthropic-version"] >= NO_SAMPLING_FROM:
        raise _invalid(f"{sampling[0]}: not supported in this version")
    if not isinstance(body["max_tokens"], int) or body["max_tokens"] < 1:
        raise _invalid("max_tokens: must be at least 1")
    _check_messages(body["messages"])
    if body["model"] != MODEL:
        raise _RefusedError(404, "not_found_error", f"model: {body['model']}")
    return body


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages or messages[0].get("role") != "user":
        raise _invalid("messages: first message must use the user role")
    for message in messages:
        if message.get("role") not in ("user", "assistant") or not message.get("content", "").strip():
            raise _invalid("messages: text content blocks must be non-empty")
    if (length := sum(len(message["content"]) for message in messages)) > CONTEXT_CHARACTERS:
        raise _invalid(f"prompt is too long: {length} tokens > {CONTEXT_CHARACTERS} maximum")


def _invalid(message: str) -> _RefusedError:
    return _RefusedError(400, "invalid_request_error", message)


def _message(body: dict[str, Any], content: list[Any], stop: str | None, *, output_tokens: int) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": f"{body['model']}-20260101",
        "content": content,
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": {"input_tokens": _tokens(body["messages"][-1]["content"]), "output_tokens": output_tokens},
    }


def _tokens(text: str) -> int:
    return len(text.split())
