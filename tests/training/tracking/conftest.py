"""A run that trackers are put to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_distill.config import TrainConfig
from mlx_distill.training.run import train
from tests.training.runs import make_data, settings
from tests.training.tracking.tracked import in_folder, outcome_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("trackers") / "data")


@pytest.fixture(scope="module")
def base(data: Path, tiny_model: Path) -> TrainConfig:
    return settings(data, tiny_model, Path("unset"))


@pytest.fixture(scope="module")
def whole(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What a run without trackers leaves."""
    config = in_folder(base, tmp_path_factory.mktemp("whole") / "run")
    train(config)
    return outcome_of(config.run)
