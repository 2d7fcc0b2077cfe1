"""A run under way, by its metrics: the best validation is that with the least of what is minimised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_distill.distillation import Objective
from mlx_distill.run_course import read_course

#: Step, cross-entropy, divergence from the teacher. Learning the teacher raises the first.
VALIDATIONS = [(0, 2.0, 1.5), (4, 2.5, 0.75), (8, 2.125, 1.0)]


@pytest.mark.parametrize(("weight", "best"), [(0.0, 0), (0.5, 8), (1.0, 4)])
def test_what_is_minimised_decides(tmp_path: Path, weight: float, best: int) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "valid", "step": s, "epoch": s / 4, "loss": a, "divergence": d} for s, a, d in VALIDATIONS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    course = read_course(path, Objective("jsd", weight) if weight else None)
    assert course.best_valid is not None
    assert course.best_valid.step == best
    assert (course.first_valid, course.last) == (read_course(path, None).first_valid, course.recent[-1])


def test_a_run_of_text_has_no_divergence(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "valid", "step": s, "epoch": s / 4, "loss": a} for s, a, _ in VALIDATIONS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for objective in (None, Objective("jsd")):
        course = read_course(path, objective)
        assert course.best_valid is not None
        assert course.best_valid.step == 0
