"""What numbers are known to: intervals where measurements come in groups, win rates, and how far judges agree.

Every function is pure. None of them returns a number where there is none: undefined is None, and what is no
measurement at all (not finite, of unequal number) is a ValueError.
"""

from mlx_distill.stats.duels import Choice, flip_rate, length_controlled_win_rate, position_bias, win_rate
from mlx_distill.stats.intervals import (
    Interval,
    bootstrap_interval,
    paired_difference,
    share_difference_interval,
    share_interval,
)
from mlx_distill.stats.reliability import agreement_of_scores, cohen_kappa, krippendorff_alpha, pearson, spearman

__all__ = [
    "Choice",
    "Interval",
    "agreement_of_scores",
    "bootstrap_interval",
    "cohen_kappa",
    "flip_rate",
    "krippendorff_alpha",
    "length_controlled_win_rate",
    "paired_difference",
    "pearson",
    "position_bias",
    "share_difference_interval",
    "share_interval",
    "spearman",
    "win_rate",
]
