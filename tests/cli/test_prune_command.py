"""`prune` as it is typed: what it prints, and one message for each mistake."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click
from click.testing import CliRunner, Result

from mlx_distill.cli.main import main
from mlx_distill.layout import pruned_record, read_record
from mlx_distill.prune import PrunedRecord
from tests.training.runs import make_data


def invoke(*arguments: str | int | Path) -> Result:
    return CliRunner().invoke(main, ["prune", *map(str, arguments)])


def test_the_command_tells_what_went_and_what_is_next(tmp_path: Path, tiny_model: Path) -> None:
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    result = invoke(tiny_model, "--keep-layers", 2, "--out", out, "--data", data)
    assert result.exit_code == 0, result.output
    record = read_record(pruned_record(out), PrunedRecord)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0].startswith(f"Kept 2 of the 4 layers of {tiny_model} (")
    assert lines[1] == f"model {out}"
    first, second = record.removed
    assert lines[2] == f"gone {first.layer}, {second.layer} (in this order, from 0)"
    assert lines[3] == (
        f"loss {second.loss:.4f} nats a token, before {record.loss:.4f} "
        f"(10 rows of train.jsonl, {record.tokens:,} tokens)"
    )
    result = invoke(tiny_model, "--keep-layers", 2, "--out", out, "--data", data, "--json")
    told = json.loads(result.stdout)
    assert told.pop("pruned") == str(out)
    assert PrunedRecord.model_validate(told) == record


def test_the_command_that_it_names_next_is_one(tmp_path: Path, tiny_model: Path) -> None:
    data, out = make_data(tmp_path / "the data"), tmp_path / "my model"
    result = invoke(tiny_model, "--keep-layers", 3, "--out", out, "--data", data)
    told = [line.partition("mlx-distill ")[2] for line in result.stdout.splitlines() if "mlx-distill " in line]
    (name, *words), (other, *more) = map(shlex.split, told)
    assert (name, other) == ("train", "logits")
    train, logits = (main.get_command(click.Context(main), one) for one in (name, other))
    assert train is not None
    assert logits is not None
    context = train.make_context(name, words)
    assert (context.params["model"], context.params["data"]) == (str(out), str(data))
    context = logits.make_context(other, more)
    assert (context.params["teacher"], context.params["data"]) == (f"mlx:{tiny_model}", str(data))
    # What is then added to the first of the two.
    added = shlex.split(result.stdout.partition("train it with:")[2])
    assert train.make_context(name, [*words, *added]).params["distill"] == "forward-kl"


def test_mistakes_are_told_in_one_message(tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "out"
    for keep, code, message in (
        ("0", 2, "--keep-layers = '0': must be above 0."),
        ("two", 2, "--keep-layers = 'two': must be a whole number."),
        ("4", 1, "has 4 layers, so that none would go."),
    ):
        result = invoke(tiny_model, "--keep-layers", keep, "--out", out)
        assert (result.exit_code, result.stdout) == (code, "")
        assert message in result.stderr
    assert invoke(tiny_model, "--keep-layers", "2").exit_code == 2
    assert "There is no model" in invoke(tmp_path / "none", "--keep-layers", "2", "--out", out).stderr
    assert "no data set" in invoke(tiny_model, "--keep-layers", 2, "--out", out, "--data", tmp_path / "gone").stderr
    assert list(tmp_path.iterdir()) == []
