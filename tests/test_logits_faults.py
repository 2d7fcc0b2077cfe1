"""A teacher's logits where something is wrong: what an earlier teacher left, no numbers, no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_distill.config import LogitsConfig
from mlx_distill.errors import ModelError, ResourceError
from mlx_distill.layout import logits_record
from mlx_distill.logits import write_logits
from tests.tiny import make_tiny_model
from tests.training.runs import make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    return make_data(tmp_path_factory.mktemp("taught") / "data")


def test_entries_without_a_record_are_not_taken_for_another_teachers(
    tmp_path: Path, data: Path, teacher: Path, tiny_model: Path
) -> None:
    config = LogitsConfig(data=data, teacher=str(teacher), top_k=20, out=tmp_path / "logits")
    write_logits(config)
    logits_record(tmp_path / "logits").unlink()
    write_logits(config.model_copy(update={"teacher": str(tiny_model)}))
    write_logits(config.model_copy(update={"teacher": str(tiny_model), "out": tmp_path / "fresh"}))
    for name in ("train", "valid", "test"):
        ours, fresh = ((tmp_path / folder / f"{name}.logits").read_bytes() for folder in ("logits", "fresh"))
        assert ours == fresh


def test_a_teacher_that_computes_no_numbers_is_refused(tmp_path: Path, data: Path) -> None:
    broken = make_tiny_model(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3] = np.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="computes what is no number, in float32"):
        write_logits(LogitsConfig(data=data, teacher=str(broken), out=tmp_path / "logits"))
    assert not (tmp_path / "logits" / "train.done").exists()


def test_memory_that_runs_out_while_reading_is_told(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MLX tells it."""

    def fail(*_: Any) -> None:
        raise RuntimeError("[metal::malloc] Attempting to allocate 40000000000 bytes which is greater than ...")

    monkeypatch.setattr("mlx_distill.backends.mlx.teaching._likeliest", fail)
    with pytest.raises(ResourceError, match="out of memory") as caught:
        write_logits(LogitsConfig(data=data, teacher=str(teacher), out=tmp_path / "logits"))
    assert "--batch-size 1" in str(caught.value)
