"""Rows of tokens become batches: bucketed by length, padded a little, in a seeded order, nothing dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import numpy as np
from numpy.typing import NDArray

#: Widths are rounded up to a multiple of this many tokens, so that few distinct shapes occur.
WIDTH_QUANTUM = 16

Length = TypeVar("Length", int, NDArray[np.int64])

#: Shares of padding among all tokens of an epoch: what is allowed for the sake of mixed company, and what may be added
#: for it where there is more in any case.
PADDING_ALLOWED, PADDING_ADDED = 0.04, 0.01

#: How far a row may be moved among the others, as a share of its length; the first that padding allows is taken.
_MOVES = (0.5, 0.35, 0.25, 0.18, 0.12, 0.09, 0.07, 0.05, 0.04, 0.03, 0.02, 0.01)

#: Mixes rows of one width, and no others.
_LEAST_MOVE = 1e-6


@dataclass(frozen=True)
class TokenRow:
    """One tokenised row.

    Attributes:
        tokens: (T,) int32.
        loss_mask: (T,) bool; True where predicting that token carries loss. The first is always False.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]

    @property
    def target_tokens(self) -> int:
        """How many tokens carry loss."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class TeacherBuckets:
    """What a teacher says at the N positions of a batch that carry loss, row by row.

    Attributes:
        ids: (N, K) int32, different words, ascending.
        log_probs: (N, K + 1) float32, in nats; the last is of all other words. (N, K) where there are none.
    """

    ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]

    @property
    def has_rest(self) -> bool:
        """Whether there are words beside those named."""
        return bool(self.log_probs.shape[1] > self.ids.shape[1])


@dataclass(frozen=True)
class Batch:
    """Rows padded to one width on the right. Both backends eat the same.

    Attributes:
        tokens: (B, T) int32; padding is token 0.
        loss_mask: (B, T) bool; True where predicting that token carries loss. False on padding.
        lengths: (B,) int32; real tokens of each row.
        rows: (B,) int32; which rows of the split these are.
        teacher: What a teacher says at the positions that carry loss, row by row; None where none is learned from.
        own: Whether the student wrote what carries loss: then its cross-entropy teaches nothing.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    rows: NDArray[np.int32]
    teacher: TeacherBuckets | None = None
    own: bool = False

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.lengths.sum())

    @property
    def target_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(self.loss_mask.sum())


def padded_width(length: Length) -> Length:
    """What a row of this many tokens is padded to, at the least; also of many rows at once."""
    return -(-length // WIDTH_QUANTUM) * WIDTH_QUANTUM


def make_batch(rows: Sequence[TokenRow], indices: Sequence[int]) -> Batch:
    """Pad the rows with these indices into one batch."""
    lengths = np.array([len(rows[i].tokens) for i in indices], dtype=np.int32)
    width = padded_width(int(lengths.max()))
    tokens = np.zeros((len(indices), width), dtype=np.int32)
    mask = np.zeros((len(indices), width), dtype=np.bool_)
    for at, index in enumerate(indices):
        row = rows[index]
        tokens[at, : lengths[at]] = row.tokens
        mask[at, : lengths[at]] = row.loss_mask
    return Batch(tokens, mask, lengths, np.array(indices, dtype=np.int32))


class EpochPlan(Sequence[list[int]]):
    """Which rows make which batch, in the order in which the batches are taken.

    Args:
        rows: (n,) every row once, batch after batch.
        starts: (batches + 1,) where each batch begins in `rows`, and where the last ends.
        order: (batches,) which batch comes when.
    """

    def __init__(self, rows: NDArray[np.int64], starts: NDArray[np.int64], order: NDArray[np.int64]) -> None:
        self._rows = rows
        self._starts = starts
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...

    @overload
    def __getitem__(self, index: slice) -> EpochPlan: ...

    def __getitem__(self, index: int | slice) -> list[int] | EpochPlan:
        if isinstance(index, slice):
            return EpochPlan(self._rows, self._starts, self._order[index])
        batch = self._order[index]
        return [int(row) for row in self._rows[self._starts[batch] : self._starts[batch + 1]]]


def plan_epoch(lengths: Sequence[int] | NDArray[np.int32], batch_size: int, *, seed: int, epoch: int) -> EpochPlan:
    """Which rows make which batch of an epoch, every row exactly once.

    Rows are sorted by the width they are padded to, each moved a little by a draw of its own, so that neighbours are
    of like length and in new company each epoch. They are moved as far as padding allows: it stays below
    `PADDING_ALLOWED`, or, where the lengths do not let even that be, within `PADDING_ADDED` of the least there can be.
    A batch of fewer rows, where the count does not divide, comes anywhere among the lengths, and the batches are taken
    in a shuffled order. The same arguments give the same plan.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows a batch; one batch may have fewer.
    """
    generator = np.random.default_rng([seed, epoch])
    count = len(lengths)
    batches = -(-count // batch_size)
    starts = np.arange(batches + 1, dtype=np.int64) * batch_size
    if not count:
        return EpochPlan(starts[:0], starts, starts[:0])
    starts[generator.integers(batches) + 1 :] -= batches * batch_size - count
    draws = generator.uniform(-1, 1, count)
    tokens = int(np.sum(lengths, dtype=np.int64))
    widths = padded_width(np.asarray(lengths, dtype=np.int64))
    reach = draws * (widths + widths.mean()) / 2

    def moved(share: float) -> NDArray[np.int64]:
        return np.argsort(widths + share * reach, kind="stable")

    def padding(rows: NDArray[np.int64]) -> float:
        padded = np.maximum.reduceat(widths[rows], starts[:-1]) * np.diff(starts)
        return 1 - tokens / int(padded.sum())

    rows = moved(_LEAST_MOVE)
    allowed = max(PADDING_ALLOWED, padding(rows) + PADDING_ADDED)
    for share in _MOVES:
        further = moved(share)
        if padding(further) <= allowed:
            rows = further
            break
    return EpochPlan(rows, starts, generator.permutation(batches))


def in_order(
    rows: Sequence[TokenRow],
    batch_size: int,
    lengths: Sequence[int] | NDArray[np.int32] | None = None,
    chosen: range | None = None,
) -> Iterator[Batch]:
    """Every row once, longest first, for evaluation: the largest batch, and so the peak of memory, comes first.

    Args:
        rows: Of a split.
        batch_size: Rows a batch; the last may have fewer.
        lengths: Tokens of each row, where they are known without reading it.
        chosen: The rows to take, counted from the longest; all, if not given.
    """
    known = [len(row.tokens) for row in rows] if lengths is None else lengths
    order = np.argsort(-np.asarray(known, dtype=np.int64), kind="stable")
    if chosen is not None:
        order = order[chosen.start : chosen.stop : chosen.step]
    for at in range(0, len(order), batch_size):
        yield make_batch(rows, order[at : at + batch_size].tolist())
