"""What `train` prints in the end: of text and of distillation, what was minimised and how it went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_distill.cli.train import summarise
from mlx_distill.config import TrainConfig
from mlx_distill.run_records import RunRecord
from tests.run_folders import RECORD

TEACHER = {"distill": "forward-kl", "teacher_online": "mlx:big"}
APART = {"distilled_from": "big", "first_divergence": 1.25, "divergence": 0.5}


def told(settings: dict[str, Any], **facts: Any) -> tuple[dict[str, Any], list[str]]:
    config = TrainConfig(data=Path("data"), run=Path("run"), **settings)
    summary = summarise(config, RunRecord.model_validate({**RECORD, **facts}))
    assert not callable(summary.lines)
    return summary.data, [" ".join(line.split()) for line in summary.lines]


def test_of_text_it_tells_the_loss() -> None:
    data, lines = told({})
    assert lines[0] == "Trained 0.0M parameters of Model, 3 epochs."
    assert lines[1] == "validation loss 2.5000 → 1.7500 (best at step 6 of 9)"
    assert not [line for line in lines if "divergence" in line]
    assert (data["distilled_from"], data["first_divergence"], data["divergence"]) == (None, None, None)


def test_of_a_distribution_it_tells_how_near_it_came_to_whom() -> None:
    data, lines = told(TEACHER, **APART)
    assert lines[1:4] == [
        "validation loss 2.5000 → 1.7500",
        "divergence 1.2500 → 0.5000 from big, by forward-kl",
        "best at step 6 of 9, where the divergence on the validation rows was least",
    ]
    assert {key: data[key] for key in APART} == APART


def test_without_validation_it_names_the_teacher() -> None:
    _, lines = told(TEACHER, distilled_from="big", first_valid_loss=None, valid_loss=None)
    assert lines[1:3] == ["train loss 1.5000", "distilled from big"]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({}, "the validation loss"),
        (TEACHER, "the divergence on the validation rows"),
        ({**TEACHER, "distill_weight": 0.7}, "0.7 × divergence + 0.3 × loss on the validation rows"),
    ],
)
def test_a_run_that_stopped_early_says_what_no_longer_fell(settings: dict[str, Any], what: str) -> None:
    _, lines = told(settings, **(APART if settings else {}), stopped_early=True)
    assert f"stopped early after 9 steps: {what} no longer fell" in lines
