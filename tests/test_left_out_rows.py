"""What is said of rows that training leaves out: how many they are, and which."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlx_distill.dataset import load_splits
from mlx_distill.models.tokenizer import load_tokenizer
from tests.training.runs import Recorder, chat

ASKED = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(("count", "more"), [(1, 0), (2, 0), (10, 0), (11, 1), (1300, 1290)])
def test_ten_of_them_are_named(tmp_path: Path, tiny_model: Path, count: int, more: int) -> None:
    rows = [chat(0), *[ASKED] * count, chat(1)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recorder = Recorder()
    splits = load_splits(tmp_path, load_tokenizer(tiny_model), max_length=256, progress=recorder)
    assert list(splits["train"].lines) == [1, count + 2]
    (said,) = (line for line in recorder.said if "left out" in line)
    assert f"train.jsonl: {count} of {count + 2} rows left out: line 2 (nothing to learn" in said
    assert [int(number) for number in re.findall(r"line (\d+)", said)] == list(range(2, 2 + min(count, 10)))
    assert said.endswith(f" and {more:,} more." if more else ").")
