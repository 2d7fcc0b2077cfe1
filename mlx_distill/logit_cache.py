"""A teacher's likeliest words at every position that carries loss, on disk, mapped into memory.

Of each split there are two files. `SPLIT.logits` has one entry a position, row after row in the order of the split:

    K float16    logarithms of the probabilities of the K likeliest words, in nats
    K uint16     the low bits of their ids, in ascending order of the ids
    3 uint16     how many of the ids are below 2¹⁶, 2·2¹⁶ and 3·2¹⁶: what the low bits leave open
    1 float16    logarithm of what is left for all other words

which is 4 K + 8 bytes. `SPLIT.done` has one entry a finished row, its number and the checksum of its entries: eight
bytes, written after them, so that a row is either whole or not there. `logits.json` says what all was made from.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mlx_distill import layout
from mlx_distill.batches import Batch, TeacherBuckets
from mlx_distill.errors import InputError
from mlx_distill.records import Record

#: Ids that can be told: four times what sixteen bits tell.
MOST_WORDS = 4 * 2**16

#: Words that can be named at a position: their count is told in sixteen bits.
MOST_NAMED = 2**16 - 1

_BLOCK = 2**16

_DONE = np.dtype([("row", "<u4"), ("crc", "<u4")])


class SplitLogits(Record):
    """Of one split.

    Attributes:
        sha256: Of the split's file.
        tokens_sha256: Of the tokens of its rows, and of which of them carry loss.
        rows: That have something to learn and are short enough.
        positions: That carry loss, in all of them.
    """

    sha256: str
    tokens_sha256: str
    rows: int
    positions: int


class LogitsRecord(Record):
    """`logits.json`: what the teacher's logits were made from.

    Attributes:
        teacher: As it was named.
        revision: Commit of the Hub, or hash of the source file; None of a folder.
        fingerprint: Of a folder's files.
        licence: As the teacher's files state it.
        top_k: Words named at each position.
        words: That the teacher tells apart; where K is all of them, there are no others.
        vocabulary_sha256: Of the tokenizer's words and their ids.
        template_sha256: Of its chat template.
        max_length: Rows with more tokens were left out.
        dtype: That the teacher computed in.
    """

    format: Literal[1] = 1
    teacher: str
    revision: str | None = None
    fingerprint: str | None = None
    licence: str | None = None
    top_k: int = Field(gt=0, le=MOST_NAMED)
    words: int = Field(gt=0, le=MOST_WORDS)
    vocabulary_sha256: str
    template_sha256: str
    max_length: int
    dtype: str
    splits: dict[str, SplitLogits]

    @property
    def entry_bytes(self) -> int:
        """Bytes a position."""
        return entry_type(self.top_k).itemsize


def entry_type(top_k: int) -> np.dtype[np.void]:
    """Of one position."""
    return np.dtype([("named", "<f2", (top_k,)), ("low", "<u2", (top_k,)), ("bounds", "<u2", (3,)), ("rest", "<f2")])


def packed(buckets: TeacherBuckets) -> NDArray[np.void]:
    """Buckets as entries; (N,)."""
    top_k = buckets.ids.shape[1]
    entries = np.zeros(len(buckets.ids), entry_type(top_k))
    entries["named"] = buckets.log_probs[:, :top_k]
    entries["low"] = buckets.ids % _BLOCK
    entries["bounds"] = [[(row < limit * _BLOCK).sum() for limit in (1, 2, 3)] for row in buckets.ids]
    entries["rest"] = buckets.log_probs[:, top_k] if buckets.has_rest else -np.inf
    return entries


def unpacked(entries: NDArray[np.void], *, rest: bool) -> TeacherBuckets:
    """The buckets of entries (N,).

    Args:
        rest: Whether there are words beside those named.
    """
    top_k = entries["low"].shape[1]
    places = np.arange(top_k)
    high = sum((places >= entries["bounds"][:, at, None]).astype(np.int32) for at in range(3))
    ids = entries["low"].astype(np.int32) + high * _BLOCK
    logs = entries["named"].astype(np.float32)
    if rest:
        logs = np.concatenate([logs, entries["rest"].astype(np.float32)[:, None]], axis=-1)
    return TeacherBuckets(ids.astype(np.int32), logs)


class _Files:
    """The two files of a split."""

    def __init__(self, folder: Path, split: str) -> None:
        self.entries = folder / f"{split}.logits"
        self.done = folder / f"{split}.done"


def forget(folder: Path, split: str) -> None:
    """Take no entry of a split for whole."""
    _Files(folder, split).done.unlink(missing_ok=True)


class LogitWriter:
    """Writes the entries of a split, some rows at a time.

    Args:
        positions: Of each row, (rows,).

    Attributes:
        missing: Rows that are not there yet, or are damaged.
    """

    def __init__(self, folder: Path, split: str, top_k: int, positions: NDArray[np.int64]) -> None:
        self._files = _Files(folder, split)
        self._starts = _starts(positions)
        total = int(self._starts[-1])
        kind = entry_type(top_k)
        self._size = kind.itemsize
        if not self._files.entries.exists() or self._files.entries.stat().st_size != total * kind.itemsize:
            self._files.done.unlink(missing_ok=True)
            with self._files.entries.open("wb") as file:
                file.truncate(total * kind.itemsize)
        entries = np.memmap(self._files.entries, kind, mode="r", shape=(total,))
        whole = {
            row
            for row, crc in _read_done(self._files.done).items()
            if row < len(positions) and zlib.crc32(entries[self._starts[row] : self._starts[row + 1]].tobytes()) == crc
        }
        self.missing = [row for row in range(len(positions)) if row not in whole]

    def write(self, rows: Sequence[int], entries: Sequence[NDArray[np.void]]) -> None:
        """Keep the entries of some rows; they are on the disk when this returns.

        Raises:
            OSError: They cannot be written, as on a full disk.
        """
        # Not through the map: a full disk would end the process there, without a word.
        with self._files.entries.open("r+b", buffering=0) as file:
            for row, values in zip(rows, entries, strict=True):
                file.seek(int(self._starts[row]) * self._size)
                left = memoryview(values.tobytes())
                while left:
                    left = left[file.write(left) :]
            os.fsync(file.fileno())
        marks = np.array(
            [(row, zlib.crc32(values.tobytes())) for row, values in zip(rows, entries, strict=True)], _DONE
        )
        with self._files.done.open("ab") as file:
            # Half an entry, left by a crash, would put all after it out of step.
            file.truncate(file.tell() // _DONE.itemsize * _DONE.itemsize)
            file.write(marks.tobytes())
            file.flush()
            os.fsync(file.fileno())


class LogitReader:
    """The buckets of a split's rows, each checked when it is first read.

    Args:
        positions: Of each row that was written, (rows,).
        places: Which of them each row asked for is, (rows asked for,).

    Raises:
        InputError: A file is missing, of another size, or not finished.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        record: LogitsRecord,
        positions: NDArray[np.int64],
        places: NDArray[np.int64],
    ) -> None:
        self._files = _Files(folder, split)
        self._record = record
        self._starts = _starts(positions)
        self._places = places
        self._seen: set[int] = set()
        total, kind = int(self._starts[-1]), entry_type(record.top_k)
        if not self._files.entries.is_file() or self._files.entries.stat().st_size != total * kind.itemsize:
            raise InputError("the teacher's logits are missing or cut.", path=self._files.entries, hint=AGAIN)
        self._done = _read_done(self._files.done)
        if lacking := [int(place) for place in places if int(place) not in self._done]:
            raise InputError(
                f"the teacher's logits are not finished: {len(lacking)} of {len(places)} rows lack.",
                path=self._files.done,
                hint=AGAIN,
            )
        self._entries = np.memmap(self._files.entries, kind, mode="r", shape=(total,))

    def with_teacher(self, batch: Batch) -> Batch:
        """A batch with what the teacher says at its positions.

        Raises:
            InputError: A row is damaged.
        """
        found = np.concatenate([self._row(int(self._places[row])) for row in batch.rows])
        rest = self._record.top_k < self._record.words
        return replace(batch, teacher=unpacked(found, rest=rest))

    def _row(self, place: int) -> NDArray[np.void]:
        entries = np.asarray(self._entries[self._starts[place] : self._starts[place + 1]])
        if place not in self._seen:
            if zlib.crc32(entries.tobytes()) != self._done[place]:
                raise InputError(
                    f"the teacher's logits of row {place} are damaged.", path=self._files.entries, hint=AGAIN
                )
            self._seen.add(place)
        return entries


AGAIN = "Make them again; what is whole is kept:  mlx-distill logits --help"


def read_logits_record(folder: Path) -> LogitsRecord:
    """What a folder's logits were made from.

    Raises:
        InputError: There are none.
    """
    return layout.read_record(
        layout.logits_record(folder),
        LogitsRecord,
        hint="Make them:  mlx-distill logits --data DIR --teacher mlx:MODEL",
    )


def _starts(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(positions, dtype=np.int64)])


def _read_done(path: Path) -> dict[int, int]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    whole = len(content) // _DONE.itemsize * _DONE.itemsize
    marks = np.frombuffer(content[:whole], _DONE)
    return {int(mark["row"]): int(mark["crc"]) for mark in marks}
