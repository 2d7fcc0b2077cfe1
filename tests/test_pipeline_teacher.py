"""A walk whose student learns a teacher's distribution: it is trained again when the teacher says something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlx_distill.config import LogitsConfig
from mlx_distill.logits import write_logits
from tests.tiny import make_tiny_model
from tests.walking import done, make_project


def test_a_teacher_that_says_something_else_is_learned_from_again(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_project(tmp_path / "project", tiny_model))
    done()
    teacher = make_tiny_model(tmp_path / "teacher", seed=5)
    logits = Path("data/small/logits/teacher-9")
    taught = ["train.distill=jsd", f"train.teacher_logits={json.dumps(str(logits))}"]
    for top_k in (9, 8):
        shutil.rmtree(logits, ignore_errors=True)
        write_logits(LogitsConfig(data=Path("data/small"), teacher=str(teacher), top_k=top_k, out=logits))
        assert done(*taught)[:2] == ["train", "fuse"]
        assert done(*taught) == []
    asked = ["train.distill=jsd", f"train.teacher_online={json.dumps(str(teacher))}"]
    assert done(*asked)[:2] == ["train", "fuse"]
    make_tiny_model(tmp_path / "teacher", seed=6)
    assert done(*asked)[:2] == ["train", "fuse"]
