"""Runs with trackers, and what these must then have been given."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from mlx_distill.config import TrainConfig
from tests.training.runs import AtStep, metrics, outcome

#: 10 rows in batches of 3, two epochs.
STEPS = 8


def in_folder(config: TrainConfig, run: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), "run": run, **changes})


def outcome_of(run: Path) -> tuple[Any, ...]:
    adapter, rows, record = outcome(run)
    record["config"].pop("report_to")
    record.pop("plan", None)  # follows from what memory was free
    return adapter, rows, record


def stopping(step: int) -> AtStep:
    return AtStep(step, lambda: signal.raise_signal(signal.SIGINT))


def expected_points(run: Path) -> dict[int, dict[str, float]]:
    """What `metrics.jsonl` says, under the trackers' names, without the speeds."""
    points: dict[int, dict[str, float]] = {}
    for row in metrics(run):
        part = {"step": "train/", "train": "train/epoch_"}.get(row["kind"], f"{row['kind']}/")
        names = ("loss", "token_accuracy", *(("learning_rate", "grad_norm") if row["kind"] == "step" else ()))
        points.setdefault(row["step"], {}).update({part + name: row[name] for name in names})
    return points


def without_speed(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "train/tokens_per_second"}
