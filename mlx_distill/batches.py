"""Rows of tokens become batches: bucketed by length, padded a little, in a seeded order, nothing dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Widths are rounded up to a multiple of this many tokens, so that few distinct shapes occur.
WIDTH_QUANTUM = 16


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
class Batch:
    """Rows padded to one width on the right. Both backends eat the same.

    Attributes:
        tokens: (B, T) int32; padding is token 0.
        loss_mask: (B, T) bool; True where predicting that token carries loss. False on padding.
        lengths: (B,) int32; real tokens of each row.
        rows: (B,) int32; which rows of the split these are.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    rows: NDArray[np.int32]

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.lengths.sum())

    @property
    def target_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(self.loss_mask.sum())


def make_batch(rows: Sequence[TokenRow], indices: Sequence[int]) -> Batch:
    """Pad the rows with these indices into one batch."""
    lengths = np.array([len(rows[i].tokens) for i in indices], dtype=np.int32)
    width = -(-int(lengths.max()) // WIDTH_QUANTUM) * WIDTH_QUANTUM
    tokens = np.zeros((len(indices), width), dtype=np.int32)
    mask = np.zeros((len(indices), width), dtype=np.bool_)
    for at, index in enumerate(indices):
        row = rows[index]
        tokens[at, : lengths[at]] = row.tokens
        mask[at, : lengths[at]] = row.loss_mask
    return Batch(tokens, mask, lengths, np.array(indices, dtype=np.int32))


def plan_epoch(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Which rows make which batch of an epoch, every row exactly once.

    Rows are shuffled, then sorted by length, so that neighbours are of like length and equal lengths are in new
    company each epoch; the batches are then taken in a shuffled order. The same arguments give the same plan.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows a batch; one batch may have fewer.
    """
    generator = np.random.default_rng([seed, epoch])
    shuffled = generator.permutation(len(lengths))
    by_length = shuffled[np.argsort(np.asarray(lengths)[shuffled], kind="stable")]
    batches = [by_length[at : at + batch_size].tolist() for at in range(0, len(by_length), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def in_order(rows: Sequence[TokenRow], batch_size: int) -> Iterator[Batch]:
    """Every row once, longest first, for evaluation: the largest batch, and so the peak of memory, comes first."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].tokens), i))
    for at in range(0, len(order), batch_size):
        yield make_batch(rows, order[at : at + batch_size])
