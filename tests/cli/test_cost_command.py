"""`cost` as it is typed: tables, JSON, a chart, and one message for each mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_distill.cli.main import main
from tests.test_cost import LOCAL, SONNET, fill, reply_of, times

BY_HAND = ("--input-tokens", "45", "--output-tokens", "1024")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["cost", *map(str, arguments)])


def cells(result: Result) -> list[list[str]]:
    """The table's rows, its head included."""
    table = result.stdout.split("\n\n")[1]
    return [re.split(r"\s{2,}", line) for line in table.splitlines()]


def test_numbers_by_hand_make_a_table(tmp_path: Path) -> None:
    result = invoke(*BY_HAND, "--teacher", f"{SONNET},openai:big,{LOCAL}", "--prompts", "104,1000000")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Given by hand: 45 tokens in, 1,024 out a prompt.\n")
    assert cells(result) == [
        ["teacher", "prompts", "online", "batch", "time"],
        [SONNET, "104", "$1.61", "$0.81", "–"],
        [SONNET, "1,000,000", "$15,495", "$7,748", "–"],
        ["openai:big", "104", "not known", "not known", "–"],
        ["openai:big", "1,000,000", "not known", "not known", "–"],
        [LOCAL, "104", "no bill", "–", "–"],
        [LOCAL, "1,000,000", "no bill", "–", "–"],
    ]
    assert "No price is listed for openai:big: its cost is not known." in result.stdout
    assert "$0" not in result.stdout.replace("$0.81", "")


def test_a_local_models_collection_is_told_in_time(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    fill(path, [reply_of((50, 1000), seconds=10.0)] * 2 + [reply_of((0, 500), "length", 10.0)], teacher=f"{LOCAL}@ab")
    times(path, [("00:00", "00:10"), ("00:00", "00:10"), ("00:00", "00:10")])
    result = invoke("--data", tmp_path, "--teacher", LOCAL, "--prompts", "2,1000000")
    assert "Measured: 50 tokens in, 1,250 out a prompt, the average of 2 answers of mlx:Qwen" in result.stdout
    assert "Of 3 replies: 66.7% whole, 33.3% cut, 0.0% refused." in result.stdout
    assert [row[-1] for row in cells(result)[1:]] == ["10.0 s", "58 days"]
    assert "15.0 s an answer, as measured (3.0 under way at once)" in result.stdout
    faster = invoke("--data", tmp_path, "--teacher", LOCAL, "--prompts", "2", "--concurrency", "6")
    assert cells(faster)[1][-1] == "5.0 s"


def test_json_tells_an_unknown_price_from_none(tmp_path: Path) -> None:
    result = invoke(*BY_HAND, "--teacher", f"openai:big,{LOCAL},{SONNET}", "--prompts", "1000", "--json")
    data = json.loads(result.stdout)
    assert [(row["price"], row["online"], row["batch"]) for row in data["rows"]] == [
        ("unknown", None, None),
        ("none", 0.0, None),
        ("listed", 15.495, 7.7475),
    ]
    assert data["averages"]["output_tokens"] == 1024
    assert data["chart"] is None


@pytest.mark.parametrize("teachers", ["", SONNET, f"openai:big,{SONNET},anthropic:claude-haiku-4-5"])
def test_a_chart_is_drawn(tmp_path: Path, teachers: str) -> None:
    chart = tmp_path / "new" / "cost.png"
    result = invoke(*BY_HAND, "--teacher", teachers, "--chart", chart)
    assert result.exit_code == 0, result.output
    assert chart.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert result.stdout.endswith(f"Chart: {chart}\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "one of --data, --comparison, or --input-tokens with --output-tokens is required"),
        (["--input-tokens", "5"], 2, "--input-tokens with --output-tokens is required"),
        (["--data", "d", "--comparison", "c"], 2, "exclude each other"),
        (["--data", "d", *BY_HAND], 2, "exclude each other"),
        (["--input-tokens", "5", "--output-tokens", "0"], 2, "--output-tokens = '0': must be above 0"),
        (["--data", "nowhere"], 1, "nowhere: holds no collection"),
        (["--comparison", "nowhere"], 1, "nowhere: holds no comparison"),
        ([*BY_HAND, "--teacher", "claude-opus-5-5"], 1, "Did you mean anthropic:claude-opus-5-5?"),
        ([*BY_HAND, "--prompts", "many"], 1, "'many' is not a whole number"),
        ([*BY_HAND, "--chart", "cost.pdf"], 1, "a chart is a .png"),
        ([*BY_HAND, "--chart", "cost.png", "--teacher", "openai:x"], 1, "nothing to draw"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []
