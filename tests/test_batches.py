"""Batches: every row once, little padding, the same plan for the same seed and epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distill.batches import WIDTH_QUANTUM, TokenRow, in_order, make_batch, plan_epoch

LENGTHS = st.lists(st.integers(1, 900), min_size=1, max_size=120)
SIZES = st.integers(1, 150)


def row(length: int, *, first: int = 1) -> TokenRow:
    """A row of tokens that are never 0, the padding."""
    tokens = np.arange(first, first + length, dtype=np.int32)
    mask = np.ones(length, dtype=np.bool_)
    mask[0] = False
    return TokenRow(tokens, mask)


def padding_share(lengths: list[int], plan: list[list[int]]) -> float:
    rows = [row(length) for length in lengths]
    batches = [make_batch(rows, indices) for indices in plan]
    return 1 - sum(b.real_tokens for b in batches) / sum(b.tokens.size for b in batches)


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
    assert plan_epoch(lengths, size, seed=seed, epoch=epoch) == plan_epoch(lengths, size, seed=seed, epoch=epoch)


def test_epochs_and_seeds_give_different_plans() -> None:
    lengths = list(range(150, 350))
    plans = {str(plan_epoch(lengths, 4, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(10)}
    assert len(plans) == 50


def test_rows_of_one_length_meet_new_company_each_epoch() -> None:
    companies = {
        frozenset(batch) for epoch in range(20) for batch in plan_epoch([64] * 40, 4, seed=0, epoch=epoch) if 0 in batch
    }
    assert len(companies) > 15


def test_the_order_of_lengths_is_shuffled() -> None:
    """A run that saw its short rows first would learn them first: no epoch goes up or down in length."""
    lengths = list(range(150, 350))
    for epoch in range(10):
        firsts = [lengths[batch[0]] for batch in plan_epoch(lengths, 4, seed=0, epoch=epoch)]
        assert abs(float(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1])) < 0.5


@pytest.mark.parametrize("seed", range(5))
def test_padding_is_below_five_per_cent_at_batch_4(seed: int) -> None:
    """200 rows of 150 to 900 tokens: about 2.4 %, against some 25 % for batches drawn regardless of length."""
    lengths = np.random.default_rng(seed).integers(150, 901, size=200).tolist()
    planned = padding_share(lengths, plan_epoch(lengths, 4, seed=seed, epoch=0))
    assert planned < 0.035
    assert padding_share(lengths, [list(range(at, at + 4)) for at in range(0, 200, 4)]) > 4 * planned


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


def test_a_batch_is_a_copy() -> None:
    """What is done to a batch must not reach the rows, which all epochs share."""
    rows = [row(5)]
    make_batch(rows, [0]).tokens[:] = 9
    assert rows[0].tokens.tolist() == [1, 2, 3, 4, 5]
