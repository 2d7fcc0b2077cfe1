"""One step of the student: accumulation, learning, dropout, and what must not change."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from mlx_distill.backends.base import State
from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.batches import Batch, TokenRow, make_batch
from mlx_distill.errors import ConfigError
from tests.tiny import make_tiny_model
from tests.training.runs import settings


def rows(count: int, *, seed: int = 0, words: int = 300) -> list[TokenRow]:
    """Rows of 4 to 40 tokens, of which a part carries loss."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(generator.integers(4, 41))
        mask = generator.random(length) < 0.6
        mask[0], mask[-1] = False, True
        made.append(TokenRow(generator.integers(1, words, length).astype(np.int32), mask))
    return made


ROWS = rows(8)
WHOLE = make_batch(ROWS, range(8))


def student(model: Path, **changes: Any) -> MlxStudent:
    return MlxStudent(model, settings(Path("data"), model, Path("run"), **changes))


def split(sizes: Sequence[int]) -> list[Batch]:
    ends = np.cumsum(sizes).tolist()
    return [make_batch(ROWS, range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def adapter(state: State) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value for name, value in state.arrays.items() if name.startswith("adapter.")}


def same(first: State, second: State) -> bool:
    return first.arrays.keys() == second.arrays.keys() and all(
        np.array_equal(value, second.arrays[name]) for name, value in first.arrays.items()
    )


# The same again


def test_the_same_seed_gives_the_same_start_and_the_same_steps_to_the_bit(tiny_model: Path) -> None:
    runs = []
    for _ in range(2):
        one = student(tiny_model, dropout=0.2, seed=5)
        start = one.state()
        runs.append((start, [one.step([WHOLE], 1e-2) for _ in range(4)], one.state()))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert same(runs[0][2], runs[1][2])


def test_another_seed_gives_another_start(tiny_model: Path) -> None:
    first, second = (adapter(student(tiny_model, seed=seed).state()) for seed in (0, 1))
    different = [name for name, value in first.items() if not np.array_equal(value, second[name])]
    assert different
    assert all(name.endswith("lora_a") for name in different)


def test_the_start_changes_nothing(tiny_model: Path) -> None:
    """The second factor is zero, so the loss at the start is the base model's, whatever the rank and scale."""
    losses = {student(tiny_model, rank=rank, scale=scale).evaluate(WHOLE) for rank, scale in ((2, 1.0), (8, 20.0))}
    assert len(losses) == 1


# Accumulation


SPLITS = st.lists(st.integers(1, 8), min_size=1, max_size=8).map(
    lambda sizes: [size for size, end in zip(sizes, np.cumsum(sizes).tolist(), strict=True) if end <= 8]
)


@examples(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([1] * 8)
@example([7, 1])
@given(SPLITS.map(lambda sizes: [*sizes, 8 - sum(sizes)] if sum(sizes) < 8 else sizes))
def test_micro_batches_of_any_split_make_the_update_of_the_whole(tiny_model: Path, sizes: list[int]) -> None:
    """Within float32: sums in another order differ by some 1e-7 of their size.

    Adam divides by the root of the second moment, which makes rounding of a small gradient count for more: after three
    steps of 1e-3 the adapters differ by up to 1e-6 here. A mean of means would differ by 1e-3.
    """
    assert sum(sizes) == 8
    one, other = student(tiny_model), student(tiny_model)
    for _ in range(3):
        whole = one.step([WHOLE], 1e-3)
        parts = other.step(split(sizes), 1e-3)
        assert parts.loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)
        assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
        assert (parts.correct, parts.target_tokens, parts.tokens) == (whole.correct, whole.target_tokens, whole.tokens)
    for name, value in adapter(one.state()).items():
        np.testing.assert_allclose(adapter(other.state())[name], value, atol=2e-5, err_msg=name)


def test_accumulation_weighs_tokens_not_batches(tiny_model: Path) -> None:
    """The mean of two means would count the only target of the short row as much as the 39 of the long one."""
    long = TokenRow(np.arange(1, 41, dtype=np.int32), np.arange(40) > 0)
    short = TokenRow(np.arange(100, 140, dtype=np.int32), np.arange(40) == 39)
    both = [long, short]
    together, apart = student(tiny_model, grad_clip=None), student(tiny_model, grad_clip=None)
    norm = together.step([make_batch(both, [0, 1])], 1e-3).grad_norm
    assert apart.step([make_batch(both, [0]), make_batch(both, [1])], 1e-3).grad_norm == pytest.approx(norm, rel=1e-4)


def test_padding_changes_nothing(tiny_model: Path) -> None:
    row = ROWS[0]
    narrow = make_batch([row], [0])
    wide = Batch(
        np.pad(narrow.tokens, ((0, 0), (0, 48))),
        np.pad(narrow.loss_mask, ((0, 0), (0, 48))),
        narrow.lengths,
        narrow.rows,
    )
    one, other = student(tiny_model), student(tiny_model)
    first, second = one.step([narrow], 1e-3), other.step([wide], 1e-3)
    assert second.loss_sum == pytest.approx(first.loss_sum, rel=1e-5)
    assert second.grad_norm == pytest.approx(first.grad_norm, rel=1e-4)


def test_the_order_of_rows_in_a_batch_changes_nothing(tiny_model: Path) -> None:
    one, other = student(tiny_model), student(tiny_model)
    first, second = one.step([WHOLE], 1e-3), other.step([make_batch(ROWS, [7, 2, 5, 0, 1, 6, 4, 3])], 1e-3)
    assert second.loss_sum == pytest.approx(first.loss_sum, rel=1e-5)
    assert second.grad_norm == pytest.approx(first.grad_norm, rel=1e-4)


# Learning


def test_memorised_rows_are_learned(tiny_model: Path) -> None:
    one = student(tiny_model, layers="all", rank=8)
    batch = make_batch(ROWS, range(4))
    before = one.evaluate(batch)
    for _ in range(60):
        one.step([batch], 2e-2)
    after = one.evaluate(batch)
    assert after.loss < before.loss / 2
    assert after.token_accuracy > before.token_accuracy + 0.2


@pytest.mark.parametrize(
    ("architecture", "tied"), [("qwen2", True), ("qwen2", False), ("llama", True), ("llama", False)]
)
def test_every_tiny_architecture_learns(tmp_path: Path, architecture: Any, tied: bool) -> None:
    model = make_tiny_model(tmp_path / "model", architecture=architecture, tied=tied)
    one = student(model)
    losses = [one.step([WHOLE], 1e-2).loss for _ in range(8)]
    assert losses[-1] < losses[0]


def test_a_gradient_is_shortened_to_the_clip_and_its_norm_told_as_it_was(tiny_model: Path) -> None:
    """Adam's first step is the same for any length of the gradient, so the second tells."""
    free, clipped = student(tiny_model, grad_clip=None), student(tiny_model, grad_clip=1e-4)
    norms = [s.step([WHOLE], 1e-3).grad_norm for s in (free, clipped)]
    assert norms[0] == norms[1]
    assert norms[0] is not None
    assert norms[0] > 1e-4
    moments = [s.state().arrays for s in (free, clipped)]
    name = next(n for n in moments[0] if n.startswith("optimizer.") and n.endswith("lora_b.m"))
    np.testing.assert_allclose(moments[1][name], moments[0][name] * 1e-4 / norms[0], rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_the_first_update_is_adams(tiny_model: Path, optimizer: str) -> None:
    """With bias correction, every value whose gradient is not nearly zero moves by the learning rate."""
    one = student(tiny_model, optimizer=optimizer, weight_decay=0.0)
    before = adapter(one.state())
    one.step([WHOLE], 1e-3)
    after = adapter(one.state())
    moved = np.concatenate([(after[n] - before[n]).ravel() for n in after if n.endswith("lora_b")])
    assert np.median(np.abs(moved)) == pytest.approx(1e-3, rel=1e-2)
    # The gradient of the first factor goes through the second, which is zero.
    assert all(np.array_equal(after[n], before[n]) for n in after if n.endswith("lora_a"))


def test_weight_decay_pulls_values_to_zero(tiny_model: Path) -> None:
    one = student(tiny_model, optimizer="adamw", weight_decay=0.5)
    before = adapter(one.state())
    one.step([WHOLE], 0.1)
    for name, value in adapter(one.state()).items():
        if name.endswith("lora_a"):
            np.testing.assert_allclose(value, before[name] * (1 - 0.1 * 0.5), rtol=1e-5)


# What must not change


def test_the_frozen_weights_stay_as_they_were(tiny_model: Path) -> None:
    """With the adapter of the start put back, the loss is that of the start to the bit; the files are untouched."""

    def digest() -> list[str]:
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(tiny_model.iterdir())]

    files = digest()
    one = student(tiny_model, weight_decay=0.5, dropout=0.1)
    start, before = one.state(), one.evaluate(WHOLE)
    for _ in range(5):
        one.step([WHOLE], 0.05)
    assert one.evaluate(WHOLE) != before
    one.restore(start)
    assert one.evaluate(WHOLE) == before
    assert digest() == files
    assert all("lora_" in name for name in adapter(start))


def test_evaluating_changes_nothing_and_knows_no_dropout(tiny_model: Path) -> None:
    one = student(tiny_model, dropout=0.5)
    one.step([WHOLE], 1e-2)
    state = one.state()
    assert one.evaluate(WHOLE) == one.evaluate(WHOLE)
    assert same(one.state(), state)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_does_not_touch_the_adapter(tiny_model: Path, value: float) -> None:
    one = student(tiny_model)
    one.step([WHOLE], 1e-3)
    good = one.state()
    name = next(n for n in good.arrays if n.startswith("adapter.") and n.endswith("lora_a"))
    poisoned = dict(good.arrays)
    poisoned[name] = np.full_like(poisoned[name], value)
    one.restore(State(poisoned))
    before = one.state()
    stats = one.step([WHOLE], 1e-3)
    assert not (math.isfinite(stats.loss_sum) and math.isfinite(stats.grad_norm or 0.0))
    after = one.state()
    for key, array in before.arrays.items():
        if not key.startswith("random."):
            np.testing.assert_array_equal(after.arrays[key], array, err_msg=key)


# State


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_restored_student_goes_on_to_the_bit(tiny_model: Path, dropout: float, optimizer: str) -> None:
    def fresh() -> MlxStudent:
        return student(tiny_model, dropout=dropout, optimizer=optimizer)

    one = fresh()
    for _ in range(3):
        one.step([WHOLE], 1e-2)
    middle = one.state()
    expected = [one.step(split([3, 5]), 1e-2) for _ in range(3)]
    other = fresh()
    other.step([WHOLE], 0.5)
    other.restore(middle)
    assert [other.step(split([3, 5]), 1e-2) for _ in range(3)] == expected
    assert same(other.state(), one.state())


def test_dropout_makes_steps_random(tiny_model: Path) -> None:
    """Otherwise the test above would show nothing. At the start the adapter says nothing, so from the second step."""
    losses = []
    for seed in range(3):
        one = student(tiny_model, dropout=0.5)
        one.step([WHOLE], 0.1)
        state = dict(one.state().arrays)
        state["random.0"] = np.array([0, seed], dtype=state["random.0"].dtype)
        one.restore(State(state))
        losses.append(one.step([WHOLE], 0.1).loss_sum)
    assert len(set(losses)) == 3


def test_a_state_is_a_copy(tiny_model: Path) -> None:
    one = student(tiny_model)
    state = one.state()
    kept = {name: value.copy() for name, value in state.arrays.items()}
    one.step([WHOLE], 0.1)
    assert all(np.array_equal(kept[name], value) for name, value in state.arrays.items())


# Settings


@pytest.mark.parametrize("layers", [5, 99])
def test_more_layers_than_there_are_is_refused(tiny_model: Path, layers: int) -> None:
    with pytest.raises(ConfigError, match="has 4 layers"):
        student(tiny_model, layers=layers)


@pytest.mark.parametrize("rank", [65, 1000])
def test_a_rank_above_a_matrix_is_refused(tiny_model: Path, rank: int) -> None:
    """The smallest matrices of the tiny model have 32 rows; LoRA of a rank above that is no longer low."""
    with pytest.raises(ConfigError, match="rank"):
        student(tiny_model, rank=rank)


@pytest.mark.parametrize(("layers", "factor"), [(1, 1), (2, 2), ("all", 4)])
def test_the_count_of_trainable_parameters_is_that_of_the_adapter(tiny_model: Path, layers: Any, factor: int) -> None:
    one = student(tiny_model, layers=layers)
    assert one.trainable_parameters == sum(value.size for value in adapter(one.state()).values())
    assert one.trainable_parameters == factor * student(tiny_model, layers=1).trainable_parameters
