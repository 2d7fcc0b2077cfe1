"""Means with the interval that they are known to, wherever the report shows one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_distill.stats import Interval, bootstrap_interval, share_difference_interval, share_interval

#: Fewer groups than these say too little of how much they vary: no interval is given.
FEWEST_GROUPS = 5
#: With fewer than these, an interval is given, and said to be too narrow (see `stats.bootstrap_interval`).
FEW_GROUPS = 10


@dataclass(frozen=True)
class Estimate:
    """A mean, over how many values, and how well it is known.

    Attributes:
        groups: Of values that are not independent of each other.
        interval: None where there are too few groups.
    """

    value: float
    n: int
    groups: int
    interval: Interval | None = None

    @property
    def settled(self) -> bool | None:
        """Of a difference, whether it is distinguishable from none; None where no interval says so."""
        return None if self.interval is None else not self.interval.spans_zero


#: Of what the values are: any numbers; shares from 0 to 1, such as what passed; differences of such.
Kind = Literal["any", "share", "share difference"]

_INTERVALS = {"any": bootstrap_interval, "share": share_interval, "share difference": share_difference_interval}


def estimate(values: Sequence[float], groups: Sequence[Hashable], *, kind: Kind = "any") -> Estimate | None:
    """The mean of values with its 95 % interval, whole groups drawn with replacement; None of no values.

    Args:
        kind: Of shares all or nothing, and of pairs none of which differ, an end is open all the same.
    """
    if not values:
        return None
    count = len(set(groups))
    interval = _INTERVALS[kind](values, groups=groups) if count >= FEWEST_GROUPS else None
    return Estimate(sum(values) / len(values), len(values), count, interval)
