"""A Hub on loopback: as much of its HTTP interface as a download needs, and faults on command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from tests.servers.serving import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer:
    """What the server has, how it misbehaves, and what it was asked.

    Attributes:
        repos: Files by repository id.
        fault: (status, X-Error-Code) of every answer about a model; None for none.
        cut: Files of which only this many bytes are sent before the connection breaks.
        fetched: Names of the files whose content was asked for.
    """

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    fault: tuple[int, str] | None = None
    cut: dict[str, int] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a Hub until the context ends."""
    hub = HubServer()
    with serving(_Handler, hub) as hub.url:
        yield hub


class _Handler(BaseHTTPRequestHandler):
    state: HubServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = urlsplit(self.path).path
        if self.state.fault is not None:
            status, code = self.state.fault
            self._send(status, b"{}", {"X-Error-Code": code} if code else {}, body=body)
            return
        for repo_id, files in self.state.repos.items():
            api = f"/api/models/{repo_id}"
            if path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/main"):
                siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                self._json({"_id": "1", "id": repo_id, "sha": COMMIT, "siblings": siblings}, body=body)
                return
            if path.startswith(f"{api}/revision/"):
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)
                return
            if path == f"{api}/tree/{COMMIT}":
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                self._json(tree, body=body)
                return
            name = path.removeprefix(f"/{repo_id}/resolve/{COMMIT}/")
            if name in files:
                self._file(name, files[name], body=body)
                return
        self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"} if "/api/models/" in path else {}, body=body)

    def _file(self, name: str, data: bytes, *, body: bool) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status = 200
        begin = 0
        if (asked := self.headers.get("Range")) is not None:
            begin = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            status = 206
        if body:
            self.state.fetched.append(name)
        self._send(status, data[begin:], headers, body=body, stop_after=self.state.cut.get(name))

    def _json(self, value: Any, *, body: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body=body)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], *, body: bool, stop_after: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:stop_after])
            if stop_after is not None:
                self.wfile.flush()
                self.close_connection = True
