"""How far raters agree: Krippendorff's alpha, Cohen's kappa, and the correlations of Pearson and Spearman.

What no number can be had for is None, such as the agreement of raters who all said the same of everything: whether they
could have told anything apart was not seen.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_distill.stats.intervals import Key, finite

Level = Literal["nominal", "ordinal", "interval"]
Weights = Literal["linear", "quadratic"]


def krippendorff_alpha(ratings: ArrayLike, level: Level) -> float | None:
    """Krippendorff's alpha: 1 − D_o / D_e, observed over expected disagreement; 1 is full agreement, 0 is chance.

    With n_uc raters who gave unit u the value c, m_u ratings of u, o_ck = Σ_u n_uc (n_uk − [c = k]) / (m_u − 1),
    n_c = Σ_k o_ck and n = Σ_c n_c: alpha = 1 − (n − 1) Σ o_ck δ²_ck / Σ n_c n_k δ²_ck. The difference δ² is [c ≠ k] at
    the nominal level, (Σ_{g=c..k} n_g − (n_c + n_k) / 2)² at the ordinal, and (c − k)² at the interval level.

    Source: Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability".

    Args:
        ratings: (raters, units), NaN where a rater left a unit out. A unit with fewer than two ratings does not count.
        level: Of the values. At the nominal one they are names, at the ordinal one only their order counts.

    Returns:
        None where no unit has two ratings, or all ratings that count are the same.

    Raises:
        ValueError: The ratings are not (raters, units), one is infinite, or there is no such level.
    """
    table = np.asarray(ratings, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"ratings have shape {table.shape}, not (raters, units)")
    if np.isinf(table).any():
        raise ValueError("a rating is infinite")
    table = table[:, (~np.isnan(table)).sum(axis=0) >= 2]
    given = ~np.isnan(table)
    values, numbers = np.unique(table[given], return_inverse=True)
    counts = np.zeros((table.shape[1], len(values)))
    np.add.at(counts, (np.nonzero(given)[1], numbers), 1)
    scaled = counts / np.maximum(counts.sum(axis=1, keepdims=True) - 1, 1)
    coincidences = scaled.T @ counts - np.diag(scaled.sum(axis=0))
    totals = counts.sum(axis=0)
    differences = _squared_differences(values, totals, level)
    expected = float(totals @ differences @ totals)
    if expected == 0:
        return None
    return float(1 - (totals.sum() - 1) * (coincidences * differences).sum() / expected)


def _squared_differences(values: NDArray[np.float64], totals: NDArray[np.float64], level: Level) -> NDArray[np.float64]:
    """δ² of each value to each (V, V); `totals` is how often each was given."""
    match level:
        case "nominal":
            return 1 - np.eye(len(values))
        case "ordinal":
            # The middle of each value's ranks: two of them differ by the ratings between, each end for half.
            return np.square(np.subtract.outer(np.cumsum(totals) - totals / 2, np.cumsum(totals) - totals / 2))
        case "interval":
            return np.square(np.subtract.outer(values, values))
    raise ValueError(f"{level!r} is not nominal, ordinal or interval")


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable], weights: Weights | None = None) -> float | None:
    """Cohen's kappa: 1 − Σ w·o / Σ w·e, observed over chance disagreement of two raters; 1 is full agreement.

    o is the share of items on which the first said i and the second j, e the product of how often each says so, and w
    is [i ≠ j] without weights, |i − j| with linear ones and (i − j)² with quadratic ones.

    Sources: Cohen (1960), "A Coefficient of Agreement for Nominal Scales"; Cohen (1968), "Weighted Kappa".

    Args:
        a: What the first rater said of each item.
        b: The second.
        weights: With any, what was said is numbers, and their own distances count, not their ranks.

    Returns:
        None where there are no items, or both said one and the same of all.

    Raises:
        ValueError: They differ in number; there are no such weights; or with weights a value is not a finite number.
    """
    _check_equal(len(a), len(b))
    if weights not in (None, "linear", "quadratic"):
        raise ValueError(f"{weights!r} is not linear or quadratic")
    numbers: dict[Hashable, int] = {}
    first, second = (np.array([numbers.setdefault(v, len(numbers)) for v in said], dtype=np.intp) for said in (a, b))
    if weights is None:
        distances = 1 - np.eye(len(numbers))
    else:
        values = _numbers(list(numbers))
        gaps = np.abs(np.subtract.outer(values, values))
        distances = gaps if weights == "linear" else np.square(gaps)
    often_first, often_second = (np.bincount(said, minlength=len(numbers)) for said in (first, second))
    expected = float(often_first @ distances @ often_second)
    if expected == 0:
        return None
    return float(1 - len(first) * distances[first, second].sum() / expected)


def agreement_of_scores(scores: Sequence[Mapping[Key, float]]) -> tuple[float | None, int]:
    """Krippendorff's alpha, for intervals, of what several gave scores to, and how much more than one of them did.

    Args:
        scores: Of each rater, by what was rated; each may have left out some.
    """
    shared = [
        key for key in dict.fromkeys(key for own in scores for key in own) if sum(key in own for own in scores) > 1
    ]
    if not shared:
        return None, 0
    ratings = [[own.get(key, np.nan) for key in shared] for own in scores]
    return krippendorff_alpha(ratings, level="interval"), len(shared)


def _numbers(labels: list[Hashable]) -> NDArray[np.float64]:
    values = [float(label) for label in labels if isinstance(label, int | float | np.number)]
    if len(values) != len(labels):
        raise ValueError("with weights, what was said must be numbers")
    return finite(values)


def pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's correlation: Σ (a − ā)(b − b̄) / √(Σ (a − ā)² · Σ (b − b̄)²).

    Returns:
        None where there are fewer than two pairs, or one side does not vary.

    Raises:
        ValueError: They differ in number, or a value is not finite.
    """
    _check_equal(len(a), len(b))
    first, second = finite(a), finite(b)
    if len(first) == 0 or (first == first[0]).all() or (second == second[0]).all():
        return None
    first, second = _centred(first), _centred(second)
    found = float(first @ second / np.sqrt((first @ first) * (second @ second)))
    return min(1.0, max(-1.0, found))


def _centred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Less their mean, and of a size whose squares are neither lost nor infinite."""
    scaled: NDArray[np.float64] = values / np.abs(values).max()
    scaled -= scaled.mean()
    scaled /= np.abs(scaled).max()
    return scaled


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks, equal values sharing the mean of theirs.

    Returns:
        None where there are fewer than two pairs, or one side does not vary.

    Raises:
        ValueError: They differ in number, or a value is not finite.
    """
    _check_equal(len(a), len(b))
    return pearson(_ranks(finite(a)), _ranks(finite(b)))


def _ranks(values: NDArray[np.float64]) -> list[float]:
    """The rank of each value from 1 (N)."""
    _, numbers, counts = np.unique(values, return_inverse=True, return_counts=True)
    middles = np.cumsum(counts) - (counts - 1) / 2
    return [float(rank) for rank in middles[numbers]]


def _check_equal(first: int, second: int) -> None:
    if first != second:
        raise ValueError(f"{first} and {second} values are not pairs")
