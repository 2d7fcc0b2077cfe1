"""A data set as training sees it: the splits of a folder, tokenised, with what is too long or empty left out.

The rows of a split stay on disk, mapped into memory (see `token_cache`); in memory are a few numbers a row. So a
large data set takes hardly more memory than a small one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from mlx_distill.batches import TokenRow
from mlx_distill.errors import InputError
from mlx_distill.layout import SPLITS, DataFolder
from mlx_distill.progress import SILENT, Progress
from mlx_distill.rows import MAKE_ONE
from mlx_distill.run_records import SplitSummary
from mlx_distill.token_cache import TokenCache, TokenisedFile
from mlx_distill.token_store import StoredRows

#: Rows left out that are named; the others are counted.
_MOST_NAMED = 10


@dataclass(frozen=True)
class Skipped:
    """A row that is not trained on, and why."""

    line: int
    reason: str


class SkippedRows(Sequence[Skipped]):
    """The rows that are not trained on; each is described when it is asked for.

    Args:
        lines: Of each: (n,).
        lengths: Tokens of each: (n,).
        max_length: Tokens that a row may have.
    """

    def __init__(self, lines: NDArray[np.int64], lengths: NDArray[np.int32], max_length: int) -> None:
        self._lines = lines
        self._lengths = lengths
        self._max_length = max_length

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Skipped: ...

    @overload
    def __getitem__(self, index: slice) -> SkippedRows: ...

    def __getitem__(self, index: int | slice) -> Skipped | SkippedRows:
        if isinstance(index, slice):
            return SkippedRows(self._lines[index], self._lengths[index], self._max_length)
        reason = "nothing to learn: no assistant turn with text"
        if self._lengths[index] > self._max_length:
            reason = f"{self._lengths[index]} tokens, more than max_length = {self._max_length}"
        return Skipped(int(self._lines[index]), reason)


@dataclass(frozen=True)
class TokenSplit:
    """A tokenised split.

    Attributes:
        path: The file it came from.
        sha256: Of that file.
        rows: Every row with something to learn, each read when it is asked for.
        lengths: (n,) tokens of each row.
        lines: (n,) line of each row.
        target_tokens: Tokens that carry loss, in all rows.
        skipped: The others.
    """

    path: Path
    sha256: str
    rows: Sequence[TokenRow]
    lengths: NDArray[np.int32]
    lines: NDArray[np.int64]
    target_tokens: int
    skipped: Sequence[Skipped]

    def summary(self) -> SplitSummary:
        """Its size and hash."""
        return SplitSummary(
            rows=len(self.rows),
            tokens=int(self.lengths.sum(dtype=np.int64)),
            target_tokens=self.target_tokens,
            sha256=self.sha256,
            skipped=len(self.skipped),
        )


def tokenise_split(path: Path, tokenizer: Any, *, max_length: int, progress: Progress = SILENT) -> TokenSplit:
    """Read and tokenise a split, or find its tokens in the cache.

    Args:
        path: A JSONL file.
        tokenizer: A fast transformers tokenizer with a chat template.
        max_length: Longer rows, in tokens, are left out whole: a cut answer teaches never to finish.

    Raises:
        InputError: The file or a row cannot be used.
        ModelError: The tokenizer cannot tell where in a text a token stands.
    """
    return _select(path, TokenCache(tokenizer, progress=progress).load(path), max_length)


def _select(path: Path, file: TokenisedFile, max_length: int) -> TokenSplit:
    index = file.store.index
    fits = (index["tokens"] <= max_length) & (index["target_tokens"] > 0)
    which, others = np.flatnonzero(fits), np.flatnonzero(~fits)
    return TokenSplit(
        path=path,
        sha256=file.sha256,
        rows=StoredRows(file.store, which),
        lengths=index["tokens"][which],
        lines=index["line"][which],
        target_tokens=int(index["target_tokens"][which].sum(dtype=np.int64)),
        skipped=SkippedRows(index["line"][others], index["tokens"][others], max_length),
    )


def _left_out(split: TokenSplit) -> str:
    named = [f"line {row.line} ({row.reason})" for row in split.skipped[:_MOST_NAMED]]
    if more := len(split.skipped) - len(named):
        named.append(f"{more:,} more")
    listed = ", ".join(named[:-1]) + (" and " if named[:-1] else "") + named[-1]
    return f"{split.path}: {len(split.skipped)} of {len(split.rows) + len(split.skipped)} rows left out: {listed}."


def require_train_split(folder: Path) -> None:
    """Refuse a folder without a `train.jsonl`, before anything dear is done.

    Raises:
        InputError: There is no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise InputError("no such folder; it needs a train.jsonl.", path=folder, hint=MAKE_ONE)
    if not DataFolder(folder).split("train").is_file():
        raise InputError("no such file.", path=DataFolder(folder).split("train"), hint=MAKE_ONE)


def load_splits(folder: Path, tokenizer: Any, *, max_length: int, progress: Progress = SILENT) -> dict[str, TokenSplit]:
    """Tokenise `train.jsonl` and, where they are there and not empty, `valid.jsonl` and `test.jsonl`.

    What was tokenised before with the same tokenizer is found in the cache.

    Raises:
        InputError: There is no such folder, no training row is left, or a file is malformed.
        ModelError: The tokenizer cannot tell where in a text a token stands.
    """
    require_train_split(folder)
    files = DataFolder(folder)
    cache = TokenCache(tokenizer, progress=progress)
    splits: dict[str, TokenSplit] = {}
    for name in SPLITS:
        path = files.split(name)
        if name == "train" or (path.exists() and path.stat().st_size > 0):
            split = _select(path, cache.load(path), max_length)
            if split.skipped:
                progress.say(_left_out(split))
            if split.rows:
                splits[name] = split
    cache.trim()
    if "train" not in splits:
        raise InputError(
            "no row is left to train on.", path=files.split("train"), hint="Raise --max-length, or look at the rows."
        )
    return splits
