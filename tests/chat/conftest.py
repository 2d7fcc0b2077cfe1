"""A trained student to talk with, beside its base."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_distill.backends.mlx.chatting import Voice, open_voices
from tests.training.runs import fused_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A finished and fused run whose student says something else than the base. Do not write into it."""
    return fused_run(tmp_path_factory.mktemp("chatting"), tiny_model)


@pytest.fixture(scope="session")
def voices(run: Path, tiny_model: Path) -> tuple[Voice, Voice]:
    return open_voices(tiny_model, run)
