"""The step `judge` of a recipe: what it reads and writes follows from its keys, and it does not go on half done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_distill import pipeline
from mlx_distill.errors import TeacherError
from mlx_distill.layout import ComparisonFolder, read_rows
from mlx_distill.progress import SILENT
from mlx_distill.recipe import load_recipe
from mlx_distill.records import Verdict
from tests.judges.judging import comparison

ANSWERS = {("one", who): f"{who} 1" for who in ("base", "distilled")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ComparisonFolder:
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text(
        'name = "small"\n[prompts]\nfile = "p.txt"\n[collect]\nteacher = "recorded:a"\n[compare]\nprompts = "p.txt"\n'
        '[judge]\njudge = "rubric"\n'
    )
    return comparison(Path("visuals/small"), ANSWERS)


def step(*overrides: str) -> pipeline.Step:
    return pipeline._judge(load_recipe(Path("recipe.toml"), overrides))


def test_a_rubric_alone_is_as_it_was(folder: ComparisonFolder) -> None:
    found = step()
    assert (list(found.reads), list(found.writes)) == ([folder.generations], [folder.verdicts])
    found.run(SILENT)
    assert len(read_rows(folder.verdicts, Verdict)) == 2
    assert not folder.duels.exists()
    assert not folder.judge_ledger.exists()


def test_pairs_and_labels_are_read_and_written(folder: ComparisonFolder) -> None:
    labels = Path("labels.jsonl")
    labels.write_text(json.dumps({"prompt_id": "one", "contender": "base", "score": 4}) + "\n")
    found = step("judge.pairwise=true", "judge.calibrate=labels.jsonl")
    assert list(found.reads) == [folder.generations, labels]
    assert list(found.writes) == [folder.verdicts, folder.duels, folder.calibration]
    found.run(SILENT)
    assert all(path.exists() for path in found.writes)
    assert found.setting != step().setting


def test_a_judge_that_says_nothing_stops_the_walk(folder: ComparisonFolder) -> None:
    Path("judge.jsonl").write_text('{"prompt": "something else", "answer": "b"}\n')
    for judges in ("recorded:judge.jsonl", "rubric,recorded:judge.jsonl"):
        with pytest.raises(TeacherError, match=r"recorded:judge\.jsonl gave no verdict"):
            step(f"judge.judge={judges}").run(SILENT)
