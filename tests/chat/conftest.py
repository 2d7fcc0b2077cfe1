"""A trained student to talk with, beside its base."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_distill.backends.mlx.chatting import Voice, open_voices
from mlx_distill.config import FuseConfig
from mlx_distill.fuse import fuse
from mlx_distill.training.run import train
from tests.training.runs import make_data, settings


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A finished and fused run whose student says something else than the base. Do not write into it."""
    folder = tmp_path_factory.mktemp("chatting")
    run = folder / "tuned"
    train(settings(make_data(folder / "data"), tiny_model, run, epochs=3, learning_rate=0.02))
    fuse(FuseConfig(run=run))
    return run


@pytest.fixture(scope="session")
def voices(run: Path, tiny_model: Path) -> tuple[Voice, Voice]:
    return open_voices(tiny_model, run)
