"""Intervals: what is exact is exact, and they hold the true mean as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_distill.stats import Interval, bootstrap_interval, paired_difference, share_difference_interval, share_interval
from mlx_distill.stats.intervals import Grouping, _t_quantile, expanded_tail


def known(found: Interval | None) -> Interval:
    assert found is not None
    return found


def test_the_same_values_give_the_same_interval() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    first = known(bootstrap_interval(values))
    assert first == bootstrap_interval(values)
    assert (first.mean, first.n, first.groups, first.level) == (3.75, 4, 4, 0.95)
    assert 1 <= first.low < first.mean < first.high <= 8


def test_equal_values_leave_no_doubt() -> None:
    found = known(bootstrap_interval([2.5] * 6))
    assert (found.low, found.mean, found.high) == (2.5, 2.5, 2.5)
    assert not found.spans_zero
    assert found.holds(2.5)


@pytest.mark.parametrize(("level", "low", "high"), [(0.2, 0.5, 0.5), (0.35, 0.0, 1.0), (0.6, 0.0, 1.0)])
def test_two_values_are_known_exactly(level: float, low: float, high: float) -> None:
    """Resampled, two values give 0, 1/2 and 1 with chances 1/4, 1/2, 1/4.

    With one degree of freedom t is tan(π · level / 2): at 0.35 the tail is Φ(−√2 · 0.613) = 0.193, less than 1/4, where
    the percentile interval without expansion leaves out 0.325 and would end at 1/2.
    """
    found = known(bootstrap_interval([0.0, 1.0], level=level))
    assert (found.low, found.high) == (low, high)
    assert expanded_tail(2, 0.35) == pytest.approx(0.1931, abs=1e-4)


@pytest.mark.parametrize(("degrees", "t"), [(1, 12.7062), (4, 2.7764), (9, 2.2622), (19, 2.0930), (1e9, 1.9600)])
def test_students_t_is_that_of_the_tables(degrees: float, t: float) -> None:
    assert _t_quantile(0.975, degrees) == pytest.approx(t, rel=2e-4)


def test_the_expansion_vanishes_with_many_groups() -> None:
    tails = [expanded_tail(groups, 0.95) for groups in (1 + 1e-9, 1.5, 3, 20, 500, 1e6)]
    assert tails == sorted(tails)
    assert tails[0] == 0
    assert tails[-1] == pytest.approx(0.025, rel=1e-3)


def test_unequal_groups_count_for_fewer() -> None:
    assert Grouping.of(["a", "b", "c"] * 5, 15).effective == pytest.approx(3)
    assert Grouping.of(["a", "a", "a", "b"], 4).effective == pytest.approx(1.6)


@pytest.mark.parametrize("groups", [None, ["a"], ["a", "a", "a"]])
def test_one_group_has_no_interval(groups: list[str] | None) -> None:
    assert bootstrap_interval([1.0] * len(groups or [1]), groups=groups) is None
    assert bootstrap_interval([], groups=None) is None
    assert share_interval([], groups=[]) is None


def test_groups_of_equal_values_count_as_one_value_each() -> None:
    single = known(bootstrap_interval([1.0, 2.0, 5.0]))
    repeated = known(bootstrap_interval([1.0, 2.0, 5.0] * 7, groups=["x", "y", "z"] * 7))
    assert (repeated.low, repeated.high, repeated.groups) == (single.low, single.high, 3)
    alone = known(bootstrap_interval([1.0, 2.0, 5.0] * 7))
    assert alone.high - alone.low < 0.6 * (repeated.high - repeated.low)


def test_draws_in_pieces_are_the_draws_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whole numbers, whose sums are exact in any order.
    values = [float(value) for value in np.random.default_rng(1).integers(0, 100, size=50)]
    whole = bootstrap_interval(values, draws=1000)
    monkeypatch.setattr("mlx_distill.stats.intervals._COUNTS_AT_ONCE", 333)
    assert bootstrap_interval(values, draws=1000) == whole


@pytest.mark.parametrize("bad", [[1.0, float("nan")], [float("inf"), 1.0]])
def test_what_is_no_number_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_interval(bad)
    with pytest.raises(ValueError, match="not finite"):
        share_interval(bad)


def test_every_value_needs_its_group() -> None:
    with pytest.raises(ValueError, match="2 values and 3 groups"):
        bootstrap_interval([1.0, 2.0], groups=["a", "b", "c"])


TRUE = {"scores": 0.0, "passes": 0.65, "independent": 0.0}


def coverage(families: int, kind: str, *, use_groups: bool = True, trials: int = 1000) -> float:
    """How often the interval holds the true mean. Families are of 1 to about 20 values, four on average."""
    random = np.random.default_rng(1)
    held = 0
    for trial in range(trials):
        sizes = random.geometric(0.25, size=families)
        names = np.repeat(np.arange(families), sizes)
        if kind == "passes":
            values = (random.random(len(names)) < random.beta(1.3, 0.7, size=families)[names]).astype(float)
        else:
            spread = 1.0 if kind == "scores" else 0.0
            values = spread * random.normal(size=families)[names] + 0.5 * random.normal(size=len(names))
        groups = names.tolist() if use_groups else None
        held += known(bootstrap_interval(values.tolist(), groups=groups, draws=800, seed=trial)).holds(TRUE[kind])
    return held / trials


@pytest.mark.parametrize(("families", "trials"), [(20, 2000), (60, 1000)])
@pytest.mark.parametrize("kind", TRUE)
def test_it_holds_the_true_mean_as_often_as_it_says(families: int, trials: int, kind: str) -> None:
    """2,000 trials know a share of 95 % to ±1 point, 1,000 to ±1.4."""
    assert 0.93 <= coverage(families, kind, trials=trials) <= 0.97


@pytest.mark.parametrize(("kind", "at_most"), [("scores", 0.7), ("passes", 0.8)])
def test_without_its_groups_it_would_claim_too_much(kind: str, at_most: float) -> None:
    assert coverage(40, kind, use_groups=False, trials=200) < at_most


def test_with_three_groups_it_is_too_narrow_as_its_description_says() -> None:
    assert coverage(3, "scores", trials=300) < 0.9


@pytest.mark.parametrize(("groups", "end"), [(8, 0.6306), (20, 0.8316)])
def test_a_clean_sweep_is_not_certain(groups: int, end: float) -> None:
    """Clopper and Pearson's limits of 8 of 8 and 20 of 20 are in tables."""
    won = known(share_interval([1.0] * groups))
    assert (won.low, won.mean, won.high) == (pytest.approx(end, abs=1e-4), 1.0, 1.0)
    lost = known(share_interval([0.0] * groups))
    assert (lost.low, lost.mean, lost.high) == (0.0, 0.0, pytest.approx(1 - end, abs=1e-4))
    repeated = known(share_interval([1.0] * groups * 5, groups=list(range(groups)) * 5))
    assert repeated.low == won.low


def test_a_share_between_is_the_bootstraps() -> None:
    values = [1.0, 0.0, 0.5, 1.0, 1.0]
    assert share_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    with pytest.raises(ValueError, match="not from 0 to 1"):
        share_interval([0.5, 1.01])


def test_a_difference_is_over_shared_keys_alone() -> None:
    a = {"p": 3.0, "q": 5.0, "r": 1.0, "only a": 100.0}
    b = {"r": 2.0, "q": 1.0, "p": 1.0, "only b": -100.0}
    groups = {"p": "x", "q": "y", "r": "y", "unused": "z"}
    found = known(paired_difference(a, b, groups))
    assert found == bootstrap_interval([2.0, 4.0, -1.0], groups=["x", "y", "y"])
    assert (found.n, found.groups) == (3, 2)
    assert found.mean == pytest.approx(5 / 3)


def test_a_difference_turned_round_is_the_same_interval_turned_round() -> None:
    random = np.random.default_rng(5)
    a = {key: float(random.normal()) for key in range(40)}
    b = {key: float(random.normal()) for key in reversed(range(40))}
    groups = {key: key // 3 for key in range(40)}
    there, back = known(paired_difference(a, b, groups)), known(paired_difference(b, a, groups))
    assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))
    assert there.spans_zero == back.spans_zero


def test_pairs_tell_apart_what_two_means_would_not() -> None:
    random = np.random.default_rng(6)
    hard = random.normal(scale=10, size=50)
    a = {key: float(hard[key] + 0.5 + 0.3 * random.normal()) for key in range(50)}
    b = {key: float(hard[key] + 0.3 * random.normal()) for key in range(50)}
    found = known(paired_difference(a, b, {key: key for key in range(50)}))
    assert not found.spans_zero
    assert found.holds(0.5)
    alone = known(bootstrap_interval(list(a.values())))
    assert alone.holds(known(bootstrap_interval(list(b.values()))).mean)


def test_a_key_without_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match="'q' has no group"):
        paired_difference({"p": 1.0, "q": 2.0}, {"p": 1.0, "q": 2.0}, {"p": "x"})
    assert paired_difference({"p": 1.0}, {"q": 2.0}, {}) is None
    with pytest.raises(ValueError, match="not finite"):
        paired_difference({"p": 1.0, "q": math.inf}, {"p": 1.0, "q": 2.0}, {"p": 0, "q": 1})


@pytest.mark.parametrize("groups", [2, 8, 15, 94])
def test_pairs_none_of_which_differ_are_not_known_to_be_alike(groups: int) -> None:
    """As many trials without a success: 1 − 0.025^(1/n), which for 15 is 21.8 points (Clopper-Pearson)."""
    found = share_difference_interval([0.0] * 2 * groups, groups=[at % groups for at in range(2 * groups)])
    assert found is not None
    assert (found.mean, found.groups) == (0, groups)
    assert found.high == -found.low == pytest.approx(1 - 0.025 ** (1 / groups))
    one = share_difference_interval([1.0] + [0.0] * (2 * groups - 1), groups=[at % groups for at in range(2 * groups)])
    plain = bootstrap_interval([1.0] + [0.0] * (2 * groups - 1), groups=[at % groups for at in range(2 * groups)])
    assert one == plain


def test_a_difference_of_shares_is_at_most_one() -> None:
    with pytest.raises(ValueError, match="below -1 or above 1"):
        share_difference_interval([0.5, 1.5])
    assert share_difference_interval([0.0], groups=["one"]) is None
