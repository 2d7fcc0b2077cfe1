"""Pairwise judging: how often one side wins, also at equal length, and how far the order of the answers decides."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlx_distill.stats.intervals import DRAWS, Grouping, Interval, finite, open_end, share_interval, shares

#: A verdict on a pair seen in one order: whether the answer shown first is better, or the one shown second.
Choice = Literal["first", "second", "tie"]

#: Resamples of a regression, each of which is fitted anew.
_REGRESSIONS = 2_000

#: Holds the coefficients finite where lengths separate wins from losses; 100 outcomes weigh 2,500 times as much.
_RIDGE = 0.01

_MAX_STEPS = 100

#: A verdict with the answers swapped, in the words of the other order.
_SWAPPED: dict[Choice, Choice] = {"first": "second", "second": "first", "tie": "tie"}


def win_rate(
    duels: Sequence[float], groups: Sequence[Hashable] | None = None, *, draws: int = DRAWS, seed: int = 0
) -> Interval | None:
    """The share of duels won, ties for half, with its 95 % interval (`share_interval`).

    `holds(0.5)` says that neither side is distinguishably better.

    Args:
        duels: 1 for a win, 0.5 for a tie, 0 for a loss; for a pair judged in both orders, the mean of the two.
        groups: Of each duel; each is its own without them.

    Returns:
        None where there are fewer than two groups.

    Raises:
        ValueError: Duels and groups differ in number, or a duel is not from 0 to 1.
    """
    return share_interval(duels, groups=groups, draws=draws, seed=seed)


def length_controlled_win_rate(
    outcomes: Sequence[float],
    length_differences: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    draws: int = _REGRESSIONS,
    seed: int = 0,
) -> Interval | None:
    """The win rate if both answers were of one length, with its 95 % bootstrap interval.

    The regression P(win) = σ(θ + φ · tanh(d / s)) is fitted to the outcomes, d being the length differences and s their
    standard deviation (of all duels, in every resample too); the rate is σ(θ). Ties are fractional responses
    (Papke and Wooldridge 1996).

    Source: Dubois, Galambosi, Liang and Hashimoto (2024), "Length-Controlled AlpacaEval". Simplified: without its term
    for the difficulty of each instruction, which needs the duels of many models, and with a small ridge on θ and φ as
    its only regularization.

    Args:
        outcomes: Of each duel: 1 for a win, 0.5 for a tie, 0 for a loss.
        length_differences: Length of the answer less that of its opponent, in any one unit.
        groups: Of each duel; each is its own without them.
        draws: Resamples.
        seed: Of the draws.

    Returns:
        None where there are fewer than two groups, or all differences are one that is not 0: then what length does and
        what quality does cannot be told apart.

    Raises:
        ValueError: The three differ in number, an outcome is not from 0 to 1, or a difference is not finite.
    """
    won, differences = shares(outcomes), finite(length_differences)
    if len(differences) != len(won):
        raise ValueError(f"{len(won)} outcomes and {len(differences)} length differences")
    grouping = Grouping.of(groups, len(won))
    if len(grouping) < 2 or (differences[0] != 0 and (differences == differences[0]).all()):
        return None
    spread = differences.std()
    lengths = np.tanh(differences / spread) if spread > 0 else np.zeros_like(differences)
    rates = [
        _rates_at_equal_length(won, lengths, counts[:, grouping.members])
        # A regression holds about eight numbers for each outcome.
        for counts in grouping.resamples(draws, seed, width=8 * len(won))
    ]
    estimate = _rates_at_equal_length(won, lengths, np.ones((1, len(won)), dtype=np.int64))
    return open_end(grouping.interval(float(estimate[0]), np.concatenate(rates), 0.95), won)


def _rates_at_equal_length(
    won: NDArray[np.float64], lengths: NDArray[np.float64], weights: NDArray[np.int64]
) -> NDArray[np.float64]:
    """σ(θ) of the ridge regression of `won` (N) on `lengths` (N), for each row of weights (D, N).

    Newton's method with steps shortened by log(1 + δ) / δ, δ = √2 · ‖step‖, with which it reaches the only minimum
    from anywhere: Sun and Tran-Dinh (2019), "Generalized Self-Concordant Functions", for ‖(1, lengths)‖ ≤ √2.
    """
    level = np.zeros(len(weights))
    slope = np.zeros(len(weights))
    for _ in range(_MAX_STEPS):
        expected = 1 / (1 + np.exp(-(level[:, None] + slope[:, None] * lengths)))
        residuals = weights * (won - expected)
        by_level = residuals.sum(axis=1) - _RIDGE * level
        by_slope = residuals @ lengths - _RIDGE * slope
        curvature = weights * expected * (1 - expected)
        levels = curvature.sum(axis=1) + _RIDGE
        mixed = curvature @ lengths
        slopes = curvature @ np.square(lengths) + _RIDGE
        determinant = levels * slopes - np.square(mixed)
        level_step = (slopes * by_level - mixed * by_slope) / determinant
        slope_step = (levels * by_slope - mixed * by_level) / determinant
        size = np.sqrt(2) * np.hypot(level_step, slope_step)
        shortened = np.log1p(size) / np.maximum(size, np.finfo(np.float64).tiny)
        level += shortened * level_step
        slope += shortened * slope_step
        if size.max() < 1e-7:
            break
    return 1 / (1 + np.exp(-level))


def flip_rate(
    pairs: Sequence[tuple[Choice, Choice]], groups: Sequence[Hashable] | None = None, *, seed: int = 0
) -> Interval | None:
    """The share of pairs on which a judge says something else once the answers are swapped, with its 95 % interval.

    A win in one order and a tie in the other count as a flip, as in the consistency (1 − flip rate) of
    Zheng et al. (2023), "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", table 2.

    Args:
        pairs: Of each the verdict in one order, and in the other, each in the words of its own order: a judge that
            always prefers what it sees first says ("first", "first").
        groups: Of each pair; each is its own without them.
        seed: Of the draws.

    Returns:
        None where there are fewer than two groups.

    Raises:
        ValueError: Pairs and groups differ in number, or a verdict is none of the three.
    """
    _check(pairs)
    flipped = [float(_SWAPPED[swapped] != straight) for straight, swapped in pairs]
    return share_interval(flipped, groups=groups, seed=seed)


def position_bias(
    pairs: Sequence[tuple[Choice, Choice]], groups: Sequence[Hashable] | None = None, *, seed: int = 0
) -> Interval | None:
    """The share of a judge's decided verdicts that go to the answer shown first, less 1/2; with its 95 % interval.

    Each pair is seen in both orders, so that better answers stand first and second equally often: a judge without
    bias has 0, one that always takes the first 0.5, the second −0.5.

    Args:
        pairs: As in `flip_rate`. Ties are not decided, and leave the verdict out.
        groups: Of each pair, drawn whole; each pair is its own without them.
        seed: Of the draws.

    Returns:
        None where the decided verdicts are of fewer than two groups.

    Raises:
        ValueError: Pairs and groups differ in number, or a verdict is none of the three.
    """
    _check(pairs)
    names: Sequence[Hashable] = range(len(pairs)) if groups is None else groups
    if len(names) != len(pairs):
        raise ValueError(f"{len(pairs)} pairs and {len(names)} groups")
    decided = [
        (float(verdict == "first"), name)
        for pair, name in zip(pairs, names, strict=True)
        for verdict in pair
        if verdict != "tie"
    ]
    found = share_interval([first for first, _ in decided], groups=[name for _, name in decided], seed=seed)
    if found is None:
        return None
    return replace(found, mean=found.mean - 0.5, low=found.low - 0.5, high=found.high - 0.5)


def _check(pairs: Sequence[tuple[Choice, Choice]]) -> None:
    for pair in pairs:
        if len(pair) != 2 or not set(pair) <= _SWAPPED.keys():
            raise ValueError(f"{pair!r} is not two of first, second and tie")
