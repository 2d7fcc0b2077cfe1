"""What models are asked: held-out rows, within limits; and prompts of our own where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_distill import layout, probing
from mlx_distill.agreement import Probe
from mlx_distill.dataset import tokenise_split
from mlx_distill.errors import ModelError
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.probing import MAX_POSITIONS, MAX_PROMPTS, MAX_ROWS, MAX_TOKENS, make_probe
from tests.tiny import make_tiny_model
from tests.training.runs import Recorder, chat, make_data


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def texts(model: Path, probe: Probe) -> list[str]:
    tokenizer: Any = load_tokenizer(model)
    return [tokenizer.decode(list(row.tokens)) for row in probe.rows]


# Where the rows are from.


@pytest.mark.parametrize(
    ("rows", "source", "count"),
    [
        ({"train": 5, "valid": 3, "test": 2}, "test", 2),
        ({"train": 5, "valid": 3, "test": 0}, "valid", 3),
        ({"train": 5, "valid": 0, "test": 0}, "train", 5),
    ],
)
def test_the_best_split_is_asked(
    tiny_model: Path, tmp_path: Path, rows: dict[str, int], source: str, count: int
) -> None:
    listener = Recorder()
    probe = make_probe(tiny_model, make_data(tmp_path / "data", **rows), progress=listener)
    assert (probe.source, len(probe.rows)) == (source, count)
    first = {"train": 0, "valid": 5, "test": 8}[source]
    for number, text in enumerate(texts(tiny_model, probe), start=first):
        for message in chat(number)["messages"]:
            assert message["content"] in text
    assert listener.said == []


@pytest.mark.parametrize("content", ["", "{", '{"messages": 5}\n', "\xff\n"], ids=["empty", "cut", "other", "bytes"])
def test_a_split_that_cannot_be_read_is_passed_over(tiny_model: Path, tmp_path: Path, content: str) -> None:
    data = make_data(tmp_path / "data")
    (data / "test.jsonl").write_bytes(content.encode("latin-1"))
    listener = Recorder()
    assert make_probe(tiny_model, data, progress=listener).source == "valid"
    assert len(listener.said) == (content != "")
    assert all("test.jsonl" in line and "Other rows" in line for line in listener.said)


@pytest.mark.parametrize("data", [None, "gone", "empty"])
def test_without_rows_prompts_of_our_own_stand_in(tiny_model: Path, tmp_path: Path, data: str | None) -> None:
    (tmp_path / "empty").mkdir()
    listener = Recorder()
    probe = make_probe(tiny_model, tmp_path / data if data else None, progress=listener)
    assert probe.source == "prompts"
    assert len(probe.rows) == len(probe.prompts) == 4
    assert all(row.tokens == prompt for row, prompt in zip(probe.rows, probe.prompts, strict=True))
    assert all("of our own" in line for line in listener.said)
    assert len(listener.said) == (data is not None)


def test_a_row_that_is_too_long_is_passed_over(tiny_model: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", test=3)
    whole = make_probe(tiny_model, data)
    lengths = sorted(len(row.tokens) for row in whole.rows)
    probe = make_probe(tiny_model, data, max_length=lengths[-1] - 1)
    assert sorted(len(row.tokens) for row in probe.rows) == [n for n in lengths if n < lengths[-1]]


# What of a row is asked.


def test_positions_are_those_whose_next_token_is_learned(tiny_model: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    probe = make_probe(tiny_model, data)
    split = tokenise_split(data / "test.jsonl", load_tokenizer(tiny_model), max_length=2048)
    for asked, row in zip(probe.rows, split.rows, strict=True):
        assert asked.tokens == tuple(row.tokens.tolist())
        assert [at + 1 for at in asked.positions] == np.flatnonzero(row.loss_mask).tolist()
        assert asked.targets == tuple(row.tokens[row.loss_mask].tolist())


def test_a_prompt_ends_where_the_answer_begins(tiny_model: Path, tmp_path: Path) -> None:
    probe = make_probe(tiny_model, make_data(tmp_path / "data"))
    tokenizer: Any = load_tokenizer(tiny_model)
    for prompt, row in zip(probe.prompts, probe.rows, strict=True):
        assert tokenizer.decode(list(prompt)).endswith("<|im_start|>assistant\n")
        assert row.tokens[: len(prompt)] == prompt
        assert row.positions[0] == len(prompt) - 1
    for prompt in make_probe(tiny_model, None).prompts:
        assert tokenizer.decode(list(prompt)).endswith("<|im_start|>assistant\n")


def test_every_end_mark_is_known(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    tokenizer: Any = load_tokenizer(model)
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert make_probe(model, None).end_tokens == (end,)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [other, end]}), encoding="utf-8")
    assert make_probe(model, None).end_tokens == tuple(sorted((end, other)))


def test_it_is_asked_the_same_twice(tiny_model: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", test=40)
    assert make_probe(tiny_model, data) == make_probe(tiny_model, data)


# Limits.


def test_of_many_rows_some_are_asked_from_first_to_last(tiny_model: Path, tmp_path: Path) -> None:
    probe = make_probe(tiny_model, make_data(tmp_path / "data", train=1, valid=0, test=100), greedy_tokens=7)
    assert len(probe.rows) == MAX_ROWS
    assert len(probe.prompts) == MAX_PROMPTS
    assert probe.greedy_tokens == 7
    found = texts(tiny_model, probe)
    assert chat(1)["messages"][0]["content"] in found[0]
    assert chat(100)["messages"][0]["content"] in found[-1]
    assert len(set(found)) == MAX_ROWS


def test_positions_in_all_are_limited_and_spread(tiny_model: Path, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1 " * 400}]}
    data = make_data(tmp_path / "data", test=0)
    write_rows(data / "test.jsonl", [long] * 5)
    probe = make_probe(tiny_model, data)
    assert MAX_POSITIONS - len(probe.rows) < probe.positions <= MAX_POSITIONS
    for row in probe.rows:
        assert list(row.positions) == sorted(set(row.positions))
        assert row.positions[-1] == len(row.tokens) - 2 or len(row.tokens) == MAX_TOKENS
        assert row.positions[-1] - row.positions[0] > 500


def test_what_lies_beyond_the_limit_of_a_row_is_not_read(tiny_model: Path, tmp_path: Path) -> None:
    cut = {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1 " * 900}]}
    late = {"messages": [{"role": "user", "content": "1 " * 700}, {"role": "assistant", "content": "Yes."}]}
    data = make_data(tmp_path / "data", test=0)
    write_rows(data / "test.jsonl", [cut, late])
    (row,) = make_probe(tiny_model, data, max_length=4096).rows
    assert len(row.tokens) == MAX_TOKENS
    assert row.positions[-1] == MAX_TOKENS - 2
    write_rows(data / "test.jsonl", [late])
    assert make_probe(tiny_model, data, max_length=4096).source == "valid"


def test_a_model_that_cannot_chat_is_refused(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", chat_template=None)
    with pytest.raises(ModelError, match="no chat template"):
        make_probe(model, None)


def test_a_folder_that_may_not_be_read_is_passed_over(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(tmp_path / "data")

    def refuse(path: Path, *_rest: object, **_more: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(probing, "tokenise_split", refuse)
    listener = Recorder()
    assert make_probe(tiny_model, data, progress=listener).source == "prompts"
    assert f"{layout.DataFolder(data).split('test')}: Permission denied." in listener.said[0]
