"""Win rates, also at equal length, and what the order of two answers does to a judge."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mlx_distill.stats import (
    Choice,
    Interval,
    flip_rate,
    length_controlled_win_rate,
    position_bias,
    win_rate,
)

CHOICES: tuple[Choice, ...] = ("first", "second", "tie")


def known(found: Interval | None) -> Interval:
    assert found is not None
    return found


def chance(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


def duels(
    n: int, *, quality: float, length: float, seed: int = 0, longer_by: float = 300
) -> tuple[list[float], list[float]]:
    """Outcomes and length differences of duels that quality and length decide, both on the scale of a logit."""
    random = np.random.default_rng(seed)
    differences = random.normal(longer_by, 400, size=n).round()
    logit = quality + length * np.tanh(differences / differences.std())
    return (random.random(n) < chance(logit)).astype(float).tolist(), differences.tolist()


def test_ties_count_for_half() -> None:
    found = known(win_rate([1.0, 1.0, 0.5, 0.0]))
    assert (found.mean, found.n, found.groups) == (0.625, 4, 4)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert known(win_rate([1.0, 0.0] * 30)).holds(0.5)
    assert not known(win_rate([1.0, 1.0, 1.0, 0.0] * 30)).holds(0.5)


def test_duels_of_one_family_are_one_piece_of_evidence() -> None:
    won = [1.0] * 30 + [0.0] * 10
    alone, grouped = known(win_rate(won)), known(win_rate(won, [n // 10 for n in range(40)]))
    assert grouped.groups == 4
    assert not alone.holds(0.5)
    assert grouped.holds(0.5)
    assert win_rate(won, ["one"] * 40) is None


def test_a_win_by_length_alone_is_none_at_equal_length() -> None:
    won, differences = duels(1500, quality=0, length=2)
    raw, controlled = known(win_rate(won)), known(length_controlled_win_rate(won, differences, draws=400))
    assert raw.low > 0.6
    assert controlled.mean == pytest.approx(0.5, abs=0.04)
    assert controlled.holds(0.5)


def test_a_win_by_quality_alone_stays_one() -> None:
    won, differences = duels(1500, quality=1, length=0)
    raw, controlled = known(win_rate(won)), known(length_controlled_win_rate(won, differences, draws=400))
    assert controlled.mean == pytest.approx(raw.mean, abs=0.03)
    assert controlled.low > 0.6
    assert controlled.holds(float(chance(np.array(1.0))))


def test_what_is_better_but_shorter_wins_more_at_equal_length() -> None:
    won, differences = duels(1500, quality=1, length=3, longer_by=-300)
    assert known(win_rate(won)).high < 0.5
    assert known(length_controlled_win_rate(won, differences, draws=400)).low > 0.6


def test_two_lengths_have_an_exact_solution() -> None:
    """With d = ±1 alone the regression fits both shares exactly, and the rate is σ of the mean of their logits."""
    won = [1.0] * 80 + [0.0] * 20 + [1.0] * 40 + [0.0] * 60
    found = known(length_controlled_win_rate(won, [1.0] * 100 + [-1.0] * 100, draws=10))
    logit = (np.log(0.8 / 0.2) + np.log(0.4 / 0.6)) / 2
    # The ridge moves it a little.
    assert found.mean == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-4)


def test_without_a_difference_it_is_the_win_rate() -> None:
    won = [1.0] * 37 + [0.5] * 10 + [0.0] * 13
    controlled = known(length_controlled_win_rate(won, [0.0] * 60))
    raw = known(win_rate(won))
    assert controlled.mean == pytest.approx(raw.mean, abs=1e-3)
    assert (controlled.low, controlled.high) == (pytest.approx(raw.low, abs=0.03), pytest.approx(raw.high, abs=0.03))


def test_a_tie_is_half_a_win_and_half_a_loss() -> None:
    won, differences = duels(40, quality=0.5, length=1)
    tied = known(length_controlled_win_rate([*won, 0.5, 0.5], [*differences, 900.0, 900.0], draws=10))
    split = known(length_controlled_win_rate([*won, 1.0, 0.0], [*differences, 900.0, 900.0], draws=10))
    assert tied.mean == pytest.approx(split.mean, abs=1e-9)


def test_the_other_side_has_the_rest() -> None:
    won, differences = duels(100, quality=0.7, length=1)
    one = known(length_controlled_win_rate(won, differences))
    other = known(length_controlled_win_rate([1 - w for w in won], [-d for d in differences]))
    assert other.mean == pytest.approx(1 - one.mean, abs=1e-6)
    assert (other.low, other.high) == (pytest.approx(1 - one.high, abs=1e-6), pytest.approx(1 - one.low, abs=1e-6))


def test_the_unit_of_length_does_not_matter() -> None:
    won, differences = duels(60, quality=0.7, length=1)
    characters = known(length_controlled_win_rate(won, differences, draws=50))
    tokens = known(length_controlled_win_rate(won, [d / 3.7 for d in differences], draws=50))
    assert tokens.mean == pytest.approx(characters.mean, abs=1e-9)
    assert tokens.low == pytest.approx(characters.low, abs=1e-6)


@pytest.mark.parametrize("n", [4, 100])
@pytest.mark.parametrize("centre", [-5000.0, 0.0, 5000.0])
def test_lengths_that_separate_do_not_diverge(n: int, centre: float) -> None:
    differences = (centre + np.linspace(-300, 300, n)).tolist()
    won = [float(d > centre) for d in differences]
    found = known(length_controlled_win_rate(won, differences, draws=200))
    assert 0 <= found.low <= found.mean <= found.high <= 1
    if centre == 0:
        assert found.mean == pytest.approx(0.5, abs=1e-6)


def test_a_clean_sweep_is_not_certain_at_equal_length() -> None:
    found = known(length_controlled_win_rate([1.0] * 8, [float(d) for d in range(8)], draws=100))
    assert found.low <= 0.6307
    assert found.mean > 0.9


def test_one_difference_for_all_cannot_be_told_from_quality() -> None:
    assert length_controlled_win_rate([1.0, 0.0, 1.0], [20.0] * 3) is None
    assert length_controlled_win_rate([1.0, 0.0, 1.0], [1.0, 2.0, 3.0], ["a"] * 3) is None
    assert length_controlled_win_rate([], []) is None


def test_its_interval_holds_the_true_rate_where_duels_are_clustered() -> None:
    """Each of 40 families repeats one duel up to five times. 200 trials know a share of 95 % to ±3 points."""
    random = np.random.default_rng(2)
    held = without = 0
    for trial in range(200):
        won, differences = duels(40, quality=0.5, length=1.5, seed=100 + trial)
        family = np.repeat(np.arange(40), random.integers(1, 6, size=40))
        outcomes, lengths = np.array(won)[family].tolist(), np.array(differences)[family].tolist()
        true = float(chance(np.array(0.5)))
        held += known(length_controlled_win_rate(outcomes, lengths, family.tolist(), draws=200)).holds(true)
        without += known(length_controlled_win_rate(outcomes, lengths, draws=100)).holds(true)
    assert 0.92 <= held / 200 <= 0.98
    assert without / 200 < 0.85


def test_outcomes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 outcomes and 1 length differences"):
        length_controlled_win_rate([1.0, 0.0], [5.0])
    with pytest.raises(ValueError, match="not from 0 to 1"):
        length_controlled_win_rate([1.0, 2.0], [5.0, 6.0])
    with pytest.raises(ValueError, match="not finite"):
        length_controlled_win_rate([1.0, 0.0], [5.0, float("nan")])
    with pytest.raises(ValueError, match="2 values and 1 groups"):
        length_controlled_win_rate([1.0, 0.0], [5.0, 6.0], ["a"])
    with pytest.raises(ValueError, match="not from 0 to 1"):
        win_rate([-0.1, 1.0])


@pytest.mark.parametrize("pair", list(itertools.product(CHOICES, CHOICES)))
def test_a_verdict_is_kept_only_if_it_names_the_same_answer(pair: tuple[Choice, Choice]) -> None:
    """Swapped, the answer shown first is the one shown second before."""
    same = pair in {("first", "second"), ("second", "first"), ("tie", "tie")}
    assert known(flip_rate([pair] * 3)).mean == (0 if same else 1)


def test_flips_are_counted_over_pairs() -> None:
    found = known(flip_rate([*itertools.product(CHOICES, CHOICES)]))
    assert (found.mean, found.n, found.groups) == (pytest.approx(6 / 9), 9, 9)
    assert known(flip_rate([("first", "second")] * 8)).high == pytest.approx(1 - 0.6306, abs=1e-4)


def test_a_judge_that_goes_by_the_answer_has_no_position_bias() -> None:
    pairs: list[tuple[Choice, Choice]] = [("first", "second")] * 9 + [("second", "first")] * 2
    found = known(position_bias(pairs))
    assert (found.low, found.mean, found.high) == (0, 0, 0)
    assert (found.n, found.groups) == (22, 11)
    assert known(flip_rate(pairs)).mean == 0


@pytest.mark.parametrize(("choice", "bias"), [("first", 0.5), ("second", -0.5)])
def test_a_judge_that_goes_by_the_place_has_all_of_it(choice: Choice, bias: float) -> None:
    found = known(position_bias([(choice, choice)] * 10))
    assert found.mean == bias
    assert not found.spans_zero
    assert known(flip_rate([(choice, choice)] * 10)).mean == 1


def test_ties_are_not_decided() -> None:
    pairs: list[tuple[Choice, Choice]] = [("first", "tie"), ("tie", "tie"), ("first", "second"), ("tie", "first")]
    found = known(position_bias(pairs))
    assert (found.mean, found.n, found.groups) == (0.25, 4, 3)
    assert position_bias([("tie", "tie")] * 5) is None
    assert position_bias([("first", "first")]) is None


def test_a_bias_that_is_there_is_found() -> None:
    """Of 300 pairs a judge takes the first in 30 % whatever it is, and goes by the answers in the rest.

    The means of the pairs are 0.5 in 90 and 0 in 210: their mean is 0.15, its standard error 0.229 / √300.
    """
    sound: list[tuple[Choice, Choice]] = [("first", "second"), ("second", "first")]
    pairs: list[tuple[Choice, Choice]] = [("first", "first")] * 90 + sound * 105
    found = known(position_bias(pairs))
    assert found.mean == pytest.approx(0.15)
    assert (found.high - found.low) / 2 == pytest.approx(1.97 * np.sqrt(0.3 * 0.7 / 300) / 2, rel=0.05)
    assert known(flip_rate(pairs)).mean == pytest.approx(0.3)
    grouped = known(position_bias(pairs, [n // 30 for n in range(300)]))
    assert (grouped.mean, grouped.groups) == (found.mean, 10)
    assert grouped.high - grouped.low > 2 * (found.high - found.low)


def test_what_is_no_verdict_is_refused() -> None:
    for bad in (("first", "A"), ("first",), ("first", None)):
        with pytest.raises(ValueError, match="is not two of first, second and tie"):
            flip_rate([bad])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="is not two of first, second and tie"):
            position_bias([bad])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="1 pairs and 2 groups"):
        position_bias([("first", "first")], ["a", "b"])
    with pytest.raises(ValueError, match="1 values and 2 groups"):
        flip_rate([("first", "first")], ["a", "b"])
