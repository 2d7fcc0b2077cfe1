"""Intervals of means, where what was measured comes in groups that are not independent within."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

#: Draws times groups counted at once: a few MB, however many groups there are.
_COUNTS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Interval:
    """A mean with the interval that it is known to.

    Attributes:
        mean: Of all values.
        low: Lower end of the interval.
        high: Upper end.
        n: Values.
        groups: Of values that are not independent of each other.
        level: Share of such intervals that hold the true mean, where there are enough groups.
    """

    mean: float
    low: float
    high: float
    n: int
    groups: int
    level: float

    @property
    def spans_zero(self) -> bool:
        """Whether the values are not distinguishable from none."""
        return self.low <= 0 <= self.high


def bootstrap_interval(
    values: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """The percentile bootstrap of a mean, whole groups drawn with replacement.

    With few groups it is too narrow: at ten it holds the true mean about nine times in ten where it says 95 %.

    Args:
        values: For a difference of two, the differences of the pairs.
        groups: Of each value; each value is its own without them.
        draws: Resamples.
        seed: Of the draws, so that the same values give the same interval.
        level: Between 0 and 1.

    Returns:
        None where there are fewer than two groups: one says nothing of how much they vary.

    Raises:
        ValueError: Values and groups differ in number, or a value is not finite.
    """
    samples = np.asarray(values, dtype=np.float64)
    if not np.isfinite(samples).all():
        raise ValueError("a value is not finite")
    names = range(len(samples)) if groups is None else groups
    if len(names) != len(samples):
        raise ValueError(f"{len(samples)} values and {len(names)} groups")
    numbers: dict[Hashable, int] = {}
    members = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.intp)
    if len(numbers) < 2:
        return None
    sums = np.bincount(members, weights=samples)
    sizes = np.bincount(members).astype(np.float64)
    random = np.random.default_rng(seed)
    chosen = np.full(len(numbers), 1 / len(numbers))
    means = np.empty(draws)
    at_once = max(1, _COUNTS_AT_ONCE // len(numbers))
    for start in range(0, draws, at_once):
        counts = random.multinomial(len(numbers), chosen, size=min(at_once, draws - start))
        means[start : start + len(counts)] = (counts @ sums) / (counts @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(samples.mean()), float(low), float(high), len(samples), len(numbers), level)
