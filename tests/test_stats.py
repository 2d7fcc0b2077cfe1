"""Intervals: what is exact is exact, and they hold the true mean as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_distill.stats import bootstrap_interval


def test_the_same_values_give_the_same_interval() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    first = bootstrap_interval(values)
    assert first == bootstrap_interval(values)
    assert first is not None
    assert (first.mean, first.n, first.groups, first.level) == (3.75, 4, 4, 0.95)
    assert 1 <= first.low < first.mean < first.high <= 8


def test_equal_values_leave_no_doubt() -> None:
    found = bootstrap_interval([2.5] * 6)
    assert found is not None
    assert (found.low, found.mean, found.high) == (2.5, 2.5, 2.5)
    assert not found.spans_zero


def test_two_values_are_known_exactly() -> None:
    """Resampled, two values give 0, 0, 1/2 and 1 with chances 1/4, 1/2, 1/4."""
    found = bootstrap_interval([0.0, 1.0], level=0.4)
    assert found is not None
    assert (found.low, found.high) == (0.5, 0.5)
    found = bootstrap_interval([0.0, 1.0], level=0.6)
    assert found is not None
    assert (found.low, found.high) == (0.0, 1.0)


@pytest.mark.parametrize("groups", [None, ["a"], ["a", "a", "a"]])
def test_one_group_has_no_interval(groups: list[str] | None) -> None:
    assert bootstrap_interval([1.0] * len(groups or [1]), groups=groups) is None
    assert bootstrap_interval([], groups=None) is None


def test_groups_of_equal_values_count_as_one_value_each() -> None:
    single = bootstrap_interval([1.0, 2.0, 5.0])
    repeated = bootstrap_interval([1.0, 2.0, 5.0] * 7, groups=["x", "y", "z"] * 7)
    assert single is not None
    assert repeated is not None
    assert (repeated.low, repeated.high, repeated.groups) == (single.low, single.high, 3)
    alone = bootstrap_interval([1.0, 2.0, 5.0] * 7)
    assert alone is not None
    assert alone.high - alone.low < 0.6 * (repeated.high - repeated.low)


def test_draws_in_pieces_are_the_draws_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whole numbers, whose sums are exact in any order.
    values = [float(value) for value in np.random.default_rng(1).integers(0, 100, size=50)]
    whole = bootstrap_interval(values, draws=1000)
    monkeypatch.setattr("mlx_distill.stats._COUNTS_AT_ONCE", 333)
    assert bootstrap_interval(values, draws=1000) == whole


@pytest.mark.parametrize("bad", [[1.0, float("nan")], [float("inf"), 1.0]])
def test_what_is_no_number_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_interval(bad)


def test_every_value_needs_its_group() -> None:
    with pytest.raises(ValueError, match="2 values and 3 groups"):
        bootstrap_interval([1.0, 2.0], groups=["a", "b", "c"])


def coverage(groups: int, *, clustered: bool, use_groups: bool, trials: int = 400) -> float:
    """How often the interval holds the true mean, 0."""
    random = np.random.default_rng(7)
    held = 0
    for _ in range(trials):
        sizes = random.integers(1, 6, size=groups)
        centres = np.repeat(random.normal(size=groups) if clustered else np.zeros(groups), sizes)
        values = centres + 0.3 * random.normal(size=len(centres))
        names = list(np.repeat(np.arange(groups), sizes)) if use_groups else None
        found = bootstrap_interval(list(values), groups=names, draws=400)
        assert found is not None
        held += found.spans_zero
    return held / trials


def test_it_holds_the_true_mean_as_often_as_it_says() -> None:
    """400 trials know a share of 95 % to ±2.2 points."""
    assert 0.92 <= coverage(60, clustered=True, use_groups=True) <= 0.975
    assert 0.92 <= coverage(60, clustered=False, use_groups=True) <= 0.975


def test_without_its_groups_it_would_claim_too_much() -> None:
    assert coverage(60, clustered=True, use_groups=False) < 0.85


def test_with_ten_groups_it_is_too_narrow_as_its_description_says() -> None:
    assert 0.85 <= coverage(10, clustered=True, use_groups=True) < 0.94
