"""A strict Messages API on loopback: it refuses what the real one refuses, keeps a journal of what it would bill,
and misbehaves on command. Counting tokens is here, batches are in `batches_api.py`.

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
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from tests.servers.batches_api import BatchStore, serve_batches_create, serve_batches_get
from tests.servers.faults import Fault, Kind
from tests.servers.messages import KEY, MODEL, check_message, message_for, tokens_of
from tests.servers.refusals import RefusedError, invalid

__all__ = ["KEY", "MODEL", "Fault", "Kind", "MessagesServer"]

#: Faults that take effect before a request is accepted.
_BEFORE = ("status", "drop before", "text page", "redirect")


@dataclass
class MessagesServer:
    """Serves while it is open as a context.

    Attributes:
        delay: Seconds an answer takes.
        faults: Prompt text → faults, used up one a request; the key "" applies to every prompt. Keys that begin with
            "batches " or are "count_tokens" are of those parts of the API.
        journal: The prompt of every request that was accepted, and would be billed, in order.
        requests: Every request that arrived: its headers, with lower-case names, and its body.
        keep_requests: Whether `requests` is kept.
        rate: How many messages may be asked in how many seconds; more are refused with 429.
        looks: How often a batch is looked at before it has ended.
        on_event: Called as things happen: "arrived", "accepted", "answering", "half answered", "answered".
    """

    delay: float = 0.0
    answer: Callable[[str], str] = field(default=lambda prompt: f"Answer to: {prompt}")
    faults: defaultdict[str, deque[Fault]] = field(default_factory=lambda: defaultdict(deque))
    journal: list[str] = field(default_factory=list)
    requests: list[tuple[dict[str, str], Any]] = field(default_factory=list)
    keep_requests: bool = True
    rate: tuple[int, float] | None = None
    looks: int = 0
    on_event: Callable[[str], None] = field(default=lambda name: None)
    most_at_once: int = 0
    refused_by_rate: int = 0

    def __enter__(self) -> Self:
        self._lock = threading.Lock()
        self._at_once = 0
        self._window = (0.0, 0)
        self.batches = BatchStore(self)
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

    def limited(self) -> tuple[dict[str, str], bool]:
        """Rate-limit headers after one more message, and whether it is one too many."""
        if self.rate is None:
            return {}, False
        most, seconds = self.rate
        with self._lock:
            now = time.time()
            start, used = self._window
            if now >= start + seconds:
                start, used = now, 0
            too_many = used >= most
            self._window = (start, used if too_many else used + 1)
            self.refused_by_rate += too_many
            left = most - self._window[1]
        reset = datetime.fromtimestamp(start + seconds, UTC).isoformat()
        headers = {
            "anthropic-ratelimit-requests-limit": str(most),
            "anthropic-ratelimit-requests-remaining": str(left),
            "anthropic-ratelimit-requests-reset": reset,
        }
        if too_many:
            headers["retry-after"] = f"{max(0.01, start + seconds - now):.3f}"
        return headers, too_many

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

    def take_fault(self, prompt: str, *others: str) -> Fault | None:
        """The next fault of this key, or of these; the first that has one."""
        with self._lock:
            for key in (prompt, *others):
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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    extra: dict[str, str] = {}  # noqa: RUF012 (replaced, never changed)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silent."""

    def do_GET(self) -> None:
        self._count(self._serve_get)

    def do_POST(self) -> None:
        self._count(self._serve_post)

    def _count(self, serve: Callable[[MessagesServer], None]) -> None:
        api = self.server.api
        api.count_at_once(+1)
        try:
            serve(api)
        except RefusedError as refusal:
            self.error(refusal.status, refusal.error_type, refusal.message)
        finally:
            api.count_at_once(-1)

    def _serve_get(self, api: MessagesServer) -> None:
        _check_headers(self.lower_headers())
        serve_batches_get(self, api.batches)

    def _serve_post(self, api: MessagesServer) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        headers = self.lower_headers()
        path = self.path.partition("?")[0]
        api.on_event("arrived")
        try:
            _check_headers(headers)
            body = _json_of(raw)
            if path == "/v1/messages/batches":
                serve_batches_create(self, api.batches, body)
                return
            if path not in ("/v1/messages", "/v1/messages/count_tokens"):
                raise RefusedError(404, "not_found_error", f"no such path {path}")
            check_message(body, headers, counting=path.endswith("count_tokens"))
        except RefusedError:
            if api.keep_requests:
                api.requests.append((headers, raw))
            raise
        if api.keep_requests:
            api.requests.append((headers, body))
        if path.endswith("count_tokens"):
            fault = api.take_fault("count_tokens")
            if fault is not None and self.before(fault):
                return
            self.json(200, {"input_tokens": tokens_of(body["messages"][-1]["content"])})
            return
        self._message(api, body)

    def _message(self, api: MessagesServer, body: dict[str, Any]) -> None:
        prompt = body["messages"][-1]["content"]
        self.extra, too_many = api.limited()
        if too_many:
            self.error(429, "rate_limit_error", "too many requests")
            return
        fault = api.take_fault(prompt, "")
        if fault is not None and self.before(fault):
            return
        api.accept(prompt)
        api.on_event("accepted")
        time.sleep(api.delay)
        if fault is not None and fault.kind == "stall":
            time.sleep(fault.seconds)
        if fault is not None and fault.kind == "drop after":
            self.hang_up()
            return
        api.on_event("answering")
        message = message_for(api.answer, body, fault)
        if body.get("stream"):
            self._stream(body, message, fault)
        else:
            self.json(200, message)
        api.on_event("answered")

    def lower_headers(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.headers.items()}

    def before(self, fault: Fault) -> bool:
        """Do what is done to a request before it is accepted; False where the fault comes later."""
        if fault.kind not in _BEFORE:
            return False
        self._before(fault)
        return True

    def _before(self, fault: Fault) -> None:
        if fault.kind == "drop before":
            self.hang_up()
        elif fault.kind == "redirect":
            self._bytes(302, b"", {"location": "http://localhost:1/v1/messages"})
        elif fault.kind == "text page":
            self._bytes(200, b"<html>Please log in</html>", {"content-type": "text/html"})
        else:
            extra = {} if fault.retry_after is None else {"retry-after": str(fault.retry_after)}
            self.error(fault.status, fault.error_type, fault.message, fault.error_code, extra)

    def _stream(self, body: dict[str, Any], message: dict[str, Any], fault: Fault | None) -> None:
        kind = fault.kind if fault is not None else None
        text = "".join(block["text"] for block in message["content"])
        half = len(text) // 2
        events: list[dict[str, Any]] = [
            {"type": "message_start", "message": {**message, "content": [], "stop_reason": None}},
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
                    "delta": {name: message.get(name) for name in ("stop_reason", "stop_sequence", "stop_details")},
                    "usage": {"output_tokens": message["usage"]["output_tokens"]},
                },
                {"type": "message_stop"},
            ]
        self.begin_chunks("text/event-stream")
        for number, event in enumerate(events):
            if number == len(events) // 2:
                self.server.api.on_event("half answered")
            data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
            self.chunk(data)
        if kind == "break stream":
            self.wfile.write(b"400\r\nevent: content_bl")
            self.hang_up()
        else:
            self.wfile.write(b"0\r\n\r\n")

    def begin_chunks(self, content_type: str) -> None:
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("transfer-encoding", "chunked")
        for name, value in self.extra.items():
            self.send_header(name, value)
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        """Send a part of a body whose length is not known; an empty one ends it."""
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def error(
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
        self.json(status, {"type": "error", "error": error}, extra)

    def json(self, status: int, value: Any, extra: dict[str, str] | None = None) -> None:
        self._bytes(status, json.dumps(value).encode(), {"content-type": "application/json", **(extra or {})})

    def _bytes(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**self.extra, **headers}.items():
            self.send_header(name, value)
        self.extra = {}
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _check_headers(headers: dict[str, str]) -> None:
    key = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
    if key != KEY:
        # A server that repeats the key: a client must not pass that on.
        raise RefusedError(401, "authentication_error", f"invalid key {key}")
    if "anthropic-version" not in headers:
        raise invalid("anthropic-version: header is required")


def _json_of(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except ValueError:
        raise invalid("the body is not JSON") from None
    if not isinstance(body, dict):
        raise invalid("the body is not an object")
    return body
