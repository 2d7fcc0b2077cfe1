"""Agreement of raters against published worked examples, and where there is none to be had."""

from __future__ import annotations

import math
from collections.abc import Hashable
from itertools import chain, repeat
from typing import Literal

import numpy as np
import pytest

from mlx_distill.stats import cohen_kappa, krippendorff_alpha, pearson, spearman

_ = math.nan

Level = Literal["nominal", "ordinal", "interval"]
LEVELS: tuple[Level, ...] = ("nominal", "ordinal", "interval")

#: Krippendorff (2011), section C: four observers, twelve units, the last seen by one alone.
FOUR_OBSERVERS = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
)


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_four_observers(level: Level, alpha: float) -> None:
    assert krippendorff_alpha(FOUR_OBSERVERS, level) == pytest.approx(alpha, abs=5e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_alpha_of_two_observers_and_two_values(level: Level) -> None:
    """Krippendorff (2011), section A: 1 − 19 · 4 / (14 · 6). Two values differ by the same at every level."""
    ratings = [[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]
    assert krippendorff_alpha(ratings, level) == pytest.approx(1 - 19 * 4 / (14 * 6))


def test_alpha_of_two_observers_and_five_names() -> None:
    """Krippendorff (2011), section B: 0.692."""
    ratings = [["abcde".index(name) for name in said] for said in ("aabbdcccedda", "babbbccceddd")]
    assert krippendorff_alpha(ratings, "nominal") == pytest.approx(1 - 23 * 6 / 448)


@pytest.mark.parametrize("level", LEVELS)
def test_what_one_rater_alone_saw_does_not_count(level: Level) -> None:
    alpha = krippendorff_alpha(FOUR_OBSERVERS, level)
    assert krippendorff_alpha(FOUR_OBSERVERS[:, :-1], level) == alpha
    changed = FOUR_OBSERVERS.copy()
    changed[1, -1] = 1000
    assert krippendorff_alpha(changed, level) == alpha
    assert krippendorff_alpha(np.vstack([FOUR_OBSERVERS, np.full(12, _)]), level) == alpha
    shuffled = FOUR_OBSERVERS[[2, 0, 3, 1]][:, np.random.default_rng(0).permutation(12)]
    assert krippendorff_alpha(shuffled, level) == pytest.approx(alpha)


def test_each_level_knows_what_it_may() -> None:
    """Names may be exchanged at the nominal level, order is kept at the ordinal, and the scale at the interval one."""
    exchanged = np.array([_, 4, 1, 5, 2, 3])[np.nan_to_num(FOUR_OBSERVERS).astype(int)]
    stretched, shifted = np.exp(FOUR_OBSERVERS), 32 + 1.8 * FOUR_OBSERVERS
    for level, same, other in (
        ("nominal", (exchanged, stretched, shifted), ()),
        ("ordinal", (stretched, shifted), (exchanged,)),
        ("interval", (shifted,), (stretched, exchanged)),
    ):
        alpha = krippendorff_alpha(FOUR_OBSERVERS, level)
        assert [krippendorff_alpha(ratings, level) for ratings in same] == pytest.approx([alpha] * len(same))
        assert not any(krippendorff_alpha(ratings, level) == pytest.approx(alpha) for ratings in other)


@pytest.mark.parametrize("level", LEVELS)
def test_alpha_is_one_for_agreement_and_about_zero_for_chance(level: Level) -> None:
    random = np.random.default_rng(3)
    one = random.integers(0, 5, size=2000).astype(float)
    assert krippendorff_alpha([one, one, one], level) == 1
    assert krippendorff_alpha(random.integers(0, 5, size=(3, 2000)), level) == pytest.approx(0, abs=0.04)
    assert krippendorff_alpha([[0, 1] * 20, [1, 0] * 20], level) == pytest.approx(-1, abs=0.05)


@pytest.mark.parametrize(
    "ratings",
    [
        [[3, 3, 3], [3, 3, 3]],
        # The other value is one that nobody was there to agree with.
        [[3, 3, 4], [3, 3, _]],
        [[1, 2, 3]],
        [[1, _, 3], [_, 2, _]],
        [[_, _], [_, _]],
        np.empty((2, 0)),
        np.empty((0, 4)),
    ],
)
@pytest.mark.parametrize("level", LEVELS)
def test_no_alpha_where_nothing_could_be_disagreed_on(ratings: list[list[float]], level: Level) -> None:
    assert krippendorff_alpha(ratings, level) is None


def test_ratings_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        krippendorff_alpha([1, 2, 3], "nominal")
    with pytest.raises(ValueError, match="infinite"):
        krippendorff_alpha([[1, math.inf], [1, 2]], "interval")
    with pytest.raises(ValueError, match="'ratio' is not"):
        krippendorff_alpha([[1, 2], [1, 2]], "ratio")  # type: ignore[arg-type]


def said(table: list[list[int]]) -> tuple[list[int], list[int]]:
    """What two raters said, the first by row and the second by column of a table of counts, as 0, 1, 2 …"""
    cells = [repeat((i, j), count) for i, row in enumerate(table) for j, count in enumerate(row)]
    pairs = list(chain.from_iterable(cells))
    return [i for i, _ in pairs], [j for _, j in pairs]


#: Cohen (1960), table 1: 200 patients and three diagnoses, κ = 0.492.
PATIENTS = said([[88, 10, 2], [14, 40, 6], [18, 10, 12]])


def test_kappa_of_cohens_own_example() -> None:
    assert cohen_kappa(*PATIENTS) == pytest.approx(0.492, abs=5e-4)
    assert cohen_kappa(*PATIENTS) == pytest.approx((0.70 - 0.41) / (1 - 0.41))


def test_kappa_of_names() -> None:
    """50 proposals, 35 agreed on, half by chance: 0.4."""
    first, second = said([[20, 5], [10, 15]])
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    words: list[Hashable] = ["yes", ("no", 1)]
    assert cohen_kappa([words[i] for i in first], [words[j] for j in second]) == pytest.approx(0.4)
    assert cohen_kappa(first, second, "quadratic") == pytest.approx(0.4)


def test_weighted_kappa_by_hand() -> None:
    """Of (0, 0), (0, 2), (1, 1), (2, 1) the distances are 0, 2, 0, 1, and those of all sixteen cross pairs sum to 14.

    First rater 0, 0, 1, 2; second 0, 2, 1, 1: 0 is 0 + 2 + 1 + 1 away from these, twice; 1 is 1 + 1 + 0 + 0; 2 is
    2 + 0 + 1 + 1. Squared: 0 + 4 + 1 + 1 twice, 1 + 1, 4 + 0 + 1 + 1; observed 0, 4, 0, 1.
    """
    assert cohen_kappa([0, 0, 1, 2], [0, 2, 1, 1], "linear") == pytest.approx(1 - 4 * 3 / 14)
    assert cohen_kappa([0, 0, 1, 2], [0, 2, 1, 1], "quadratic") == pytest.approx(1 - 4 * 5 / 20)


def test_linear_kappa_is_that_of_its_thresholds() -> None:
    """Vanbelle and Albert (2009): observed and chance disagreement are sums over the tables cut in two."""
    first, second = np.array(PATIENTS)
    observed = expected = 0.0
    for cut in (1, 2):
        a, b = first >= cut, second >= cut
        observed += (a != b).mean()
        expected += a.mean() * (1 - b.mean()) + (1 - a.mean()) * b.mean()
    assert cohen_kappa(*PATIENTS, weights="linear") == pytest.approx(1 - observed / expected)


def test_quadratic_kappa_is_a_concordance() -> None:
    """Krippendorff (1970), Lin (1989): 2 cov / (var + var + (difference of means)²), of populations."""
    random = np.random.default_rng(8)
    first = random.integers(0, 11, size=300)
    second = np.clip(first + random.integers(-3, 5, size=300), 0, 10)
    concordance = (2 * np.cov(first, second, bias=True)[0, 1]) / (
        first.var() + second.var() + (first.mean() - second.mean()) ** 2
    )
    assert cohen_kappa(first.tolist(), second.tolist(), "quadratic") == pytest.approx(concordance)


def test_weights_are_distances_of_values_not_of_ranks() -> None:
    """A score that nobody gave still lies between."""
    near, far = ([0, 1, 2, 2], [0, 1, 2, 1]), ([0, 1, 9, 9], [0, 1, 9, 1])
    assert cohen_kappa(*near) == cohen_kappa(*far)
    assert cohen_kappa(*near, "linear") != pytest.approx(cohen_kappa(*far, "linear"))


def test_no_kappa_where_chance_would_agree_on_all() -> None:
    assert cohen_kappa(["a"] * 5, ["a"] * 5) is None
    assert cohen_kappa([4.5] * 5, [4.5] * 5, "linear") is None
    assert cohen_kappa([], []) is None
    assert cohen_kappa(["a"] * 5, ["b"] * 5) == 0
    assert cohen_kappa(["a", "b"], ["a", "b"]) == 1
    assert cohen_kappa(["a", "b"], ["b", "a"]) == -1


def test_kappa_refuses_what_it_cannot_weigh() -> None:
    with pytest.raises(ValueError, match="1 and 2 values"):
        cohen_kappa([1], [1, 2])
    with pytest.raises(ValueError, match="must be numbers"):
        cohen_kappa(["good", "bad"], ["bad", "bad"], "linear")
    with pytest.raises(ValueError, match="not finite"):
        cohen_kappa([1.0, math.inf], [1.0, 2.0], "quadratic")
    with pytest.raises(ValueError, match="'cubic' is not"):
        cohen_kappa([1, 2], [1, 2], "cubic")  # type: ignore[arg-type]


def test_pearson_of_anscombes_first_set() -> None:
    """Anscombe (1973): 0.816."""
    x = [10.0, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5]
    y = [8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68]
    assert pearson(x, y) == pytest.approx(0.8164, abs=5e-5)
    assert pearson(y, x) == pearson(x, y)
    assert pearson(x, [-3 * value + 7 for value in y]) == pytest.approx(-0.8164, abs=5e-5)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_pearson_of_a_line_is_one_at_any_scale(scale: float) -> None:
    x = [1.0, 2.0, 3.5, 7.0]
    assert pearson(x, [scale * value for value in x]) == pytest.approx(1)
    assert pearson([-scale * value for value in x], x) == pytest.approx(-1)


def test_spearman_by_hand() -> None:
    """Ten distinct pairs with Σ d² = 194: 1 − 6 · 194 / (10 · 99) = −29 / 165."""
    iq = [106.0, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7.0, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert spearman(iq, hours) == pytest.approx(-29 / 165)


def test_equal_values_share_their_ranks() -> None:
    """Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / √(4.5 · 5)."""
    assert spearman([1.0, 2.0, 2.0, 3.0], [10.0, 20.0, 30.0, 40.0]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_spearman_sees_order_alone() -> None:
    x = [3.0, 1.0, 4.0, 1.5, 9.0]
    assert spearman(x, [math.exp(value) for value in x]) == pytest.approx(1)
    assert pearson(x, [math.exp(value) for value in x]) != pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("of", [pearson, spearman])
def test_no_correlation_where_one_side_does_not_vary(of: type[pearson]) -> None:
    # Their mean is not 0.1 in floating point.
    assert of([0.1] * 3, [1.0, 2.0, 3.0]) is None
    assert of([1.0, 2.0, 3.0], [0.0] * 3) is None
    assert of([1.0], [2.0]) is None
    assert of([], []) is None
    with pytest.raises(ValueError, match="2 and 1 values"):
        of([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="not finite"):
        of([1.0, math.nan], [1.0, 2.0])
