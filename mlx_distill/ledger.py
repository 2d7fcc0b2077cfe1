"""The ledger: every request of a collection, its state and its reply, in one SQLite file.

A request is identified by `Request.key`, a hash of all that decides its answer. It is planned, sent, and then
answered, refused, truncated or failed; the first three are final, so a reply is never asked for, or paid for,
again. A request found "sent" was under way when its process died; it and a failed one may be sent again.

Where the process or the network died before the fate of a sending was known, it may have been billed. Such
sendings are counted (`Entry.cut`), with the most they can have cost, and never silently forgotten.

Every change is committed when the method returns; several made in one `transaction` are committed together at its
end. The file is in WAL mode with `synchronous=FULL`, and on macOS `fullfsync` makes that reach the disk and not only
its cache. One process writes at a time: the caller holds `layout.lock` on the folder.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

from mlx_distill.ledger_records import UNSENT, Entry, Spending, Standing, State, state_of
from mlx_distill.ledger_schema import connect, translate
from mlx_distill.records import Reply, Request, Usage

__all__ = ["UNSENT", "Entry", "Ledger", "Spending", "Standing", "State"]

#: Columns that an entry takes over as they are.
_SAME = (
    *("state", "cost_usd", "prices_dated", "attempts", "cut", "cut_usd", "batch", "error"),
    *("planned_at", "sent_at", "done_at"),
)

#: Keys looked up in one statement; SQLite allows 999 variables at the least.
_CHUNK = 500


class Ledger:
    """Opens, and where there is none makes, the ledger at a path.

    Raises:
        InputError: The file is not a ledger, is damaged, or is of a newer version of the program.
        FolderError: It cannot be opened.
        ResourceError: The disk is full (from any method).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.db = connect(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. The ledger cannot be used after that."""
        self.db.close()

    def plan(self, requests: Iterable[Request]) -> int:
        """Enter requests that are not there yet.

        A known request keeps its state and reply, and takes over the prompt id and family it has now.

        Returns:
            How many were new.
        """
        now = _now()
        with self.transaction():
            before = self._count()
            self.db.executemany(
                """
                INSERT INTO requests
                    (key, prompt_id, family, teacher, system, messages, max_tokens, sample, temperature, planned_at)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
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
                        request.sample,
                        request.temperature,
                        now,
                    )
                    for request in requests
                ),
            )
            return self._count() - before

    def mark_sent(self, key: str, *, worst_usd: float | None = None) -> None:
        """Note, before a request leaves alone, that it does.

        One that is "sent" already was under way when its process died: that sending is counted as cut off.

        Args:
            worst_usd: The most that this sending can cost; None where the price is not known.

        Raises:
            ValueError: It is not planned, has its reply already, or is under way in a batch.
        """
        self._change(
            key,
            UNSENT,
            """
            UPDATE requests SET cut = cut + (state = 'sent'),
                cut_usd = cut_usd + CASE WHEN state = 'sent' THEN ifnull(worst_usd, 0) ELSE 0 END,
                state = 'sent', attempts = attempts + 1, sent_at = ?, worst_usd = ?, batch = NULL
            """,
            (_now(), worst_usd),
            unless="state = 'sent' AND batch IS NOT NULL",
        )

    def take_back(self, key: str) -> None:
        """Note that a request marked as sent did not leave after all.

        Raises:
            ValueError: It is not sent.
        """
        self._change(key, ("sent",), "UPDATE requests SET state = 'planned', attempts = attempts - 1", ())

    def record_reply(
        self,
        key: str,
        reply: Reply,
        *,
        cost_usd: float | None = None,
        prices_dated: str | None = None,
        cut: int = 0,
    ) -> State:
        """Keep the reply to a request that was sent.

        Args:
            cut: How many sendings before this reply were cut off, those told by `record_cut` left out.

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
            UPDATE requests SET state = ?, text = ?, stop = ?, stop_reason = ?, category = ?, model = ?,
                input_tokens = ?, output_tokens = ?, seconds = ?, cost_usd = ?, prices_dated = ?, error = NULL,
                done_at = ?, cut = cut + ?, cut_usd = cut_usd + ? * ifnull(worst_usd, 0)
            """,
            (
                state,
                reply.text,
                reply.stop,
                reply.stop_reason,
                reply.category,
                reply.model,
                reply.usage.input_tokens,
                reply.usage.output_tokens,
                reply.seconds,
                cost_usd,
                prices_dated,
                _now(),
                cut,
                cut,
            ),
        )
        return state

    def record_cut(self, key: str) -> None:
        """Note that a sending was cut off, and that the request is about to be sent once more as part of the same.

        Raises:
            ValueError: It is not sent.
        """
        self._change(key, ("sent",), "UPDATE requests SET cut = cut + 1, cut_usd = cut_usd + ifnull(worst_usd, 0)", ())

    def record_failure(self, key: str, error: str, *, cut: int = 0) -> None:
        """Note why a request that was sent has no reply.

        Args:
            cut: How many of its sendings were cut off, the last included, those told by `record_cut` left out.

        Raises:
            ValueError: It was not sent, or has its reply already.
        """
        self._change(
            key,
            ("sent",),
            """
            UPDATE requests SET state = 'failed', error = ?, done_at = ?, cut = cut + ?,
                cut_usd = cut_usd + ? * ifnull(worst_usd, 0)
            """,
            (error, _now(), cut, cut),
        )

    def spending(self) -> Spending:
        """What all requests of the ledger came to, of this collection and of earlier ones."""
        with self._translated():
            row = self.db.execute(
                """
                SELECT total(cost_usd), total(cut_usd), total(CASE WHEN state = 'sent' THEN worst_usd END),
                    ifnull(sum(cut), 0) FROM requests
                """
            ).fetchone()
        return Spending(*row)

    def sample(self, teacher: str, limit: int = 2000) -> Iterator[Entry]:
        """The latest replies of a teacher, as `Request.teacher` names it; recent ones first."""
        with self._translated():
            rows = self.db.execute(
                "SELECT key FROM requests WHERE teacher = ? AND stop IS NOT NULL ORDER BY rowid DESC LIMIT ?",
                (teacher, limit),
            ).fetchall()
        return self.entries(row["key"] for row in rows)

    def entry(self, key: str) -> Entry | None:
        """The request with this key."""
        return next(self.entries([key]), None)

    def entries(self, keys: Iterable[str] | None = None) -> Iterator[Entry]:
        """Requests, in the order of the keys given, or all in the order they were planned.

        Few are held in memory at a time. Keys that are not in the ledger are passed over.
        """
        if keys is None:
            with self._translated():
                keys = [row["key"] for row in self.db.execute("SELECT key FROM requests ORDER BY rowid")]
        for chunk in _chunks(keys):
            with self._translated():
                found = self.db.execute(
                    f"SELECT * FROM requests WHERE key IN ({_holes(chunk)})",
                    chunk,
                ).fetchall()
                rows = {row["key"]: row for row in found}
            for key in chunk:
                if key in rows:
                    yield _entry(rows[key])

    def unsent(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys, in their order, that are to be sent, or sent again; what a batch holds is not."""
        return [key for key, standing in self.standings(keys) if standing is not None and standing.to_send]

    def standings(self, keys: Iterable[str]) -> Iterator[tuple[str, Standing | None]]:
        """Each key with where its request stands; None where there is none."""
        for chunk in _chunks(keys):
            with self._translated():
                found = self.db.execute(
                    f"SELECT key, state, stop, batch FROM requests WHERE key IN ({_holes(chunk)})", chunk
                ).fetchall()
            rows = {row["key"]: Standing(row["state"], row["stop"], row["batch"]) for row in found}
            yield from ((key, rows.get(key)) for key in chunk)

    def state(self, key: str) -> State | None:
        """The state of the request with this key."""
        ((_, standing),) = self.standings([key])
        return standing.state if standing else None

    def counts(self, keys: Iterable[str] | None = None) -> dict[State, int]:
        """How many requests, of these or of all, are in each state."""
        totals: dict[State, int] = dict.fromkeys(get_args(State), 0)
        with self._translated():
            if keys is None:
                found = self.db.execute("SELECT state, count(*) AS n FROM requests GROUP BY state").fetchall()
                return totals | {row["state"]: row["n"] for row in found}
        for _, standing in self.standings(keys):
            if standing is not None:
                totals[standing.state] += 1
        return totals

    def _count(self) -> int:
        return int(self.db.execute("SELECT count(*) FROM requests").fetchone()[0])

    def _change(
        self, key: str, states: tuple[State, ...], statement: str, values: tuple[object, ...], *, unless: str = "0"
    ) -> None:
        with self.transaction():
            done = self.db.execute(
                f"{statement} WHERE key = ? AND state IN ({_holes(states)}) AND NOT ({unless})",
                (*values, key, *states),
            )
            if done.rowcount != 1:
                raise ValueError(f"request {key} is {self.state(key) or 'not planned'}, not {' or '.join(states)}")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all changes made within at its end, or none; one inside another is part of it."""
        with self._translated():
            if self.db.in_transaction:
                yield
                return
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            finally:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError):
            raise
        except sqlite3.DatabaseError as error:
            raise translate(error, self.path) from error


def _entry(row: sqlite3.Row) -> Entry:
    request = Request(
        prompt_id=row["prompt_id"],
        family=row["family"],
        teacher=row["teacher"],
        messages=json.loads(row["messages"]),
        system=row["system"],
        max_tokens=row["max_tokens"],
        sample=row["sample"],
        temperature=row["temperature"],
    )
    reply = None
    if row["stop"] is not None:
        reply = Reply(
            text=row["text"],
            stop=row["stop"],
            stop_reason=row["stop_reason"],
            category=row["category"],
            usage=Usage(input_tokens=row["input_tokens"], output_tokens=row["output_tokens"]),
            model=row["model"],
            seconds=row["seconds"],
        )
    return Entry(request=request, reply=reply, **{name: row[name] for name in _SAME})


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
