"""pass@k is the share of all choices of k answers that hold one which passes."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distill.evaluation import mean_pass_at_k, pass_at_k

SMALL = [(n, c, k) for n in range(1, 8) for c in range(n + 1) for k in range(1, n + 1)]


@pytest.mark.parametrize(("n", "c", "k"), SMALL)
def test_it_is_what_counting_all_choices_gives(n: int, c: int, k: int) -> None:
    passing = set(range(c))
    choices = list(combinations(range(n), k))
    share = Fraction(sum(not passing.isdisjoint(choice) for choice in choices), len(choices))
    assert pass_at_k(n, c, k) == pytest.approx(float(share), abs=1e-15)


@given(st.data())
def test_it_agrees_with_exact_binomials(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 3000))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)
    assert 0 <= pass_at_k(n, c, k) <= 1
    assert pass_at_k(n, c, 1) == pytest.approx(c / n, abs=1e-12)


def test_numbers_beyond_floating_point_do_no_harm() -> None:
    assert pass_at_k(10**6, 1, 10**6 - 1) == pytest.approx(1 - 1e-6)
    assert pass_at_k(10**9, 5, 1) == pytest.approx(5e-9, rel=1e-6)
    assert pass_at_k(100_000, 50_000, 50_000) == 1.0
    assert pass_at_k(10**6, 0, 10) == 0.0


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 1), (5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6)])
def test_what_cannot_be_is_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="1 <= k <= n"):
        pass_at_k(n, c, k)


def test_the_mean_is_over_tasks_not_over_answers() -> None:
    assert mean_pass_at_k([(1, 1), (100, 0)], 1) == 0.5
    assert mean_pass_at_k([(2, 1), (4, 2)], 2) == pytest.approx((1.0 + 5 / 6) / 2)
    with pytest.raises(ValueError, match="no tasks"):
        mean_pass_at_k([], 1)
    with pytest.raises(ValueError, match="1 <= k <= n"):
        mean_pass_at_k([(5, 5), (1, 1)], 2)
