"""A comparison whose teacher, or another contender, is behind a server that the user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_distill.compare import testing
from mlx_distill.compare.run import compare
from mlx_distill.config import CompareConfig, JudgeConfig
from mlx_distill.errors import ConfigError
from mlx_distill.judges import rubric
from mlx_distill.judges.run import judges_from_spec
from mlx_distill.layout import ComparisonFolder, read_rows
from mlx_distill.records import Generation
from mlx_distill.teachers.registry import base_urls
from tests.servers.chat_server import MODEL, Answer, ChatServer, completion
from tests.training.runs import fused_run

TASK = """
format = 1
kind = "python"
family = "mine"
[[task]]
id = "double"
difficulty = "easy"
prompt = "Write a Python function `double(x)` that returns twice x."
defines = ["double"]
tests = "assert double(2) == 4"
reference = "def double(x):\\n    return 2 * x"
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A finished and fused run. Do not write into it."""
    return fused_run(tmp_path_factory.mktemp("served"), tiny_model)


@pytest.mark.parametrize(("contender", "asked"), [("teacher", "openai:{}"), ("others", "other=openai:{}")])
def test_the_server_that_is_named_is_asked_and_no_other(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contender: str, asked: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    # What the SDK would turn to by itself: nobody is there.
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    (tmp_path / "prompts.txt").write_text("add two numbers\n", encoding="utf-8")
    with ChatServer() as server:
        server.answers.append(Answer(body=completion("from there")))
        settings = {"run": run, "prompts": tmp_path / "prompts.txt", "base_url": server.url, "max_tokens": 8}
        settings |= {"held_out": 0, "out": tmp_path / "visuals", contender: asked.format(MODEL)}
        compare(CompareConfig.model_validate(settings))
        assert [body["model"] for _, body in server.requests] == [MODEL]
    rows = read_rows(ComparisonFolder(tmp_path / "visuals").generations, Generation)
    name = asked.partition("=")[0] if contender == "others" else contender
    assert {row.contender: row.text for row in rows}[name] == "from there"


@pytest.mark.parametrize("specs", [(), ("anthropic:m", "recorded:d")])
def test_a_server_that_nobody_would_ask_is_refused(specs: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="none of the contenders takes a base URL"):
        base_urls(specs, "http://127.0.0.1:1/v1", what="contenders")
    assert base_urls(specs, None, what="contenders") == dict.fromkeys(specs)


def test_only_those_behind_it_are_sent_there() -> None:
    assert base_urls(["anthropic:m", "openai:n"], "u", what="judges") == {"anthropic:m": None, "openai:n": "u"}


# Where code runs


def test_the_rubric_of_judge_is_confined_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(rubric, "choose_isolation", lambda sandbox, **_: bool(asked.append(sandbox)) or True)
    for sandbox in ("auto", "required", "off"):
        [judge] = judges_from_spec(JudgeConfig(comparison=tmp_path, sandbox=sandbox))
        assert isinstance(judge, rubric.RubricJudge)
        assert judge._sandbox
    assert asked == ["auto", "required", "off"]


def test_tests_of_a_comparison_are_confined_as_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    score = testing.score_answers

    def noting(pairs: Any, *, sandbox: Any, progress: Any) -> Any:
        asked.append(sandbox)
        return score(pairs, sandbox="off", progress=progress)

    monkeypatch.setattr(testing, "score_answers", noting)
    task = tmp_path / "task.toml"
    task.write_text(TASK, encoding="utf-8")
    for sandbox in ("required", "off"):
        settings = {"run": run, "eval": str(task), "max_tokens": 2, "held_out": 0, "out": tmp_path / sandbox}
        compare(CompareConfig.model_validate({**settings, "sandbox": sandbox}))
    assert asked == ["required", "off"]
