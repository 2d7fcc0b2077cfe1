"""How many tokens and how much time an answered prompt took, averaged over what a folder holds.

Reads: a collection's ledger or manifest, or a comparison's ledger, answers and run.  Writes: nothing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from mlx_distill.errors import InputError
from mlx_distill.layout import ComparisonFolder, DataFolder, RunFolder, read_record, read_rows
from mlx_distill.ledger import Ledger
from mlx_distill.ledger_schema import translate
from mlx_distill.manifest import Manifest
from mlx_distill.pricing import Price
from mlx_distill.records import ComparisonRecord, Generation, Usage
from mlx_distill.run_records import RunRecord
from mlx_distill.verdicts import first_answers

_HINT = "Say how long they are:  --input-tokens N --output-tokens N"

#: Who counted the tokens, as the end of a sentence.
COUNTED = {
    "replies": "counted by the provider",
    "rows": "counted with the student's tokenizer",
    "shown": "counted in the comparison",
    "given": "given by hand",
}


@dataclass(frozen=True)
class Averages:
    """Tokens and time that an answered prompt takes, averaged.

    What was cut or refused on the way is paid for as well, so it is in the averages.

    Attributes:
        input_tokens: None where they were not counted.
        counted: What was counted: a teacher's replies, rows of a data set, answers of a comparison, or nothing.
        answers: Whole answers that these are the averages of; 0 where they were given by hand.
        teacher: Spec of whose answers they are, if known.
        replies: All that came back, cut and refused ones included; 0 where that is not known.
        cut: Replies that a limit cut off.
        refused: Replies that were refusals.
        repeated: Sendings beyond the first of a request, after a failure; None where it is not known.
        seconds: Wall time from sending to answer; None where it was not measured.
        under_way: Requests under way at once, on average while there was any.
    """

    input_tokens: float | None
    output_tokens: float
    counted: Literal["replies", "rows", "shown", "given"]
    answers: int = 0
    teacher: str | None = None
    replies: int = 0
    cut: int = 0
    refused: int = 0
    repeated: int | None = None
    seconds: float | None = None
    under_way: float | None = None

    @property
    def basis(self) -> str:
        """What they rest on, in a sentence."""
        into = "" if self.input_tokens is None else f"{self.input_tokens:,.0f} tokens in, "
        tokens = f"{into}{self.output_tokens:,.0f}{'' if into else ' tokens'} out a prompt"
        rest = "; the prompts' own tokens are not counted" if self.input_tokens is None else ""
        if not self.answers:
            return f"Given by hand: {tokens}{rest}."
        number = f"{self.answers:,} answer{'s' if self.answers > 1 else ''}"
        whose = f" of {self.teacher}" if self.teacher else ""
        return f"Measured: {tokens}, the average of {number}{whose}, {COUNTED[self.counted]}{rest}."

    def dollars(self, price: Price, prompts: int, *, batch: bool = False) -> float:
        """US dollars for `prompts` prompts of average length."""
        whole = Usage(
            input_tokens=round((self.input_tokens or 0) * prompts), output_tokens=round(self.output_tokens * prompts)
        )
        return price.cost(whole, batch=batch)

    def seconds_for(self, prompts: int, concurrency: int | None = None) -> float | None:
        """Wall time of so many prompts; None where no time was measured.

        Args:
            concurrency: Requests under way at once; None: as many as when it was measured, else one.
        """
        if self.seconds is None:
            return None
        return prompts * self.seconds / (concurrency or self.under_way or 1)


def measure_data(root: Path, teachers: Sequence[str] = ()) -> Averages:
    """Averages of a collection: of its ledger, or of its manifest where the ledger was left behind.

    Args:
        teachers: Specs of those to prefer, where a ledger holds answers of several.

    Raises:
        InputError: It holds no answers whose tokens were counted.
    """
    folder = DataFolder(root)
    if folder.ledger.exists():
        found = measure_ledger(folder.ledger, teachers)
    elif folder.manifest.exists():
        found = _of_manifest(read_record(folder.manifest, Manifest))
    else:
        raise InputError(
            "holds no collection: neither a ledger nor a manifest.", path=root, hint="Name a folder below data/."
        )
    if found is None:
        raise InputError("holds no whole answer whose tokens were counted.", path=root, hint=_HINT)
    return found


def measure_comparison(root: Path, teachers: Sequence[str] = ()) -> Averages:
    """Averages of a comparison: of its teacher's ledger, else of its run's data set, else of the answers shown.

    Args:
        teachers: As for `measure_data`.

    Raises:
        InputError: None of these counts tokens, or the folder is no comparison.
    """
    folder = ComparisonFolder(root)
    if not folder.generations.exists():
        raise InputError("holds no comparison.", path=root, hint="Name a folder below visuals/.")
    record = read_record(folder.record, ComparisonRecord) if folder.record.exists() else None
    found = measure_ledger(folder.teacher_ledger, teachers) if folder.teacher_ledger.exists() else None
    if found is None and record is not None and RunFolder(Path(record.run)).record.exists():
        found = averages_of_run(read_record(RunFolder(Path(record.run)).record, RunRecord))
    if found is None:
        found = averages_of_answers(read_rows(folder.generations, Generation), record)
    if found is None:
        raise InputError("holds no whole answer of a teacher whose tokens were counted.", path=root, hint=_HINT)
    return found


def measure_ledger(path: Path, teachers: Sequence[str] = ()) -> Averages | None:
    """Averages of one teacher's replies in a ledger; None where there is no whole answer that counts tokens.

    Of several teachers it is the first of `teachers` that has such an answer, else the one with the most.
    """
    with Ledger(path) as ledger:
        try:
            tallies = _tallies(ledger.db)
        except sqlite3.DatabaseError as error:
            raise translate(error, path) from error
    found = {spec: tally for spec, tally in tallies.items() if tally.answers}
    if not found:
        return None
    spec = next((spec for spec in teachers if spec in found), None) or max(found, key=lambda s: found[s].answers)
    return found[spec].averages(spec)


@dataclass
class _Tally:
    """Sums over the counted replies of one teacher; times over those that were sent alone."""

    answers: int = 0
    replies: int = 0
    cut: int = 0
    refused: int = 0
    repeated: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    alone: int = 0
    seconds: float = 0.0
    open_seconds: float = 0.0
    busy_seconds: float = 0.0
    busy_until: float = float("-inf")

    def count(self, row: sqlite3.Row) -> None:
        self.replies += 1
        self.answers += row["state"] == "answered"
        self.cut += row["state"] == "truncated"
        self.refused += row["state"] == "refused"
        self.repeated += max(0, row["attempts"] - 1)
        self.input_tokens += row["input_tokens"]
        self.output_tokens += row["output_tokens"]
        if row["batch"] is not None or not row["seconds"]:
            return
        self.alone += row["state"] == "answered"
        self.seconds += row["seconds"]
        if row["sent_at"] and row["done_at"]:
            self._under_way(*(datetime.fromisoformat(row[at]).timestamp() for at in ("sent_at", "done_at")))

    def _under_way(self, start: float, end: float) -> None:
        """Rows come in the order in which they were sent, so that what overlaps is counted once."""
        end = max(start, end)
        self.open_seconds += end - start
        self.busy_seconds += max(0.0, end - max(start, self.busy_until))
        self.busy_until = max(self.busy_until, end)

    def averages(self, spec: str) -> Averages:
        return Averages(
            input_tokens=self.input_tokens / self.answers,
            output_tokens=self.output_tokens / self.answers,
            counted="replies",
            answers=self.answers,
            teacher=spec,
            replies=self.replies,
            cut=self.cut,
            refused=self.refused,
            repeated=self.repeated,
            seconds=self.seconds / self.alone if self.alone else None,
            under_way=self.open_seconds / self.busy_seconds if self.busy_seconds else None,
        )


def _tallies(db: sqlite3.Connection) -> dict[str, _Tally]:
    """By spec. Row by row, since a ledger may hold millions."""
    tallies: dict[str, _Tally] = {}
    found = db.execute(
        """
        SELECT teacher, state, attempts, batch, ifnull(input_tokens, 0) AS input_tokens,
            ifnull(output_tokens, 0) AS output_tokens, seconds, sent_at, done_at
        FROM requests WHERE stop IS NOT NULL AND ifnull(output_tokens, 0) + ifnull(input_tokens, 0) > 0
        ORDER BY sent_at
        """
    )
    with closing(found):
        for row in found:
            # A teacher whose answers can change is named with its revision.
            tallies.setdefault(row["teacher"].rpartition("@")[0] or row["teacher"], _Tally()).count(row)
    return tallies


def _of_manifest(manifest: Manifest) -> Averages | None:
    n = manifest.answered
    if not n or not manifest.usage.output_tokens:
        return None
    refused = sum(manifest.refusals.values())
    cut = manifest.asked_again + sum(drop.count for drop in manifest.dropped if drop.reason == "truncated")
    # Of answers by way of batches the time is not known, and they are in its sum.
    timed = manifest.collection_seconds and not manifest.batch_answers
    return Averages(
        input_tokens=manifest.usage.input_tokens / n,
        output_tokens=manifest.usage.output_tokens / n,
        counted="replies",
        answers=n,
        teacher=manifest.teacher,
        replies=n + cut + refused,
        cut=cut,
        refused=refused,
        seconds=manifest.collection_seconds / n if timed else None,
    )


def averages_of_run(run: RunRecord) -> Averages | None:
    """Of the data set that a run learned from; None where its tokens were not counted."""
    if run.manifest is not None and (found := _of_manifest(run.manifest)) is not None:
        return found
    rows = sum(split.rows for split in run.splits.values())
    targets = sum(split.target_tokens for split in run.splits.values())
    if not rows or not targets:
        return None
    prompts = sum(split.tokens for split in run.splits.values()) - targets
    teacher = run.manifest.teacher if run.manifest else None
    return Averages(prompts / rows, targets / rows, "rows", answers=rows, teacher=teacher)


def averages_of_answers(rows: Iterable[Generation], record: ComparisonRecord | None) -> Averages | None:
    """Of what a comparison shows of its teacher: how long its answers are, not what it was asked."""
    shown = [row for row in first_answers(rows).values() if row.contender == "teacher" and row.output_tokens]
    whole = sum(row.finished for row in shown)
    if not whole:
        return None
    seconds = sum(row.seconds for row in shown)
    wall = record.seconds.get("teacher") if record else None
    return Averages(
        input_tokens=None,
        output_tokens=sum(row.output_tokens for row in shown) / whole,
        counted="shown",
        answers=whole,
        teacher=record.teacher if record else None,
        replies=len(shown),
        cut=sum(row.stop in ("length", "context", "other") for row in shown),
        refused=sum(row.stop == "refusal" for row in shown),
        seconds=seconds / whole if seconds else None,
        under_way=max(1.0, seconds / wall) if wall else None,
    )
