"""The Batches part of the loopback server: create, list, retrieve, results, cancel.

A request's fate is decided when its batch is created: by the faults of its prompt, or by its parameters. What
succeeds is billed then. Answers are made as the results are read, so that a large batch takes no memory.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from tests.servers.messages import check_message, message_for
from tests.servers.refusals import RefusedError, invalid

if TYPE_CHECKING:
    from tests.servers.faults import Fault
    from tests.servers.messages_server import MessagesServer, _Handler

MOST_REQUESTS = 100_000
_CUSTOM_ID = re.compile(r"^[a-zA-Z0-9_-]{1,64}$")
_KINDS = {"expire": "expired", "cancel": "canceled", "error": "errored"}
_CHUNK = 1 << 16


@dataclass
class _Batch:
    id: str
    created: datetime
    requests: list[dict[str, Any]]
    faults: list[Fault | None]
    outcomes: list[str]
    problems: dict[int, str]
    looks_left: int


@dataclass
class BatchStore:
    """All batches of the server, oldest first."""

    api: MessagesServer
    all: list[_Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, body: dict[str, Any], version: str) -> _Batch:
        """Check and accept a batch."""
        requests = body.get("requests")
        if body.keys() != {"requests"} or not isinstance(requests, list) or not requests:
            raise invalid("requests: Field required, and nothing else")
        if len(requests) > MOST_REQUESTS:
            raise invalid(f"requests: at most {MOST_REQUESTS}")
        ids = [request.get("custom_id") for request in requests]
        for request, custom_id in zip(requests, ids, strict=True):
            if request.keys() != {"custom_id", "params"} or not _CUSTOM_ID.match(str(custom_id)):
                raise invalid("requests.custom_id: must match ^[a-zA-Z0-9_-]{1,64}$")
        if len(set(ids)) != len(ids):
            raise invalid("requests.custom_id: must be unique")
        faults: list[Fault | None] = []
        outcomes: list[str] = []
        problems: dict[int, str] = {}
        billed: list[str] = []
        for place, request in enumerate(requests):
            try:
                check_message(request["params"], {"anthropic-version": version})
            except RefusedError as refusal:
                problems[place] = refusal.message
                faults.append(None)
                outcomes.append("errored")
                continue
            prompt = request["params"]["messages"][-1]["content"]
            fault = self.api.take_fault(prompt, "")
            faults.append(fault)
            outcomes.append(_KINDS.get(fault.kind, "succeeded") if fault else "succeeded")
            if outcomes[-1] == "succeeded":
                billed.append(prompt)
        with self._lock:
            batch = _Batch(
                f"msgbatch_{len(self.all):04d}", datetime.now(UTC), requests, faults, outcomes, problems, self.api.looks
            )
            self.all.append(batch)
        for prompt in billed:
            self.api.accept(prompt)
        return batch

    def find(self, batch_id: str) -> _Batch:
        for batch in self.all:
            if batch.id == batch_id:
                return batch
        raise RefusedError(404, "not_found_error", f"no such batch {batch_id}")

    def described(self, batch: _Batch, host: str) -> dict[str, Any]:
        ended = batch.looks_left <= 0
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        if ended:
            for outcome in batch.outcomes:
                counts[outcome] += 1
        else:
            counts["processing"] = len(batch.requests)
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": "ended" if ended else "in_progress",
            "request_counts": counts,
            "created_at": batch.created.isoformat(),
            "expires_at": (batch.created + timedelta(days=1)).isoformat(),
            "ended_at": datetime.now(UTC).isoformat() if ended else None,
            "cancel_initiated_at": None,
            "archived_at": None,
            "results_url": f"{host}/v1/messages/batches/{batch.id}/results" if ended else None,
        }

    def results(self, batch: _Batch, *, backwards: bool = False) -> Iterator[bytes]:
        places = range(len(batch.requests))
        for place in reversed(places) if backwards else places:
            request, outcome = batch.requests[place], batch.outcomes[place]
            result: dict[str, Any] = {"type": outcome}
            if outcome == "succeeded":
                result["message"] = message_for(self.api.answer, request["params"], batch.faults[place])
            elif outcome == "errored":
                message = batch.problems.get(place, "broken on command")
                error = {
                    "type": "invalid_request_error" if place in batch.problems else "api_error",
                    "message": message,
                }
                result["error"] = {"type": "error", "error": error}
            row = {"custom_id": request["custom_id"], "result": result}
            yield json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def serve_batches_create(handler: _Handler, store: BatchStore, body: dict[str, Any]) -> None:
    fault = store.api.take_fault("batches create")
    if fault is not None and handler.before(fault):
        return
    batch = store.add(body, handler.headers["anthropic-version"])
    store.api.on_event("accepted")
    if fault is not None and fault.kind == "stall":
        time.sleep(fault.seconds)
    if fault is not None and fault.kind == "drop after":
        handler.hang_up()
        return
    store.api.on_event("answering")
    handler.json(200, store.described(batch, store.api.url))
    store.api.on_event("answered")


def serve_batches_get(handler: _Handler, store: BatchStore) -> None:
    url = urlsplit(handler.path)
    parts = url.path.removeprefix("/v1/messages/batches").strip("/").split("/")
    if not url.path.startswith("/v1/messages/batches") or len(parts) > 2:
        raise RefusedError(404, "not_found_error", f"no such path {url.path}")
    store.api.on_event("arrived")
    if parts == [""]:
        _list(handler, store, {name: values[0] for name, values in parse_qs(url.query).items()})
    elif len(parts) == 1:
        _retrieve(handler, store, parts[0])
    elif parts[1] == "results":
        _results(handler, store, parts[0])
    store.api.on_event("answered")


def _list(handler: _Handler, store: BatchStore, query: dict[str, str]) -> None:
    fault = store.api.take_fault("batches list")
    if fault is not None and handler.before(fault):
        return
    newest_first = store.all[::-1]
    ids = [batch.id for batch in newest_first]
    start = ids.index(query["after_id"]) + 1 if "after_id" in query else 0
    limit = int(query.get("limit", 20))
    page = newest_first[start : start + limit]
    handler.json(
        200,
        {
            "data": [store.described(batch, store.api.url) for batch in page],
            "has_more": start + limit < len(ids),
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
        },
    )


def _retrieve(handler: _Handler, store: BatchStore, batch_id: str) -> None:
    batch = store.find(batch_id)
    fault = store.api.take_fault("batches retrieve")
    if fault is not None and handler.before(fault):
        return
    host = "http://localhost:1" if fault is not None and fault.kind == "elsewhere" else store.api.url
    described = store.described(batch, host)
    batch.looks_left -= 1
    handler.json(200, described)


def _results(handler: _Handler, store: BatchStore, batch_id: str) -> None:
    batch = store.find(batch_id)
    fault = store.api.take_fault("batches results")
    if fault is not None and handler.before(fault):
        return
    kind = fault.kind if fault is not None else None
    if kind == "drop after":
        handler.hang_up()
        return
    half = len(batch.requests) // 2
    handler.begin_chunks("application/binary")
    buffer = b""
    for number, line in enumerate(store.results(batch, backwards=kind == "reorder")):
        if number == half:
            store.api.on_event("half answered")
            if kind in ("cut at line", "cut in line", "cut short"):
                buffer += b"" if kind == "cut at line" else line[: len(line) // 2]
                break
        buffer += line * 2 if kind == "twice" else line
        if len(buffer) > _CHUNK:
            handler.chunk(buffer)
            buffer = b""
    if buffer:
        handler.chunk(buffer)
    if kind == "cut short":
        handler.hang_up()
    else:
        handler.chunk(b"")
