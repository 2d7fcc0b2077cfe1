"""Rounding by chance: exact where it can be, right on average where it cannot."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.backends.mlx.rounding import key_of, rounded

HALF = [mx.bfloat16, mx.float16]


def _values(n: int = 20_000) -> np.ndarray:
    random = np.random.default_rng(3)
    return (random.standard_normal(n) * 10.0 ** random.uniform(-7, 3, n)).astype(np.float32)


@pytest.mark.parametrize("dtype", HALF)
def test_what_the_type_can_hold_stays_as_it_is(dtype: mx.Dtype) -> None:
    every = mx.array(np.arange(2**16, dtype=np.uint16)).view(dtype)
    again = rounded(every.astype(mx.float32), dtype, key_of("all", 0))
    known = ~np.isnan(np.array(every.astype(mx.float32)))
    tiny = np.abs(np.array(every.astype(mx.float32))) < 2.0**-118
    keep = known & ~tiny if dtype == mx.bfloat16 else known
    np.testing.assert_array_equal(np.array(again.view(mx.uint16))[keep], np.arange(2**16, dtype=np.uint16)[keep])
    assert np.isnan(np.array(again.astype(mx.float32))[~known]).all()


@pytest.mark.parametrize("dtype", HALF)
def test_a_value_goes_to_one_of_its_two_neighbours(dtype: mx.Dtype) -> None:
    values = _values()
    found = np.array(rounded(mx.array(values), dtype, key_of("neighbours", 0)).astype(mx.float32), dtype=np.float64)
    bits, smallest = (7, -126) if dtype == mx.bfloat16 else (10, -14)
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.abs(values.astype(np.float64)))), smallest) - bits)
    assert (np.abs(found - values) < step).all()
    assert (found == np.round(found / step) * step).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_between_two_goes_to_each_as_often_as_it_is_near(dtype: mx.Dtype, share: float, sign: int) -> None:
    step = 2.0**-7 if dtype == mx.bfloat16 else 2.0**-10
    n = 40_000
    found = np.array(
        rounded(mx.full((n,), sign * (1 + share * step), mx.float32), dtype, key_of("share", 7)).astype(mx.float32)
    )
    assert set(np.abs(found)) == {1.0, 1.0 + step}
    # Four standard deviations of a binomial share; a wrong rounding is off by tenths.
    assert abs((np.abs(found) > 1).mean() - share) < 4 * np.sqrt(share * (1 - share) / n)


@pytest.mark.parametrize("dtype", HALF)
def test_small_changes_of_many_weights_are_kept_in_their_sum(dtype: mx.Dtype) -> None:
    random = np.random.default_rng(5)
    base = mx.array(np.abs(random.standard_normal((64, 4096))).astype(np.float32)).astype(dtype).astype(mx.float32)
    wanted = base * (1 + 2.0**-6 * (2.0**-8 if dtype == mx.bfloat16 else 2.0**-11))
    kept = (rounded(wanted, dtype, key_of("sum", 0)).astype(mx.float32) - base).sum().item()
    nearest = (wanted.astype(dtype).astype(mx.float32) - base).sum().item()
    # Of 262,144 changes: the chance of their sum is some 2 % of it.
    assert nearest == 0
    assert kept == pytest.approx((wanted - base).sum().item(), rel=0.1)


def test_a_matrix_has_its_own_chance_and_has_it_again() -> None:
    values = mx.array(_values())
    first, again, other, further = (
        np.array(rounded(values, mx.bfloat16, key_of(name, row)).astype(mx.float32))
        for name, row in (("a", 0), ("a", 0), ("b", 0), ("a", 512))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first != further).any()


def test_float32_is_left_alone() -> None:
    values = mx.array(_values())
    np.testing.assert_array_equal(np.array(rounded(values, mx.float32, key_of("x", 0))), np.array(values))
