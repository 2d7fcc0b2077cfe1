"""The learning rate, step by step."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distill.config import TrainConfig
from mlx_distill.training.schedule import learning_rate


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"data": Path("d"), "run": Path("r"), "learning_rate": 1.0, **changes})


def test_the_warm_up_is_a_line_that_never_starts_at_nothing() -> None:
    rates = [learning_rate(config(warmup=0.2), step, 20) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [
        ("cosine", 0.1 + 0.9 * 0.5, 0.1 + 0.9 * (1 + math.cos(math.pi * 0.9)) / 2),
        ("linear", 0.1 + 0.9 * 0.5, 0.1 + 0.9 * 0.1),
        ("constant", 1.0, 1.0),
    ],
)
def test_the_schedule_without_warm_up(schedule: str, middle: float, last: float) -> None:
    given_config = config(schedule=schedule, warmup=0.0, final_learning_rate=0.1)
    rates = [learning_rate(given_config, step, 10) for step in (0, 5, 9)]
    assert rates == pytest.approx([1.0, middle, last])


SCHEDULES = st.sampled_from(["cosine", "linear", "constant"])


@given(SCHEDULES, st.floats(0, 0.999), st.floats(0, 1), st.integers(1, 400))
def test_it_rises_then_falls_and_stays_between_zero_and_the_peak(
    schedule: str, warmup: float, final: float, total: int
) -> None:
    given_config = config(schedule=schedule, warmup=warmup, final_learning_rate=final)
    rates = [learning_rate(given_config, step, total) for step in range(total)]
    assert all(0 < rate <= 1 + 1e-12 for rate in rates)
    top = rates.index(max(rates))
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[top:]))
    assert all(rate >= min(final, rates[0]) - 1e-12 for rate in rates)


@given(SCHEDULES, st.floats(1e-8, 1e2))
def test_it_scales_with_the_peak(schedule: str, peak: float) -> None:
    for step in range(12):
        scaled = learning_rate(config(schedule=schedule, learning_rate=peak), step, 12)
        assert scaled == pytest.approx(peak * learning_rate(config(schedule=schedule), step, 12))
