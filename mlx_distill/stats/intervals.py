"""Intervals of means, where what was measured comes in groups that are not independent within."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

#: Draws times groups counted at once: a few MB, however many groups there are.
_COUNTS_AT_ONCE = 1_000_000

#: Resamples of a mean: with another seed an end then moves by about a hundredth of the interval's width.
DRAWS = 10_000

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval that it is known to.

    Attributes:
        mean: Of all values; for a rate at equal length, that rate.
        low: Lower end of the interval.
        high: Upper end.
        n: Values.
        groups: Of values that are not independent of each other.
        level: Share of such intervals that hold the true mean.
    """

    mean: float
    low: float
    high: float
    n: int
    groups: int
    level: float

    def holds(self, value: float) -> bool:
        """Whether what was measured is not distinguishable from a value, such as 0.5 for a win rate."""
        return self.low <= value <= self.high

    @property
    def spans_zero(self) -> bool:
        """Whether what was measured, such as a difference, is not distinguishable from none."""
        return self.holds(0.0)


@dataclass(frozen=True)
class Grouping:
    """Values by the groups that are drawn whole.

    Attributes:
        members: Of each value the number of its group (N).
        sizes: Values of each group (G).
    """

    members: NDArray[np.intp]
    sizes: NDArray[np.float64]

    @classmethod
    def of(cls, groups: Sequence[Hashable] | None, values: int) -> Self:
        """The groups in the order in which they are first met; each value its own without them.

        Raises:
            ValueError: Values and groups differ in number.
        """
        names = range(values) if groups is None else groups
        if len(names) != values:
            raise ValueError(f"{values} values and {len(names)} groups")
        numbers: dict[Hashable, int] = {}
        members = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.intp)
        return cls(members, np.bincount(members, minlength=len(numbers)).astype(np.float64))

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def effective(self) -> float:
        """How many groups of one size say as much of a mean: (Σ size)² / Σ size², Kish (1965)."""
        return float(self.sizes.sum() ** 2 / np.square(self.sizes).sum())

    def resamples(self, draws: int, seed: int, width: int) -> Iterator[NDArray[np.int64]]:
        """How often each group is drawn when as many as there are are drawn with replacement (draws, G), in pieces.

        Args:
            width: Numbers that the caller holds for each draw.
        """
        random = np.random.default_rng(seed)
        at_once = max(1, _COUNTS_AT_ONCE // width)
        for start in range(0, draws, at_once):
            rows = min(at_once, draws - start)
            # Counted all at once, as the cells of a table (rows, G).
            cells = random.integers(len(self), size=(rows, len(self))) + len(self) * np.arange(rows)[:, None]
            yield np.bincount(cells.ravel(), minlength=rows * len(self)).reshape(rows, len(self))

    def interval(self, estimate: float, resampled: NDArray[np.float64], level: float) -> Interval:
        """The expanded percentile interval of what the resamples gave (draws)."""
        tail = expanded_tail(self.effective, level)
        low, high = np.quantile(resampled, [tail, 1 - tail])
        return Interval(estimate, float(low), float(high), len(self.members), len(self), level)


def expanded_tail(groups: float, level: float) -> float:
    """The share of resamples to leave out on each side: Φ(−√(n / (n − 1)) · t), t of n − 1 degrees of freedom.

    Resampling n values takes their spread for smaller than it is, by √((n − 1) / n), and knows nothing of how
    uncertain that spread is; a t-interval makes up for both.

    Source: Hesterberg (2015), "What Teachers Should Know About the Bootstrap", its expanded percentile interval.

    Args:
        groups: n, more than 1; need not be whole.
        level: Of the interval.
    """
    t = _t_quantile((1 + level) / 2, max(groups - 1, 1.0))
    return NormalDist().cdf(-np.sqrt(groups / (groups - 1)) * t)


def _t_quantile(share: float, degrees: float) -> float:
    """Quantile of Student's t at a share of at least 1/2, to about four digits.

    With t = √ν · tan θ its density is proportional to cos^(ν − 1) θ, which is smooth and of finite range.
    """
    # Beyond this it is the normal distribution's, and would be narrower than the steps.
    degrees = min(degrees, 1e4)
    angles = np.linspace(0, np.pi / 2, 10_001)
    density = np.cos(angles) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(degrees) * np.tan(np.interp(2 * share - 1, below / below[-1], angles)))


def bootstrap_interval(
    values: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """The expanded percentile bootstrap of a mean, whole groups drawn with replacement.

    From seven groups on, of unequal sizes too, simulated 95 % intervals hold the true mean 93 to 97 times in 100. It is
    too narrow with fewer (five: 92 times, three: 76), since it ends at the most extreme groups, and where the groups'
    means are strongly skewed: 90 to 94 times if exponential, 85 if all but a few groups of 60 are the same.

    Sources: Hesterberg (2015), with the effective number of groups (Kish 1965) where they differ in size.

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
    samples = finite(values)
    grouping = Grouping.of(groups, len(samples))
    if len(grouping) < 2:
        return None
    sums = np.bincount(grouping.members, weights=samples)
    means = [
        (counts @ sums) / (counts @ grouping.sizes) for counts in grouping.resamples(draws, seed, width=len(grouping))
    ]
    return grouping.interval(float(samples.mean()), np.concatenate(means), level)


def share_interval(
    values: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """`bootstrap_interval` of values from 0 to 1, such as what passed or won.

    Where all are 0 or all are 1, resampling sees no doubt at all. There the open end is the exact binomial one with
    each group for one trial: 1 − (α/2)^(1/groups) or (α/2)^(1/groups), α = 1 − level.

    Source: Clopper and Pearson (1934), "The Use of Confidence or Fiducial Limits", for that end.

    Returns:
        None where there are fewer than two groups.

    Raises:
        ValueError: As `bootstrap_interval`; or a value is below 0 or above 1.
    """
    samples = shares(values)
    found = bootstrap_interval(values, groups=groups, draws=draws, seed=seed, level=level)
    return None if found is None else open_end(found, samples)


def share_difference_interval(
    values: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """`bootstrap_interval` of differences of paired shares, from −1 to 1, such as what one passes and another does not.

    Where no pair differs, resampling sees no doubt at all. There each end is the exact binomial one, as in
    `share_interval`, of a difference that was not seen once in as many trials as there are groups.

    Returns:
        None where there are fewer than two groups.

    Raises:
        ValueError: As `bootstrap_interval`; or a value is below −1 or above 1.
    """
    if any(not -1 <= value <= 1 for value in values):
        raise ValueError("a difference of shares is below -1 or above 1")
    found = bootstrap_interval(values, groups=groups, draws=draws, seed=seed, level=level)
    if found is None or any(values):
        return found
    unseen = 1 - float(((1 - level) / 2) ** (1 / found.groups))
    return Interval(found.mean, -unseen, unseen, found.n, found.groups, found.level)


def open_end(found: Interval, samples: NDArray[np.float64]) -> Interval:
    """The interval of a share, its open end the exact one where all samples are 0 or all are 1."""
    end = float(((1 - found.level) / 2) ** (1 / found.groups))
    low = min(found.low, end) if (samples == 1).all() else found.low
    high = max(found.high, 1 - end) if (samples == 0).all() else found.high
    return Interval(found.mean, low, high, found.n, found.groups, found.level)


def paired_difference(
    a: Mapping[Key, float],
    b: Mapping[Key, float],
    groups: Mapping[Key, Hashable],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """`bootstrap_interval` of a − b over the keys that both have; `spans_zero` says that they cannot be told apart.

    Args:
        groups: Of each key. It may hold more keys; its order is the order of the draws.

    Returns:
        None where the shared keys are of fewer than two groups.

    Raises:
        ValueError: A shared key has no group, or its value is not finite.
    """
    missing = [key for key in a if key in b and key not in groups]
    if missing:
        raise ValueError(f"{missing[0]!r} has no group")
    keys = [key for key in groups if key in a and key in b]
    differences = [a[key] - b[key] for key in keys]
    return bootstrap_interval(differences, groups=[groups[key] for key in keys], draws=draws, seed=seed, level=level)


def finite(values: Sequence[float]) -> NDArray[np.float64]:
    """The values as an array (N).

    Raises:
        ValueError: One is not finite.
    """
    samples = np.asarray(values, dtype=np.float64)
    if not np.isfinite(samples).all():
        raise ValueError("a value is not finite")
    return samples


def shares(values: Sequence[float]) -> NDArray[np.float64]:
    """The values as an array (N).

    Raises:
        ValueError: One is not from 0 to 1.
    """
    samples = finite(values)
    if ((samples < 0) | (samples > 1)).any():
        raise ValueError("a value is not from 0 to 1")
    return samples
