"""`logits` as it is typed: what it prints, and the command that it names next."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click
from click.testing import CliRunner, Result

from mlx_distill.cli.main import main
from tests.training.runs import make_data


def invoke(*arguments: str | int | Path) -> Result:
    return CliRunner().invoke(main, ["logits", *map(str, arguments)])


def test_the_command_that_it_names_next_is_one(tmp_path: Path, tiny_model: Path) -> None:
    data = make_data(tmp_path / "the data")
    flags = ("--data", data, "--teacher", f"mlx:{tiny_model}", "--top-k", 8)
    result = invoke(*flags)
    assert result.exit_code == 0, result.output
    folder = data / "logits" / f"{tiny_model.name}-8"
    assert "  8 tokens of 384 at each, 40 bytes: " in result.stdout
    words = shlex.split(result.stdout.partition("next:")[2])
    train = main.get_command(click.Context(main), "train")
    assert train is not None
    assert words[:2] == ["mlx-distill", "train"]
    given = train.make_context("train", words[2:]).params
    assert (given["data"], given["model"], given["distill"]) == (str(data), "STUDENT", "forward-kl")
    assert given["teacher_logits"] == str(folder)
    assert json.loads(invoke(*flags, "--json").stdout)["folder"] == str(folder)
