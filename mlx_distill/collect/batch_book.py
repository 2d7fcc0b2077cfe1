"""What a ledger knows of batches: what was intended, what was handed over, and what came back.

A batch is intended before it is created: its requests, the hash of its body and the newest batch that the provider
had then are on the disk first. So whatever happens to the process or the network, it is known which requests may be
under way, and what to look for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from mlx_distill.ledger import UNSENT, Ledger, State
from mlx_distill.pricing import PRICES_DATED, Price
from mlx_distill.teachers.batches import BatchResult, Outcome

#: "intended": the provider may have it. "submitted": the provider has it. The others are done with: all results
#: read, not accepted, or given up by the user.
BatchState = Literal["intended", "submitted", "read", "refused", "given up"]


@dataclass(frozen=True)
class OpenBatch:
    """A batch that the provider has, or may have.

    Attributes:
        number: In the ledger.
        newest: The provider's newest batch when this was intended.
        provider_id: None while it is not known whether the provider has it.
        adopted: The id was found in the provider's list, not told when it was created.
        not_ours: Ids that turned out to be other batches.
    """

    number: int
    state: BatchState
    requests: int
    newest: str | None
    provider_id: str | None
    adopted: bool
    not_ours: tuple[str, ...]
    intended_at: datetime


class BatchBook:
    """The batches of a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def open(self, teacher: str) -> list[OpenBatch]:
        """Batches of a teacher, named by its spec, that are not done with, in the order they were intended."""
        rows = self._ledger.db.execute(
            "SELECT * FROM batches WHERE teacher = ? AND state IN ('intended', 'submitted') ORDER BY id", (teacher,)
        ).fetchall()
        return [
            OpenBatch(
                number=row["id"],
                state=row["state"],
                requests=row["requests"],
                newest=row["newest"],
                provider_id=row["provider_id"],
                adopted=bool(row["adopted"]),
                not_ours=tuple(json.loads(row["not_ours"])),
                intended_at=datetime.fromisoformat(row["intended_at"]),
            )
            for row in rows
        ]

    def provider_ids(self) -> set[str]:
        """Ids of all batches that are known to be of this ledger."""
        rows = self._ledger.db.execute("SELECT provider_id FROM batches WHERE provider_id IS NOT NULL").fetchall()
        return {row["provider_id"] for row in rows}

    def intend(
        self,
        teacher: str,
        members: Sequence[tuple[str, float | None]],
        *,
        size: int,
        sha256: str,
        newest: str | None,
    ) -> int:
        """Note that a batch is about to be created, and mark its requests as sent.

        Args:
            members: Key of each request, and the most that it can cost.
            size: Of the body, in bytes.
            sha256: Of the body.

        Returns:
            Its number.

        Raises:
            ValueError: A request is not to be sent.
        """
        now = _now()
        states = ", ".join(f"'{state}'" for state in UNSENT)
        with self._ledger.transaction():
            number = self._ledger.db.execute(
                """
                INSERT INTO batches (teacher, state, requests, bytes, sha256, newest, intended_at)
                VALUES (?, 'intended', ?, ?, ?, ?, ?)
                """,
                (teacher, len(members), size, sha256, newest, now),
            ).lastrowid
            assert number is not None
            self._ledger.db.executemany(
                "INSERT INTO batch_members (batch, key) VALUES (?, ?)", ((number, key) for key, _ in members)
            )
            done = self._ledger.db.executemany(
                f"""
                UPDATE requests SET cut = cut + (state = 'sent'),
                    cut_usd = cut_usd + CASE WHEN state = 'sent' THEN ifnull(worst_usd, 0) ELSE 0 END,
                    state = 'sent', attempts = attempts + 1, sent_at = ?, worst_usd = ?, batch = ?
                WHERE key = ? AND state IN ({states}) AND NOT (state = 'sent' AND batch IS NOT NULL)
                """,
                ((now, worst, number, key) for key, worst in members),
            )
            if done.rowcount != len(members):
                raise ValueError(f"{len(members) - done.rowcount} requests of a batch are not to be sent")
        return number

    def submitted(self, number: int, provider_id: str, *, adopted: bool = False) -> None:
        """Note which batch of the provider this is."""
        self._ledger.db.execute(
            "UPDATE batches SET state = 'submitted', provider_id = ?, adopted = ?, submitted_at = ? WHERE id = ?",
            (provider_id, adopted, _now(), number),
        )

    def disown(self, batch: OpenBatch) -> None:
        """Note that an adopted batch turned out to be another: this one is to be looked for again."""
        assert batch.provider_id is not None
        self._ledger.db.execute(
            """
            UPDATE batches SET state = 'intended', provider_id = NULL, adopted = 0, not_ours = ? WHERE id = ?
            """,
            (json.dumps([*batch.not_ours, batch.provider_id]), batch.number),
        )

    def refused(self, number: int, error: str) -> None:
        """Note that the provider did not accept a batch: its requests failed, and nothing is billed."""
        self._close(number, "refused", error, "failed", cut=0)

    def give_up(self, number: int, *, send_again: bool) -> None:
        """Note that a batch brings nothing any more, although it may have been billed.

        Args:
            send_again: Its requests are to be sent anew, and have not failed.
        """
        error = "its batch was given up"
        self._close(number, "given up", error, "planned" if send_again else "failed", cut=1)

    def _close(self, number: int, state: BatchState, error: str, left: State, *, cut: int) -> None:
        with self._ledger.transaction():
            self._ledger.db.execute(
                "UPDATE batches SET state = ?, error = ?, done_at = ? WHERE id = ?", (state, error, _now(), number)
            )
            self._ledger.db.execute(
                """
                UPDATE requests SET state = ?, error = ?, done_at = ?, cut = cut + ?,
                    cut_usd = cut_usd + ? * ifnull(worst_usd, 0)
                WHERE batch = ? AND state = 'sent'
                """,
                (left, error, _now(), cut, cut, number),
            )

    def foreign(self, number: int, keys: Iterable[str]) -> list[str]:
        """Those of the keys that are not of this batch."""
        found = []
        for key in keys:
            row = self._ledger.db.execute("SELECT 1 FROM batch_members WHERE batch = ? AND key = ?", (number, key))
            if row.fetchone() is None:
                found.append(key)
        return found

    def record(self, number: int, results: Sequence[BatchResult], price: Price | None) -> None:
        """Keep results; those that are kept already are passed over, so that a list can be read again."""
        db = self._ledger.db
        with self._ledger.transaction():
            for result in results:
                new = db.execute(
                    "UPDATE batch_members SET outcome = ? WHERE batch = ? AND key = ? AND outcome IS NULL",
                    (result.outcome, number, result.key),
                )
                if new.rowcount == 0:
                    continue
                if result.reply is None:
                    self._ledger.record_failure(result.key, result.error or result.outcome)
                    continue
                cost = None if price is None else price.cost(result.reply.usage, batch=True)
                self._ledger.record_reply(
                    result.key, result.reply, cost_usd=cost, prices_dated=PRICES_DATED if cost else None
                )

    def counts(self, number: int) -> dict[Outcome, int]:
        """How many results of a batch are kept, by outcome."""
        rows = self._ledger.db.execute(
            "SELECT outcome, count(*) AS n FROM batch_members WHERE batch = ? AND outcome IS NOT NULL GROUP BY outcome",
            (number,),
        ).fetchall()
        return {row["outcome"]: row["n"] for row in rows}

    def read(self, number: int) -> None:
        """Note that all results of a batch are kept."""
        self._ledger.db.execute("UPDATE batches SET state = 'read', done_at = ? WHERE id = ?", (_now(), number))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
