"""A strict Hub on loopback that takes uploads, keeps their history, and fails on command.

It knows what huggingface_hub needs: repositories, the two ways of a file (in the commit, or by LFS before it), commits,
and downloads of any revision. It refuses what the real one refuses: writes without the right token, a commit that names
an object that never arrived, an object whose hash is another.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.servers.serving import serving

TOKEN = "hf_" + "Qx7Lm2Vt9Kd4Rw8Zp3Nc6Jb1Yh5Gs0Ae"[:34]
OWNER = "someone"

#: Files that go by LFS: what the real one's `.gitattributes` says of them.
_LFS = re.compile(r"\.(safetensors|png|bin|gguf)$")


@dataclass
class Fault:
    """What to do to requests instead of answering them.

    Attributes:
        method: Of the requests.
        path: A pattern that their path holds.
        status: To answer with; 0 closes the connection.
        times: How many requests are treated so.
        read: Bytes of the body that are read before the connection is closed.
    """

    method: str
    path: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error":"broken on command"}'
    read: int | None = None


@dataclass
class Repository:
    """A repository: its commits, each with all files."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        """Of the newest commit."""
        return self.commits[-1][1]

    def commit(self, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{message}{sorted(files)}".encode()).hexdigest()
        self.commits.append((sha, files))
        self.messages.append(message)
        return sha


@dataclass
class HubApi:
    """What the server holds, what it was asked, and how it misbehaves.

    Attributes:
        objects: LFS content by its SHA-256, whether a commit names it or not.
        requests: Method and path of each request, in order.
        received: Name (or hash) of each file whose content came, with its size.
        tokens: The tokens that may write; any other is not known.
    """

    url: str = ""
    repos: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    received: list[tuple[str, int]] = field(default_factory=list)
    extra_names: list[str] = field(default_factory=list)
    #: Answers about content of these names are of other bytes than the listing says.
    replaced: dict[str, bytes] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, repo: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """Make a repository, or a commit in it, as another would; returns the commit."""
        found = self.repos.setdefault(repo, Repository(private))
        return found.commit(dict(files), "by hand")

    def asked(self, method: str, pattern: str) -> int:
        """How many requests there were."""
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.requests)


@contextmanager
def hub_api() -> Iterator[HubApi]:
    """Run a Hub until the context ends."""
    hub = HubApi()
    with serving(_Handler, hub) as hub.url:
        yield hub


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    state: HubApi

    def do_HEAD(self) -> None:
        self._handle("HEAD")

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.state.lock:
            self.state.requests.append((method, path))
            fault = next(
                (f for f in self.state.faults if f.method == method and re.search(f.path, path) and f.times > 0), None
            )
            if fault is not None:
                fault.times -= 1
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None:
            self.rfile.read(length if fault.read is None else min(fault.read, length))
            if fault.status == 0:
                self.close_connection = True
                self.connection.close()
            else:
                self._send(fault.status, fault.body, fault.headers)
            return
        body = self.rfile.read(length)
        with self.state.lock:
            self._route(method, path, body)

    def _route(self, method: str, path: str, body: bytes) -> None:
        writes = method in ("POST", "PUT") and not path.startswith("/lfs/")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if writes and token != TOKEN:
            self._send(401, b'{"error":"Invalid credentials in Authorization header"}')
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.startswith("/lfs/"):
            self._take(path.removeprefix("/lfs/"), body)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|preupload|commit|tree)/(.+))?", path):
            self._about(match[1], match[2], match[3], token, body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3])
        else:
            self._send(404, b"{}")

    def _validate(self, content: str) -> None:
        if content.startswith("---\n") and "\n---\n" in content[4:]:
            self._json({"warnings": []})
        else:
            self._json({"errors": [{"message": "no metadata"}], "warnings": []}, 400)

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != OWNER:
            self._json({"error": f"You don't have the rights to create a model under {asked['organization']}"}, 403)
        elif repo in self.state.repos:
            self._json({"error": "exists", "url": f"{self.state.url}/{repo}"}, 409)
        else:
            made = Repository(private=asked.get("visibility") == "private")
            made.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self.state.repos[repo] = made
            self._json({"url": f"{self.state.url}/{repo}"})

    def _about(self, repo: str, what: str | None, revision: str | None, token: str, body: bytes) -> None:
        found = self.state.repos.get(repo)
        if found is None or (found.private and token != TOKEN):
            self._send(404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return
        at = next((c for c in found.commits if revision in (None, "main", c[0])), None)
        at = found.commits[-1] if revision in (None, "main") else at
        if at is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif what == "preupload":
            self._preupload(found, json.loads(body))
        elif what == "commit":
            self._commit(repo, found, body)
        elif what == "tree":
            self._json([{"type": "file", "path": n, "size": len(d), "oid": _blob(d)} for n, d in at[1].items()])
        else:
            sha, files = at
            names = [*({"rfilename": name, **_facts(name, data)} for name, data in files.items())]
            names += [{"rfilename": name, "size": 1} for name in self.state.extra_names]
            self._json({"_id": "1", "id": repo, "sha": sha, "private": found.private, "siblings": names})

    def _preupload(self, repo: Repository, asked: dict[str, Any]) -> None:
        answers = []
        for file in asked["files"]:
            mode = "lfs" if _LFS.search(file["path"]) or file["size"] > 10_000_000 else "regular"
            there = repo.files.get(file["path"])
            oid = None if there is None else _sha256(there) if mode == "lfs" else _blob(there)
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def _batch(self, asked: dict[str, Any]) -> None:
        answers = []
        for found in asked["objects"]:
            answer = {"oid": found["oid"], "size": found["size"]}
            if found["oid"] not in self.state.objects:
                answer["actions"] = {"upload": {"href": f"{self.state.url}/lfs/{found['oid']}"}}
            answers.append(answer)
        self._json({"transfer": "basic", "objects": answers})

    def _take(self, oid: str, body: bytes) -> None:
        if _sha256(body) != oid:
            self._json({"error": "another hash"}, 400)
            return
        self.state.objects[oid] = body
        self.state.received.append((oid, len(body)))
        self._send(200, b"")

    def _commit(self, name: str, repo: Repository, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repo.files)
        message = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                self.state.received.append((value["path"], len(files[value["path"]])))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.state.objects:
                    self._json({"error": f"lfs object {value['oid']} is missing"}, 400)
                    return
                files[value["path"]] = self.state.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, message)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.state.url}/{name}/commit/{sha}"})

    def _file(self, repo: str, revision: str, name: str) -> None:
        found = self.state.repos.get(repo)
        at = next((files for sha, files in found.commits if sha == revision), None) if found else None
        if at is None or name not in at:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        data = self.state.replaced.get(name, at[name])
        headers = {"ETag": f'"{_sha256(data)}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        begin, status = 0, 200
        if (asked := self.headers.get("Range")) is not None:
            begin, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self._send(status, data[begin:], headers)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _facts(name: str, data: bytes) -> dict[str, Any]:
    facts: dict[str, Any] = {"size": len(data), "blobId": _blob(data)}
    if _LFS.search(name):
        facts["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 130}
    return facts
