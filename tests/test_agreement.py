"""How far two models are apart: exact figures against the formulas, and no figure where a model gives no number."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_distill.agreement import Agreement, Observation, ObservationWriter, Probe, ProbeRow, agreement

VOCABULARY = 23

Greedy = tuple[tuple[int, ...], ...]


def make_probe(lengths: tuple[int, ...] = (9, 40, 2, 31), prompts: int = 0, seed: int = 0) -> Probe:
    """Every second position of random rows; more in all than are read at once."""
    random = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        tokens = tuple(random.integers(0, VOCABULARY, length).tolist())
        rows.append(ProbeRow(tokens=tokens, positions=tuple(range(0, length - 1, 2)) or (0,)))
    return Probe(rows=tuple(rows), prompts=((1, 2),) * prompts)


def observed(logits: NDArray[Any], greedy: Greedy = ()) -> Observation:
    return Observation(logits.astype(np.float32), greedy)


def random_logits(probe: Probe, seed: int, width: int = VOCABULARY) -> NDArray[np.float32]:
    return (3 * np.random.default_rng(seed).standard_normal((probe.positions, width))).astype(np.float32)


def by_formula(probe: Probe, first: NDArray[Any], second: NDArray[Any]) -> dict[str, float]:
    """All figures at once, by their definitions, in float64."""
    one, two = first.astype(np.float64), second.astype(np.float64)
    p = np.exp(one) / np.exp(one).sum(axis=1, keepdims=True)
    q = np.exp(two) / np.exp(two).sum(axis=1, keepdims=True)
    targets = np.array([row.tokens[at + 1] for row in probe.rows for at in row.positions])
    each = np.arange(len(targets))
    return {
        "largest_difference": np.abs(one - two).max(),
        "mean_difference": np.abs(one - two).mean(),
        "kl": (p * np.log(p / q)).sum(axis=1).mean(),
        "same_choice": (p.argmax(axis=1) == q.argmax(axis=1)).mean(),
        "loss_reference": -np.log(p[each, targets]).mean(),
        "loss": -np.log(q[each, targets]).mean(),
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lengths", [(2,), (9, 40, 2, 31), (64, 66), (65, 65, 130)])
def test_every_figure_is_its_formula(seed: int, lengths: tuple[int, ...]) -> None:
    probe = make_probe(lengths, seed=seed)
    first = random_logits(probe, seed)
    second = first + 0.3 * random_logits(probe, seed + 100)
    found = agreement(probe, observed(first), observed(second))
    for name, value in by_formula(probe, first, second).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12), name
    assert found.positions == probe.positions
    assert found.finite
    assert (found.answers, found.greedy_agreement) == (0, None)


def test_a_hand_made_case() -> None:
    """Two words, even odds against three to one: KL is ln 2 − ln 3 / 2, and the losses are those of the odds."""
    probe = Probe(rows=(ProbeRow(tokens=(0, 1), positions=(0,)),))
    found = agreement(probe, observed(np.array([[5.0, 5.0]])), observed(np.array([[math.log(3), 0.0]])))
    assert found.kl == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)
    assert found.loss_reference == pytest.approx(math.log(2), rel=1e-12)
    assert found.loss == pytest.approx(math.log(4), rel=1e-6)
    assert found.largest_difference == pytest.approx(5.0)
    assert found.same_choice == 1.0  # The first of equals counts.


def test_a_model_agrees_with_itself() -> None:
    probe = make_probe()
    logits = random_logits(probe, 3)
    found = agreement(probe, observed(logits), observed(logits.copy()))
    assert (found.largest_difference, found.mean_difference, found.kl, found.same_choice) == (0.0, 0.0, 0.0, 1.0)
    assert found.loss == found.loss_reference


def test_what_all_logits_share_says_nothing() -> None:
    """A constant added to a position changes no probability; the difference of the logits tells it all the same."""
    probe = make_probe()
    logits = random_logits(probe, 3)
    found = agreement(probe, observed(logits), observed(logits + np.float32(4)))
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert found.loss == pytest.approx(found.loss_reference, abs=1e-6)
    assert found.mean_difference == pytest.approx(4, rel=1e-6)


def test_large_logits_do_not_overflow() -> None:
    probe = make_probe()
    logits = 1e4 * random_logits(probe, 3)
    found = agreement(probe, observed(logits), observed(logits + random_logits(probe, 4)))
    assert found.finite


# Padded vocabularies.


@pytest.mark.parametrize("padded", ["first", "second"])
def test_words_that_do_not_exist_are_not_compared(padded: str) -> None:
    probe = make_probe()
    first, second = random_logits(probe, 1), random_logits(probe, 2)
    expected = agreement(probe, observed(first), observed(second))
    padding = np.full((probe.positions, 9), 100.0, dtype=np.float32)
    if padded == "first":
        first = np.concatenate([first, padding], axis=1)
    else:
        second = np.concatenate([second, padding], axis=1)
    assert agreement(probe, observed(first), observed(second)) == expected


# What is no number.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("position", [0, 1, -1])
@pytest.mark.parametrize("word", [0, 7])
def test_one_logit_that_is_no_number_is_not_passed_over(value: float, side: int, position: int, word: int) -> None:
    probe = make_probe()
    both = [random_logits(probe, 1), random_logits(probe, 1)]
    both[side][position, word] = value
    found = agreement(probe, observed(both[0]), observed(both[1]))
    assert not found.finite
    assert not math.isfinite(found.largest_difference)
    assert not math.isfinite(found.kl)


def test_no_number_in_both_is_no_agreement() -> None:
    probe = make_probe()
    logits = random_logits(probe, 1)
    logits[3] = math.nan
    assert not agreement(probe, observed(logits), observed(logits)).finite


def test_finite_looks_at_every_figure() -> None:
    figures = {"largest_difference": 0.0, "mean_difference": 0.0, "kl": 0.0, "loss_reference": 0.0, "loss": 0.0}
    assert Agreement(positions=1, same_choice=1, **figures).finite
    for name in figures:
        assert not Agreement(positions=1, same_choice=1, **{**figures, name: math.nan}).finite, name


# Greedy answers.


@pytest.mark.parametrize(
    ("reference", "found", "expected"),
    [
        # Whole and alike; an empty answer is its end alone.
        (((1, 2, 3),), ((1, 2, 3),), 1.0),
        (((),), ((),), 1.0),
        # From the first that differs on, nothing counts, even where later tokens are alike again.
        (((1, 2, 3),), ((1, 9, 3),), 1 / 4),
        (((1, 2, 3),), ((9, 2, 3),), 0.0),
        # One ends where the other goes on: the end differs from the next token.
        (((1, 2, 3),), ((1, 2),), 2 / 4),
        (((1, 2),), ((1, 2, 3),), 2 / 4),
        (((),), ((1,),), 0.0),
        # Over all answers, by tokens.
        (((1, 2, 3), (4,)), ((1, 2, 3), (5,)), 4 / 6),
        (((1, 2, 3), (4, 5)), ((1, 7, 3), (4, 5)), 4 / 7),
    ],
)
def test_greedy_answers_are_counted_up_to_the_first_difference(
    reference: Greedy, found: Greedy, expected: float
) -> None:
    probe = make_probe(prompts=len(reference))
    logits = random_logits(probe, 1)
    result = agreement(probe, observed(logits, reference), observed(logits, found))
    assert result.greedy_agreement == pytest.approx(expected, rel=1e-12)
    assert result.answers == len(reference)


# Written and read.


@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_written_is_read(tmp_path: Path, parts: int) -> None:
    probe = make_probe(prompts=2)
    logits = random_logits(probe, 1)
    writer = ObservationWriter(tmp_path / "deep" / "folder", probe)
    at = 0
    for row in probe.rows:
        for part in np.array_split(logits[at : at + len(row.positions)], parts):
            writer.add_row(part)
        at += len(row.positions)
    writer.finish([[5, 6], []])
    found = Observation.load(tmp_path / "deep" / "folder")
    assert found.logits.dtype == np.float32
    np.testing.assert_array_equal(found.logits, logits)
    assert found.greedy == ((5, 6), ())


def test_a_writer_begins_anew(tmp_path: Path) -> None:
    probe = make_probe(lengths=(5,), prompts=0)
    for seed in (1, 2):
        writer = ObservationWriter(tmp_path, probe)
        writer.add_row(random_logits(probe, seed))
        writer.finish([])
        np.testing.assert_array_equal(Observation.load(tmp_path).logits, random_logits(probe, seed))


def test_half_an_observation_is_none(tmp_path: Path) -> None:
    probe = make_probe(lengths=(9, 5), prompts=1)
    logits = random_logits(probe, 1)
    writer = ObservationWriter(tmp_path, probe)
    with pytest.raises(ValueError, match="whole probe"):
        writer.finish([[1]])
    writer.add_row(logits[:4])
    with pytest.raises(ValueError, match="whole probe"):
        writer.finish([[1]])
    with pytest.raises(ValueError, match="one row of logits"):
        writer.add_row(logits[4:, :-1])
    writer.add_row(logits[4:])
    with pytest.raises(ValueError, match="one row of logits"):
        writer.add_row(logits[:1])
    with pytest.raises(ValueError, match="whole probe"):
        writer.finish([])
    writer.finish([[1]])
    assert json.loads((tmp_path / "greedy.json").read_text(encoding="utf-8")) == [[1]]


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    """Not a signal, as it would be for a file that is mapped."""
    probe = make_probe()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = ObservationWriter(tmp_path, probe)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            writer.add_row(random_logits(probe, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
