"""The commands `prompts` and `collect`: summaries, `--json`, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_distill.cli.main import main
from mlx_distill.prompts import load_prompts


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "record.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n', encoding="utf-8")
    return path


@pytest.fixture
def arguments(tmp_path: Path, record: Path) -> list[str | Path]:
    (tmp_path / "p.txt").write_text("a\nc\n", encoding="utf-8")
    return [
        *("collect", "--prompts", tmp_path / "p.txt", "--teacher", f"recorded:{record}", "--out", tmp_path / "out"),
        *("--valid-fraction", "0", "--test-fraction", "0"),
    ]


def test_prompts_counts_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "prompts.jsonl"
    result = run("prompts", "data/prompts/coding.toml", "--out", out, "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert (data["prompts"], data["variations"], len(data["families"]), data["duplicates"]) == (104, 72, 32, 0)
    assert data["families"]["dijkstra-route"] == 4
    assert sum(data["fields"].values()) == 104
    assert load_prompts(out) == load_prompts(Path("data/prompts/coding.toml"))


def test_prompts_summary_is_a_table_by_field() -> None:
    lines = run("prompts", "data/prompts/coding.toml", "--no-modifiers").stdout.splitlines()
    assert lines[0] == "32 prompts in 32 families, 0 of them variations; no duplicates."
    assert ["algorithms", "8", "8"] in [line.split() for line in lines]


def test_prompts_mistake_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("format = 1\nx\n", encoding="utf-8")
    result = run("prompts", tmp_path / "p.toml")
    assert result.exit_code == 1
    assert f"{tmp_path / 'p.toml'}:2: not valid TOML, column 2" in result.stderr
    assert "Traceback" not in result.output


def test_collect_ends_with_the_next_command(arguments: list[str | Path], tmp_path: Path) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("2 of 2 prompts answered by recorded:")
    assert "train 2 rows (2 families)" in lines[1]
    assert lines[-1] == f"Next:  mlx-distill train --data {tmp_path / 'out'} --run adapters/out"


def test_collect_json_is_one_object(arguments: list[str | Path]) -> None:
    result = run(*arguments, "--json")
    data = json.loads(result.stdout)
    assert (data["answered"], data["failed"], data["rows"]) == (2, 0, {"train": 2, "valid": 0, "test": 0})
    assert data["terms"]["licence"] == "unknown"


def test_failures_exit_1_and_say_how_many(arguments: list[str | Path], tmp_path: Path, record: Path) -> None:
    (tmp_path / "p.txt").write_text("a\nc\nnot recorded\n", encoding="utf-8")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "1 prompt failed. The same command asks again" in result.stdout
    assert (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8").count("\n") == 2
    with record.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "not recorded", "answer": "now it is"}\n')
    assert run(*arguments).exit_code == 0


def test_no_key_says_how_to_go_on(arguments: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    arguments[4] = "anthropic:claude-sonnet-4-6"
    result = run(*arguments)
    assert result.exit_code == 1
    assert "ANTHROPIC_API_KEY is not set" in result.stderr
    assert "recorded:data/starter" in result.stderr


def test_an_empty_split_is_told(arguments: list[str | Path], tmp_path: Path) -> None:
    rows = [{"id": f"p{n}", "family": "family-1", "text": text} for n, text in enumerate("ac")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments[2] = tmp_path / "p.jsonl"
    told = run(*arguments[:-4]).stdout  # Without the two fractions of 0.
    assert "train 2 rows (1 families), valid 0 rows" in told
    assert "No prompt family falls into valid" in told
    assert "No prompt family falls into test" in told
    assert "No prompt family" not in run(*arguments).stdout
