"""The ledger: every request of a collection, its state and its reply, in one SQLite file.

A request is identified by `Request.key`, a hash of all that decides its answer. It is planned, sent, and then
answered, refused, truncated or failed; the first three are final, so a reply is never asked for, or paid for,
again. A request found "sent" was under way when its process died; it and a failed one may be sent again.

Every change is committed when the method returns. The file is in WAL mode with `synchronous=FULL`, and on macOS
`fullfsync` makes that reach the disk and not only its cache. One process writes at a time: the caller holds
`layout.lock` on the folder.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, get_args

from mlx_distill.errors import FolderError, InputError, MlxDistillError, ResourceError
from mlx_distill.records import Reply, Request, StopReason, Usage

State = Literal["planned", "sent", "answered", "refused", "truncated", "failed"]

#: States that a request leaves only by being sent (again).
UNSENT: tuple[State, ...] = ("planned", "sent", "failed")

#: "mlxd": says that a SQLite file is a ledger of ours.
_APPLICATION_ID = 0x6D6C7864

#: Statements that bring the schema from version N to N + 1, in order. Old entries are never edited.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE requests (
            key           TEXT PRIMARY KEY,
            prompt_id     TEXT NOT NULL,
            family        TEXT NOT NULL,
            teacher       TEXT NOT NULL,
            system        TEXT,
            messages      TEXT NOT NULL,
            max_tokens    INTEGER NOT NULL,
            state         TEXT NOT NULL DEFAULT 'planned'
                          CHECK (state IN ('planned', 'sent', 'answered', 'refused', 'truncated', 'failed')),
            text          TEXT,
            stop          TEXT,
            stop_reason   TEXT,
            model         TEXT,
            input_tokens  INTEGER,
            output_tokens INTEGER,
            seconds       REAL,
            cost_usd      REAL,
            prices_dated  TEXT,
            attempts      INTEGER NOT NULL DEFAULT 0,
            error         TEXT,
            planned_at    TEXT NOT NULL,
            sent_at       TEXT,
            done_at       TEXT
        )
        """,
        "CREATE INDEX requests_by_state ON requests (state)",
    ),
)

#: Keys looked up in one statement; SQLite allows 999 variables at the least.
_CHUNK = 500


@dataclass(frozen=True)
class Entry:
    """One request as the ledger knows it.

    Attributes:
        reply: What came back; None while planned, sent or failed.
        cost_usd: Cost of the reply at the prices of `prices_dated`; None where the price is not known.
        attempts: How often it was sent.
        error: Why it failed the last time.
        planned_at: When, in UTC, as ISO 8601; so are `sent_at` and `done_at`.
    """

    request: Request
    state: State
    reply: Reply | None
    cost_usd: float | None
    prices_dated: str | None
    attempts: int
    error: str | None
    planned_at: str
    sent_at: str | None
    done_at: str | None


class Ledger:
    """Opens, and where there is none makes, the ledger at a path.

    Raises:
        InputError: The file is not a ledger, is damaged, or is of a newer version of the program.
        FolderError: It cannot be opened.
        ResourceError: The disk is full (from any method).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._translated():
            self._db = sqlite3.connect(path, isolation_level=None)
        try:
            self._db.row_factory = sqlite3.Row
            with self._translated():
                self._prepare()
        except MlxDistillError:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. The ledger cannot be used after that."""
        self._db.close()

    def plan(self, requests: Iterable[Request]) -> int:
        """Enter requests that are not there yet.

        A known request keeps its state and reply, and takes over the prompt id and family it has now.

        Returns:
            How many were new.
        """
        now = _now()
        with self._transaction():
            before = self._count()
            self._db.executemany(
                """
                INSERT INTO requests (key, prompt_id, family, teacher, system, messages, max_tokens, planned_at)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?)
                ON CONFLICT (key) DO UPDATE SET prompt_id = excluded.prompt_id, family = excluded.family
                WHERE prompt_id != excluded.prompt_id OR family != excluded.family
                """,
                (
                    (
                        request.key,
                        request.prompt_id,
                        request.family,
                        request.teacher,
                        request.system,
                        json.dumps([m.model_dump(exclude_none=True) for m in request.messages], ensure_ascii=False),
                        request.max_tokens,
                        now,
                    )
                    for request in requests
                ),
            )
            return self._count() - before

    def mark_sent(self, key: str) -> None:
        """Note, before a request leaves, that it does.

        Raises:
            ValueError: It is not planned, or has its reply already.
        """
        self._change(
            key,
            UNSENT,
            "UPDATE requests SET state = 'sent', attempts = attempts + 1, sent_at = ?",
            (_now(),),
        )

    def record_reply(
        self, key: str, reply: Reply, *, cost_usd: float | None = None, prices_dated: str | None = None
    ) -> State:
        """Keep the reply to a request that was sent.

        Returns:
            The state that follows from why the teacher stopped.

        Raises:
            ValueError: It was not sent, or has its reply already.
        """
        state = state_of(reply.stop)
        self._change(
            key,
            ("sent",),
            """
            UPDATE requests SET state = ?, text = ?, stop = ?, stop_reason = ?, model = ?, input_tokens = ?,
                output_tokens = ?, seconds = ?, cost_usd = ?, prices_dated = ?, error = NULL, done_at = ?
            """,
            (
                state,
                reply.text,
                reply.stop,
                reply.stop_reason,
                reply.model,
                reply.usage.input_tokens,
                reply.usage.output_tokens,
                reply.seconds,
                cost_usd,
                prices_dated,
                _now(),
            ),
        )
        return state

    def record_failure(self, key: str, error: str) -> None:
        """Note why a request that was sent has no reply.

        Raises:
            ValueError: It was not sent, or has its reply already.
        """
        self._change(key, ("sent",), "UPDATE requests SET state = 'failed', error = ?, done_at = ?", (error, _now()))

    def entry(self, key: str) -> Entry | None:
        """The request with this key."""
        return next(self.entries([key]), None)

    def entries(self, keys: Iterable[str] | None = None) -> Iterator[Entry]:
        """Requests, in the order of the keys given, or all in the order they were planned.

        Few are held in memory at a time. Keys that are not in the ledger are passed over.
        """
        if keys is None:
            with self._translated():
                keys = [row["key"] for row in self._db.execute("SELECT key FROM requests ORDER BY rowid")]
        for chunk in _chunks(keys):
            with self._translated():
                found = self._db.execute(
                    f"SELECT * FROM requests WHERE key IN ({_holes(chunk)})",
                    chunk,
                ).fetchall()
                rows = {row["key"]: row for row in found}
            for key in chunk:
                if key in rows:
                    yield _entry(rows[key])

    def unsent(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys, in their order, that are still to be sent, or to be sent again."""
        return [key for key in keys if self.state(key) in UNSENT]

    def state(self, key: str) -> State | None:
        """The state of the request with this key."""
        with self._translated():
            row = self._db.execute("SELECT state FROM requests WHERE key = ?", (key,)).fetchone()
        return row["state"] if row else None

    def counts(self, keys: Iterable[str] | None = None) -> dict[State, int]:
        """How many requests, of these or of all, are in each state."""
        totals: dict[State, int] = dict.fromkeys(get_args(State), 0)
        with self._translated():
            if keys is None:
                found = self._db.execute("SELECT state, count(*) AS n FROM requests GROUP BY state").fetchall()
                return totals | {row["state"]: row["n"] for row in found}
        for key in keys:
            if state := self.state(key):
                totals[state] += 1
        return totals

    def _prepare(self) -> None:
        version = self._pragma("user_version")
        ours = self._pragma("application_id") == _APPLICATION_ID
        empty = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if not ours and not (version == 0 and empty):
            raise InputError("is a database, but not a ledger.", path=self.path, hint="Choose another --out folder.")
        if version > len(_MIGRATIONS):
            raise InputError(
                f"was written by a newer mlx-distill (schema {version}; this one knows {len(_MIGRATIONS)}).",
                path=self.path,
                hint="Update:  pip install --upgrade mlx-distill",
            )
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        # macOS: fsync alone leaves data in the drive's cache. Elsewhere these two do nothing.
        self._db.execute("PRAGMA fullfsync = ON")
        self._db.execute("PRAGMA checkpoint_fullfsync = ON")
        self._db.execute("PRAGMA busy_timeout = 5000")
        for number, statements in enumerate(_MIGRATIONS[version:], start=version + 1):
            with self._transaction():
                for statement in statements:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {number}")

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    def _count(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM requests").fetchone()[0])

    def _change(self, key: str, states: tuple[State, ...], statement: str, values: tuple[object, ...]) -> None:
        with self._transaction():
            done = self._db.execute(
                f"{statement} WHERE key = ? AND state IN ({_holes(states)})",
                (*values, key, *states),
            )
        if done.rowcount != 1:
            raise ValueError(f"request {key} is {self.state(key) or 'not planned'}, not {' or '.join(states)}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._translated():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError):
            raise
        except sqlite3.DatabaseError as error:
            raise _translate(error, self.path) from error


def state_of(stop: StopReason) -> State:
    """The state of a request whose reply stopped for this reason."""
    return "answered" if stop == "end" else "refused" if stop == "refusal" else "truncated"


def _entry(row: sqlite3.Row) -> Entry:
    request = Request(
        prompt_id=row["prompt_id"],
        family=row["family"],
        teacher=row["teacher"],
        messages=json.loads(row["messages"]),
        system=row["system"],
        max_tokens=row["max_tokens"],
    )
    reply = None
    if row["stop"] is not None:
        reply = Reply(
            text=row["text"],
            stop=row["stop"],
            stop_reason=row["stop_reason"],
            usage=Usage(input_tokens=row["input_tokens"], output_tokens=row["output_tokens"]),
            model=row["model"],
            seconds=row["seconds"],
        )
    same = ("state", "cost_usd", "prices_dated", "attempts", "error", "planned_at", "sent_at", "done_at")
    return Entry(request=request, reply=reply, **{name: row[name] for name in same})


def _translate(error: sqlite3.DatabaseError, path: Path) -> MlxDistillError:
    code = getattr(error, "sqlite_errorname", "")
    if code in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
        return InputError(
            f"is not a ledger, or is damaged: {error}.",
            path=path,
            hint="Keep the file, and collect into another --out folder.",
        )
    if code == "SQLITE_FULL" or code.startswith("SQLITE_IOERR"):
        return ResourceError(
            f"{path} could not be written: {error}.",
            hint="Free some space and give the same command again; what was committed is kept.",
        )
    return FolderError(f"{path} could not be used: {error}.", hint="Check its permissions and who else uses it.")


def _chunks(keys: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for key in keys:
        chunk.append(key)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _holes(values: Iterable[str]) -> str:
    return ", ".join("?" for _ in values)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
