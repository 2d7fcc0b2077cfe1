"""Batches: every row once, little padding, the same plan for the same seed and epoch."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlx_distill.batches import WIDTH_QUANTUM, TokenRow, in_order, make_batch, plan_epoch

LENGTHS = st.lists(st.integers(1, 900), min_size=1, max_size=120)
SIZES = st.integers(1, 150)


def row(length: int, *, first: int = 1) -> TokenRow:
    """A row of tokens that are never 0, the padding."""
    tokens = np.arange(first, first + length, dtype=np.int32)
    mask = np.ones(length, dtype=np.bool_)
    mask[0] = False
    return TokenRow(tokens, mask)


def padded_width(lengths: NDArray[np.int64]) -> int:
    """Of a batch of such rows."""
    return -(-int(lengths.max()) // WIDTH_QUANTUM) * WIDTH_QUANTUM


def padding_share(lengths: NDArray[np.int64], plan: Iterable[list[int]]) -> float:
    sizes = [len(indices) * padded_width(lengths[indices]) for indices in plan]
    return float(1 - lengths.sum() / sum(sizes))


@given(LENGTHS, SIZES, st.integers(0, 2**32), st.integers(0, 50))
def test_every_row_is_in_an_epoch_exactly_once(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    plan = plan_epoch(lengths, size, seed=seed, epoch=epoch)
    assert Counter(i for batch in plan for i in batch) == Counter(range(len(lengths)))
    assert len(plan) == -(-len(lengths) // size)
    assert sum(len(batch) != size for batch in plan) <= 1
    assert all(batch for batch in plan)
    assert all(type(i) is int for batch in plan for i in batch)


@given(LENGTHS, SIZES, st.integers(0, 2**32), st.integers(0, 50))
def test_the_same_seed_and_epoch_give_the_same_plan(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    plan = plan_epoch(lengths, size, seed=seed, epoch=epoch)
    assert list(plan) == list(plan_epoch(lengths, size, seed=seed, epoch=epoch))
    assert list(plan) == list(plan_epoch(np.array(lengths, dtype=np.int32), size, seed=seed, epoch=epoch))
    assert [plan[at] for at in range(-1, -len(plan) - 1, -1)] == list(plan)[::-1]
    assert list(plan[1:]) == list(plan)[1:]
    with pytest.raises(IndexError):
        plan[len(plan)]


def test_epochs_and_seeds_give_different_plans() -> None:
    lengths = list(range(150, 350))
    plans = {str(list(plan_epoch(lengths, 4, seed=seed, epoch=epoch))) for seed in range(5) for epoch in range(10)}
    assert len(plans) == 50


def mates(lengths: list[int], row: int, *, epochs: int) -> set[int]:
    """The rows that share a batch of four with this one in some epoch."""
    met = set()
    for epoch in range(epochs):
        for batch in plan_epoch(lengths, 4, seed=0, epoch=epoch):
            met |= set(batch) if row in batch else set()
    return met - {row}


def test_rows_of_one_length_meet_new_company_each_epoch() -> None:
    assert len(mates([64] * 40, 0, epochs=20)) > 25


def test_rows_of_lengths_all_different_meet_new_company_too() -> None:
    """104 rows of 150 to 900 tokens, spread evenly: sorted by length alone, each would meet the same three for ever."""
    lengths = np.linspace(150, 900, 104).astype(int).tolist()
    met = [len(mates(lengths, row, epochs=10)) for row in range(0, 104, 3)]
    assert min(met) > 3
    assert np.mean(met) > 8


def test_the_batch_that_is_not_full_is_not_always_of_the_longest() -> None:
    lengths = np.linspace(150, 900, 103).astype(int).tolist()
    short = [
        max(lengths[i] for i in batch)
        for epoch in range(20)
        for batch in plan_epoch(lengths, 4, seed=0, epoch=epoch)
        if len(batch) < 4
    ]
    assert len(short) == 20
    assert min(short) < 350
    assert max(short) > 700


def test_the_order_of_lengths_is_shuffled() -> None:
    """A run that saw its short rows first would learn them first: no epoch goes up or down in length."""
    lengths = list(range(150, 350))
    for epoch in range(10):
        firsts = [lengths[batch[0]] for batch in plan_epoch(lengths, 4, seed=0, epoch=epoch)]
        assert abs(float(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1])) < 0.5


@pytest.mark.parametrize("count", [104, 200, 1000, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_padding_is_below_five_per_cent_at_batch_4(seed: int, count: int) -> None:
    """Rows of 150 to 900 tokens, against some 25 % for batches drawn regardless of length."""
    lengths = np.random.default_rng(seed).integers(150, 901, size=count)
    for epoch in range(3):
        assert padding_share(lengths, plan_epoch(lengths, 4, seed=seed, epoch=epoch)) < 0.05
    assert padding_share(lengths, [list(range(at, at + 4)) for at in range(0, count, 4)]) > 0.2


@given(st.lists(st.integers(1, 900), min_size=1, max_size=30), st.integers(1, 6), st.integers(0, 2**32))
def test_padding_is_small_or_hardly_more_than_the_least(lengths: list[int], size: int, seed: int) -> None:
    """Whatever the lengths: company is not bought dearly where rows are few, or far apart."""
    rows = np.sort(np.array(lengths * size))
    least = padding_share(rows, [list(range(at, at + size)) for at in range(0, len(rows), size)])
    assert padding_share(rows, plan_epoch(rows, size, seed=seed, epoch=0)) <= max(0.04, least + 0.01) + 1e-12


def test_few_distinct_widths_occur() -> None:
    lengths = np.random.default_rng(0).integers(150, 901, size=10_000)
    assert len({padded_width(lengths[batch]) for batch in plan_epoch(lengths, 4, seed=0, epoch=0)}) <= 48


def test_a_plan_of_many_rows_holds_no_object_a_row() -> None:
    tracemalloc.start()
    try:
        plan = plan_epoch(np.full(200_000, 64, dtype=np.int32), 4, seed=0, epoch=0)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(plan) == 50_000
    assert held < 12.5 * 200_000


@given(LENGTHS, st.integers(1, 8))
def test_a_batch_holds_its_rows_and_no_loss_on_padding(lengths: list[int], size: int) -> None:
    rows = [row(length, first=1 + 1000 * at) for at, length in enumerate(lengths)]
    for indices in plan_epoch(lengths, size, seed=0, epoch=0):
        batch = make_batch(rows, indices)
        assert (batch.tokens.dtype, batch.loss_mask.dtype) == (np.int32, np.bool_)
        width = batch.tokens.shape[1]
        assert width % WIDTH_QUANTUM == 0
        assert max(batch.lengths) <= width < max(batch.lengths) + WIDTH_QUANTUM
        assert batch.rows.tolist() == indices
        for at, index in enumerate(indices):
            length = lengths[index]
            assert batch.lengths[at] == length
            assert np.array_equal(batch.tokens[at, :length], rows[index].tokens)
            assert np.array_equal(batch.loss_mask[at, :length], rows[index].loss_mask)
            assert not batch.tokens[at, length:].any()
            assert not batch.loss_mask[at, length:].any()
        assert batch.real_tokens == sum(lengths[i] for i in indices)
        assert batch.target_tokens == sum(lengths[i] - 1 for i in indices)


@given(LENGTHS, SIZES)
def test_evaluation_sees_every_row_once_and_the_largest_batch_first(lengths: list[int], size: int) -> None:
    batches = list(in_order([row(length) for length in lengths], size))
    assert Counter(int(i) for b in batches for i in b.rows) == Counter(range(len(lengths)))
    widths = [b.tokens.shape[1] for b in batches]
    assert widths == sorted(widths, reverse=True)
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    assert [int(i) for b in batches for i in b.rows] == longest_first


class Unread(Sequence[TokenRow]):
    """Rows that are noted when they are read."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        self.read.append(index)
        return row(self.lengths[index])


def test_evaluation_reads_only_the_rows_of_its_batch_where_lengths_are_known() -> None:
    rows = Unread([5, 9, 7, 8])
    batches = in_order(rows, 2, np.array(rows.lengths))
    next(batches)
    assert set(rows.read) == {1, 3}


def test_a_batch_is_a_copy() -> None:
    """What is done to a batch must not reach the rows, which all epochs share."""
    rows = [row(5)]
    make_batch(rows, [0]).tokens[:] = 9
    assert rows[0].tokens.tolist() == [1, 2, 3, 4, 5]
